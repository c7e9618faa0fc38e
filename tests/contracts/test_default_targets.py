"""Default targets of LoHa, LoKr, OFT and BOFT at full size, for which sd-scripts has separate lists.

The lists are those of its networks/network_base.py (LoHa, LoKr) and networks/orthogonal_common.py (OFT, BOFT).
"""

import gzip
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.anima.model import Anima, read_config
from tests.contracts.full_size import view_for_networks
from tests.contracts.test_lora_keys_anima import QWEN3
from tests.hiding import lazily

transformers = lazily("transformers")

pytestmark = pytest.mark.slow

Models = tuple[Any, nn.Module]
CLIP = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
QWEN = ("Qwen3Attention", "Qwen3MLP", "Qwen3SdpaAttention", "Qwen3FlashAttention2")
CONVOLUTIONS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
LEFT_OUT = r".*(_modulation|_norm|_embedder|final_layer).*"
LISTS: dict[
    str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str]
] = {  # denoiser, text, prefixes, excluded
    "sdxl": (("Transformer2DModel",), CLIP, ("lora_te1", "lora_te2"), r"(?!)"),
    "anima": (("Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"), QWEN, ("lora_te",), LEFT_OUT),
}
WITH_CONVOLUTIONS = {"loha": "conv_dim", "lokr": "conv_dim", "oft_v2": "enable_conv", "boft": "enable_conv"}


@pytest.fixture(scope="module")
def models() -> dict[str, Models]:
    data = Path(__file__).parent / "data" / "anima.json.gz"
    components = json.loads(gzip.decompress(data.read_bytes()))["components"]
    shapes = {name: tuple(shape) for name, shape in components["dit"].items()}
    with torch.device("meta"):
        anima = [transformers.Qwen3Model(transformers.Qwen3Config(**QWEN3))], Anima(read_config(shapes))
    return {"sdxl": view_for_networks("sdxl"), "anima": anima}


def listed(prefix: str, root: nn.Module, classes: tuple[str, ...], excluded: str, with_kernels: bool) -> Iterator[str]:
    """Yield the names of Linear layers and convolutions below modules of these classes, found as sd-scripts does."""
    for path, block in root.named_modules():
        if type(block).__name__ in classes:
            for child_path, child in block.named_modules():
                full = f"{path}.{child_path}"
                is_wide = isinstance(child, nn.Conv2d) and child.kernel_size != (1, 1)
                is_target = isinstance(child, (nn.Linear, nn.Conv2d)) and (with_kernels or not is_wide)
                if is_target and not re.fullmatch(excluded, full):
                    yield f"{prefix}.{full}".replace(".", "_")


CASES = [
    *((kind, "sdxl", with_kernels) for kind in WITH_CONVOLUTIONS for with_kernels in (False, True)),
    ("loha", "anima", False),
    ("lokr", "anima", False),
]


@pytest.mark.parametrize(("kind", "base", "with_kernels"), CASES)
def test_the_adapted_modules_are_those_of_sd_scripts(
    models: dict[str, Models], kind: str, base: str, with_kernels: bool
) -> None:
    blocks, text_blocks, prefixes, excluded = LISTS[base]
    text, denoiser = models[base]
    arguments = {WITH_CONVOLUTIONS[kind]: "4" if "lo" in kind else "True"} if with_kernels else {}
    with torch.device("meta"):
        module: Any = importlib.import_module(f"networks.{kind}")
        network = module.create_network(1.0, 4, 1.0, None, text, denoiser, **arguments)
    expected = list(
        listed("lora_unet", denoiser, blocks + (CONVOLUTIONS if with_kernels else ()), excluded, with_kernels)
    )
    for prefix, encoder in zip(prefixes, text, strict=True):
        expected += listed(prefix, encoder, text_blocks, excluded, False)
    assert set(network.adapters) == set(expected) and len(expected) > 300


def test_rank_patterns_may_be_full_paths_or_parts_of_names(models: dict[str, Models]) -> None:
    """sd-scripts' LoHa and LoKr accept full paths for SDXL too; networks.lora accepts parts of names."""
    text, denoiser = models["sdxl"]
    name = "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    for expression in (r".*input_blocks\.4\.1\.transformer_blocks\.0\.attn1\.to_q", name):
        with torch.device("meta"):
            loha: Any = importlib.import_module("networks.loha")
            network = loha.create_network(1.0, 4, 1.0, None, text, denoiser, network_reg_dims=f"{expression}=7")
        ranks = {name: adapter.change.delta.rank for name, adapter in network.adapters.items()}
        assert [found for found, rank in ranks.items() if rank == 7] == [f"lora_unet_{name}"]

"""Names of HunyuanImage 2.1's denoiser in diffusers, and the relatives of the model that are refused."""

from typing import Any

import pytest
import torch

from library.architectures.hunyuan_image.keys import from_diffusers
from library.architectures.hunyuan_image.model import read_config
from library.checkpoints.weights import Weights
from tests.contracts.test_lora_keys_hunyuan_image import DENOISER


def test_the_diffusers_layout_gives_our_shapes() -> None:
    from diffusers import HunyuanImageTransformer2DModel

    with torch.device("meta"):
        theirs = HunyuanImageTransformer2DModel(text_embed_2_dim=1472)
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    weights = from_diffusers(Weights("file", shapes, lambda name: torch.empty(shapes[name], device="meta")))
    assert dict(weights.shapes) == DENOISER


@pytest.mark.parametrize("options", [{"guidance_embeds": True}, {"use_meanflow": True}])
def test_distilled_models_of_diffusers_are_recognised(options: dict[str, Any]) -> None:
    from diffusers import HunyuanImageTransformer2DModel

    with torch.device("meta"):
        theirs = HunyuanImageTransformer2DModel(text_embed_2_dim=1472, num_layers=1, num_single_layers=1, **options)
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    weights = from_diffusers(Weights("file", shapes, lambda name: torch.empty(shapes[name], device="meta")))
    with pytest.raises(ValueError, match=r"this is a distilled HunyuanImage 2.1 .* train on"):
        read_config(weights.shapes)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"guidance_in.mlp.0.weight": (3584, 256)}, "this is a distilled HunyuanImage 2.1 (it has guidance_in)"),
        ({"time_r_in.mlp.0.weight": (3584, 256)}, "this is a distilled HunyuanImage 2.1 (it has time_r_in)"),
        ({"img_in.proj.weight": (3584, 128, 1, 1, 1)}, "this is the refiner of HunyuanImage 2.1"),
    ],
)
def test_relatives_of_the_original_release_are_refused(extra: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError) as error:
        read_config({**DENOISER, **extra})
    assert message in str(error.value)


def test_pruned_models_load() -> None:
    shapes = {n: s for n, s in DENOISER.items() if not n.startswith("single_blocks") or int(n.split(".")[1]) < 7}
    assert read_config(shapes).num_single == 7
    with pytest.raises(ValueError, match=r"its single_blocks are numbered \[1, 2"):
        read_config({n: s for n, s in shapes.items() if not n.startswith("single_blocks.0.")})

"""Saved adapters of four base models in diffusers' loader and transformer, and other trainers' files in ours, with
equal weights."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.architectures.flux_2 import adapter_names as flux_2_names
from library.architectures.krea2 import adapter_names as krea2_names
from library.architectures.qwen_image_21 import adapter_names as qwen_image_21_names
from library.architectures.zimage import adapter_names as zimage_names
from library.errors import UserError
from networks import dylora, lokr, lora, lora_fa, lora_flux_2, lora_krea2, lora_qwen_image_21, lora_zimage
from networks.core.files.adapter_file import adapter_tensors, read_adapter_file
from networks.core.files.foreign_names import add_model
from networks.core.files.renaming import rename
from tests.parity import test_flux_2_model, test_krea2_model, test_qwen_image_21_model, test_zimage_model
from tests.parity.denoisers import save_trained
from tests.tiny.flux_2 import tiny_flux_2
from tests.tiny.krea2 import tiny_krea2
from tests.tiny.qwen_image_21 import tiny_qwen_image_21
from tests.tiny.zimage import tiny_zimage
from tests.tolerances import FLOAT32_DEEP
from tests.unit.networks.toy import randomize

Keys = Callable[[str, Tensor, Tensor], dict[str, Tensor]]


def kohya_keys(path: str, down: Tensor, up: Tensor, prefix: str = "lora_unet") -> dict[str, Tensor]:
    """Return Kohya keys; an alpha of half the rank halves the change, so `up` is doubled."""
    stem = f"{prefix}_{path.replace('.', '_')}"
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": 2 * up, f"{stem}.alpha": torch.tensor(1.0)}


def dotted_keys(path: str, down: Tensor, up: Tensor, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{path}.lora_A.weight": down, f"{prefix}.{path}.lora_B.weight": up}


def onetrainer_keys(path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    stem = f"transformer.{path}"
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}


TRAINERS: Mapping[str, Keys] = {
    "musubi-tuner": kohya_keys,
    "ai-toolkit": partial(dotted_keys, prefix="diffusion_model"),
    "PEFT": partial(dotted_keys, prefix="base_model.model"),
    "SimpleTuner": partial(dotted_keys, prefix="transformer"),
    "OneTrainer, kohya": partial(kohya_keys, prefix="lora_transformer"),
    "OneTrainer": onetrainer_keys,
}


@dataclass(frozen=True)
class Dit:
    """A base model with the networks and files to test."""

    module: Any  # its network module
    names: Any
    model: Callable[[], Any]  # a tiny transformer
    parity: ModuleType  # builds its inputs and diffusers' transformer with the same weights
    sizes: tuple[Any, ...]  # of the inputs
    pipeline: str
    layer: tuple[str, str]  # a layer that every network adapts: Kohya name and name in saved files
    blocks: tuple[str, ...]  # path prefixes of the layers other trainers adapt, ours and diffusers'
    own: Sequence[Mapping[str, str]]  # arguments of its network module; the last set adapts more layers
    plain: Mapping[str, str]  # arguments of networks.lora
    trainers: Sequence[tuple[str, bool]]  # (trainer, True if it uses diffusers paths)
    prefix: str = "diffusion_model"  # prefix in saved files
    other_kinds: str = ""  # prefix in files of other kinds than LoRA; Kohya names if empty

    def values(self) -> list[Tensor]:
        return [value.detach() for value in self.parity.inputs(*self.sizes)]

    def trained_file(self, network_module: Any, path: Path, arguments: Mapping[str, str]) -> tuple[Tensor, Tensor]:
        """Save an adapter with random weights; return the predictions without and with it."""
        ours = self.model()
        return save_trained(network_module, path, arguments, ours, lambda: ours(*self.values()))

    def prediction_with(self, path: Path, network_module: Any = None) -> Tensor:
        """Return our prediction with an adapter file merged."""
        ours, network_module = self.model(), network_module or self.module
        network, weights = network_module.create_network_from_weights(
            1.0, str(path), None, [], ours, for_inference=True
        )
        network.merge_to([], ours, weights, torch.float32, "cpu")
        return ours(*self.values())  # type: ignore[no-any-return]

    def diffusers_prediction(self, path: Path, caplog: pytest.LogCaptureFixture) -> Tensor:
        """Return diffusers' prediction with the unmodified file; it logs unused keys."""
        theirs, pipeline = self.parity.diffusers_model(self.model()), getattr(diffusers, self.pipeline)
        with caplog.at_level(logging.WARNING, "diffusers"):
            pipeline.load_lora_into_transformer(pipeline.lora_state_dict(str(path)), theirs)
        assert not any(word in caplog.text for word in ("unexpected", "Unsupported", "No LoRA keys"))
        return self.parity.oracle_output(theirs, *self.values())  # type: ignore[no-any-return]

    def foreign_file(self, path: Path, trainer: str, is_diffusers: bool) -> Tensor:
        """Write a file as another trainer does, with different factors per layer; return its model's prediction."""
        theirs = self.parity.diffusers_model(self.model()) if is_diffusers else self.model()
        generator = torch.Generator().manual_seed(11)
        tensors: dict[str, Tensor] = {}
        for name, layer in theirs.named_modules():
            if isinstance(layer, nn.Linear) and name.startswith(self.blocks):
                down = torch.randn(2, layer.in_features, generator=generator) / layer.in_features**0.5
                up = 0.3 * torch.randn(layer.out_features, 2, generator=generator)
                tensors |= TRAINERS[trainer](name, down, up)
                layer.weight.add_(up @ down)
        save_file(tensors, path)
        values = self.values()
        return self.parity.oracle_output(theirs, *values) if is_diffusers else theirs(*values)  # type: ignore[no-any-return]


SPLIT = {"split_qkv": "True"}
DITS: Mapping[str, Dit] = {
    "zimage": Dit(
        lora_zimage, zimage_names.NAMES, partial(tiny_zimage, 7), test_zimage_model, (6, 10, (5, 40)),
        "ZImagePipeline", ("lora_unet_layers_0_attention_out", "layers.0.attention.to_out.0"), ("layers.",),
        ({}, {"embedder_dims": "[2,2,2]", "include_patterns": "['.*']"}), SPLIT,
        [(name, True) for name in TRAINERS if name != "PEFT"],
    ),
    "flux_2": Dit(
        lora_flux_2, flux_2_names.NAMES, partial(tiny_flux_2, 7, is_dev=True), test_flux_2_model, (3, 5),
        "Flux2Pipeline", ("lora_unet_single_blocks_0_linear2", "single_blocks.0.linear2"),
        ("double_blocks.", "single_blocks.", "transformer_blocks.", "single_transformer_blocks."),
        ({}, {"in_dims": "[2,2,2,2,2,2,2]"}), SPLIT,
        [("musubi-tuner", False), ("ai-toolkit", False), ("ai-toolkit", True), ("SimpleTuner", True),
         ("OneTrainer, kohya", True), ("OneTrainer", True)],
    ),
    "krea2": Dit(
        lora_krea2, krea2_names.NAMES, partial(tiny_krea2, 7), test_krea2_model, (4, 6),
        "Krea2Pipeline", ("lora_unet_blocks_0_attn_wq", "blocks.0.attn.wq"), ("",),
        ({"mlp_dim": "0", "txtfusion_dim": "2"}, {}),
        {"exclude_patterns": "['.*']", "include_patterns": r"['blocks\..*\.attn\..*']"},
        [("musubi-tuner", False), ("ai-toolkit", False), ("PEFT", False), ("SimpleTuner", True),
         ("OneTrainer, kohya", True)],
    ),
    "qwen_image_21": Dit(
        lora_qwen_image_21, qwen_image_21_names.NAMES, partial(tiny_qwen_image_21, 7), test_qwen_image_21_model, (4, 6),
        "QwenImage21Pipeline",
        ("lora_unet_transformer_blocks_0_img_mlp_gate_layer", "transformer_blocks.0.img_mlp.gate_layer"),
        ("transformer_blocks.",), ({}, {"in_dims": "[2,2,2,2]"}), {"attn_dim": "0"},
        [("musubi-tuner", False), ("ai-toolkit", False), ("SimpleTuner", False)], "transformer", "transformer.",
    ),
}  # fmt: skip


def networks_of(dit: Dit) -> list[tuple[Any, Mapping[str, str]]]:
    """Return the network modules of a base model with their arguments."""
    split = SPLIT if dit.plain is SPLIT else {}
    return [
        *((dit.module, arguments) for arguments in dit.own),
        (lora, dit.plain),
        (lora_fa, {**split, **dit.own[-1]}),
        (dylora, {"unit": "2"}),
    ]


def module_id(value: Any) -> str:
    return value.__name__.removeprefix("networks.") if isinstance(value, ModuleType) else str(value)


@pytest.mark.parametrize(
    ("name", "network_module", "arguments"),
    [(name, *network) for name, dit in DITS.items() for network in networks_of(dit)],
    ids=module_id,
)
def test_diffusers_loads_our_file_without_conversion(
    name: str, network_module: Any, arguments: Mapping[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dit, path = DITS[name], tmp_path / "ours.safetensors"
    base, expected = dit.trained_file(network_module, path, arguments)
    assert (expected - base).abs().max() > 0.01
    keys = set(load_file(path))
    endings = (".lora_A.weight", ".lora_B.weight")
    assert all(key.startswith(f"{dit.prefix}.") and key.endswith(endings) for key in keys)
    assert f"{dit.prefix}.{dit.layer[1]}.lora_A.weight" in keys
    torch.testing.assert_close(dit.diffusers_prediction(path, caplog), expected, **FLOAT32_DEEP)
    torch.testing.assert_close(dit.prediction_with(path), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize("name", DITS)
def test_a_saved_file_loads_into_the_same_network_at_the_same_rank(name: str, tmp_path: Path) -> None:
    dit, path, again = DITS[name], tmp_path / "ours.safetensors", tmp_path / "again.safetensors"
    dit.trained_file(dit.module, path, {})
    network = dit.module.create_network(1.0, 4, 2, None, [], dit.model())
    network.load_weights(str(path))
    network.save_weights(str(again), None, {})
    actual, expected = load_file(again), load_file(path)
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", DITS)
def test_the_strength_is_folded_in_before_rounding(name: str, tmp_path: Path) -> None:
    """alpha / rank is 2 / 3, which no format represents exactly."""
    dit = DITS[name]
    network = dit.module.create_network(1.0, 3, 2, None, [], dit.model())
    randomize(network, 3)
    network.save_weights(str(tmp_path / "half.safetensors"), torch.bfloat16, {})
    actual = load_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in actual.values()} == {torch.bfloat16}
    kohya, saved = dit.layer
    up = network.adapters[kohya].change.stored_tensors()["lora_up.weight"]
    assert torch.equal(actual[f"{dit.prefix}.{saved}.lora_B.weight"], (up.double() * (2 / 3)).bfloat16())


@pytest.mark.parametrize(
    ("name", "network_module", "arguments"),
    [
        *((name, lokr, {"factor": "2"}) for name in DITS),
        *((name, dit.module, {"dora_wd": "True"}) for name, dit in DITS.items()),
        ("krea2", lora_krea2, {"dora_wd": "True", "wd_on_output": "True"}),  # includes the projector's single output
    ],
    ids=module_id,
)
def test_other_kinds_are_saved_with_comfyui_names(
    name: str, network_module: Any, arguments: dict[str, str], tmp_path: Path
) -> None:
    dit, path = DITS[name], tmp_path / "ours.safetensors"
    _, expected = dit.trained_file(network_module, path, arguments)
    layer = f"{dit.other_kinds}{dit.layer[1]}" if dit.other_kinds else dit.layer[0]
    assert any(key.startswith(f"{layer}.") for key in load_file(path))
    torch.testing.assert_close(dit.prediction_with(path, network_module), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize(
    ("stem", "endings"),
    [
        ("diffusion_model.transformer_blocks.1.img_mlp.gate_up", ("lora_A.weight", "lora_B.weight")),
        ("lora_unet_transformer_blocks_1_img_mlp_gate_up", ("lora_down.weight", "lora_up.weight")),
        ("transformer_blocks.1.img_mlp.gate_up", ("lora_A.default.weight", "lora_B.default.weight")),
    ],
)
def test_a_layer_that_comfyui_fuses_is_split(stem: str, endings: tuple[str, str], tmp_path: Path) -> None:
    dit, path, generator = DITS["qwen_image_21"], tmp_path / "fused.safetensors", torch.Generator().manual_seed(5)
    changed = dit.model()
    mlp = changed.transformer_blocks[1].img_mlp
    rows, columns = mlp.proj.weight.shape
    down = torch.randn(2, columns, generator=generator) / columns**0.5
    up = torch.randn(2 * rows, 2, generator=generator)
    save_file({f"{stem}.{endings[0]}": down, f"{stem}.{endings[1]}": up}, path)
    with torch.no_grad():
        mlp.gate_layer.weight.add_(up[:rows] @ down)
        mlp.proj.weight.add_(up[rows:] @ down)
    torch.testing.assert_close(dit.prediction_with(path), changed(*dit.values()), **FLOAT32_DEEP)


def test_a_fused_layer_of_another_kind_is_rejected(tmp_path: Path) -> None:
    path, stem = tmp_path / "fused.safetensors", "diffusion_model.transformer_blocks.1.img_mlp.gate_up"
    save_file({f"{stem}.lokr_w1": torch.ones(2, 2), f"{stem}.lokr_w2": torch.ones(96, 24)}, path)
    with pytest.raises(UserError, match=r"gate_up is 2 layers in this base model, and its LoKr cannot be split"):
        DITS["qwen_image_21"].prediction_with(path, lokr)


@pytest.mark.parametrize(
    ("name", "trainer", "is_diffusers"),
    [
        pytest.param(name, trainer, is_diffusers, id=f"{name}, {trainer}{', diffusers paths' * is_diffusers}")
        for name, dit in DITS.items()
        for trainer, is_diffusers in dit.trainers
    ],
)
def test_other_trainers_files_are_merged_trained_and_converted(
    name: str, trainer: str, is_diffusers: bool, tmp_path: Path
) -> None:
    dit, path = DITS[name], tmp_path / "theirs.safetensors"
    expected = dit.foreign_file(path, trainer, is_diffusers)
    assert (expected - dit.model()(*dit.values())).abs().max() > 0.01
    torch.testing.assert_close(dit.prediction_with(path), expected, **FLOAT32_DEEP)
    ours = dit.model()
    network, _ = dit.module.create_network_from_weights(1.0, str(path), None, [], ours)
    network.load_weights(str(path))
    network.apply_to([], ours, False, True)
    network.eval()
    torch.testing.assert_close(ours(*dit.values()), expected, **FLOAT32_DEEP)
    network.save_weights(str(tmp_path / "trained.safetensors"), None, {})
    torch.testing.assert_close(dit.prediction_with(tmp_path / "trained.safetensors"), expected, **FLOAT32_DEEP)
    for naming in ("kohya", "generic", "diffusers"):
        renamed = rename(add_model(read_adapter_file(path), [dit.names]), dit.names, naming).file
        save_file(adapter_tensors(renamed), tmp_path / "converted.safetensors")
        torch.testing.assert_close(dit.prediction_with(tmp_path / "converted.safetensors"), expected, **FLOAT32_DEEP)

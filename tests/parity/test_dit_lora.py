"""Saved adapters in diffusers' loader and transformer, and other trainers' files in ours, with equal weights."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.architectures.sd.layers import view
from library.base.errors import UserError
from library.memory.blocks import recompute
from library.models.unet.unet import run_unet_blocks_with
from networks import dylora, lokr, lora, lora_fa
from networks.core.files.adapter_file import adapter_tensors, read_adapter_file
from networks.core.files.foreign_names import add_model
from networks.core.files.renaming import rename
from networks.lora import create_network
from tests.hiding import lazily
from tests.parity.denoisers import save_trained
from tests.tiny.base import Dit
from tests.tiny.bases import BASES
from tests.tiny.init import fixed_init
from tests.tiny.sd import CLIP, UNET
from tests.tolerances import FLOAT32_DEEP, FLOAT64
from tests.unit.networks.toy import randomize

diffusers = lazily("diffusers")
transformers = lazily("transformers")

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
class Case:
    """A base model with the networks and files to test."""

    dit: Dit
    module: Any  # its network module

    def trained_file(self, network_module: Any, path: Path, arguments: Mapping[str, str]) -> tuple[Tensor, Tensor]:
        """Save an adapter with random weights; return the predictions without and with it."""
        ours = self.dit.model()
        return save_trained(network_module, path, arguments, ours, lambda: ours(*self.dit.values()))

    def prediction_with(self, path: Path, network_module: Any = None) -> Tensor:
        """Return our prediction with an adapter file merged."""
        ours, network_module = self.dit.model(), network_module or self.module
        network, weights = network_module.create_network_from_weights(
            1.0, str(path), None, [], ours, for_inference=True
        )
        network.merge_to([], ours, weights, torch.float32, "cpu")
        return ours(*self.dit.values())  # type: ignore[no-any-return]

    def diffusers_prediction(self, path: Path, caplog: pytest.LogCaptureFixture) -> Tensor:
        """Return diffusers' prediction with the unmodified file; it logs unused keys."""
        theirs, pipeline = self.dit.theirs(self.dit.model()), getattr(diffusers, self.dit.pipeline)
        with caplog.at_level(logging.WARNING, "diffusers"):
            pipeline.load_lora_into_transformer(pipeline.lora_state_dict(str(path)), theirs)
        assert not any(word in caplog.text for word in ("unexpected", "Unsupported", "No LoRA keys"))
        return self.dit.run_theirs(theirs, *self.dit.values())

    def foreign_file(self, path: Path, trainer: str, is_diffusers: bool) -> Tensor:
        """Write a file as another trainer does, with different factors per layer; return its model's prediction."""
        theirs = self.dit.theirs(self.dit.model()) if is_diffusers else self.dit.model()
        generator = torch.Generator().manual_seed(11)
        tensors: dict[str, Tensor] = {}
        for name, layer in theirs.named_modules():
            if isinstance(layer, nn.Linear) and name.startswith(self.dit.blocks):
                down = torch.randn(2, layer.in_features, generator=generator) / layer.in_features**0.5
                up = 0.3 * torch.randn(layer.out_features, 2, generator=generator)
                tensors |= TRAINERS[trainer](name, down, up)
                layer.weight.add_(up @ down)
        save_file(tensors, path)
        values = self.dit.values()
        return self.dit.run_theirs(theirs, *values) if is_diffusers else theirs(*values)  # type: ignore[no-any-return]


SPLIT = {"split_qkv": "True"}
DITS: Mapping[str, Case] = {
    name: Case(base.dit, import_module(base.module)) for name, base in BASES.items() if base.dit is not None
}


def networks_of(case: Case) -> list[tuple[Any, Mapping[str, str]]]:
    """Return the network modules of a base model with their arguments."""
    dit, split = case.dit, SPLIT if case.dit.plain == SPLIT else {}
    return [
        *((case.module, arguments) for arguments in dit.own),
        (lora, dit.plain),
        (lora_fa, {**split, **dit.own[-1]}),
        (dylora, {"unit": "2"}),
    ]


def module_id(value: Any) -> str:
    return value.__name__.removeprefix("networks.") if isinstance(value, ModuleType) else str(value)


@pytest.mark.parametrize(
    ("name", "network_module", "arguments"),
    [(name, *network) for name, case in DITS.items() for network in networks_of(case)],
    ids=module_id,
)
def test_diffusers_loads_our_file_without_conversion(
    name: str, network_module: Any, arguments: Mapping[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case, path = DITS[name], tmp_path / "ours.safetensors"
    base, expected = case.trained_file(network_module, path, arguments)
    assert (expected - base).abs().max() > 0.01
    keys = set(load_file(path))
    endings = (".lora_A.weight", ".lora_B.weight")
    assert all(key.startswith(f"{case.dit.prefix}.") and key.endswith(endings) for key in keys)
    assert f"{case.dit.prefix}.{case.dit.layer[1]}.lora_A.weight" in keys
    torch.testing.assert_close(case.diffusers_prediction(path, caplog), expected, **FLOAT32_DEEP)
    torch.testing.assert_close(case.prediction_with(path), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize("name", DITS)
def test_the_strength_is_folded_in_before_rounding(name: str, tmp_path: Path) -> None:
    """alpha / rank is 2 / 3, which no format represents exactly."""
    case = DITS[name]
    network = case.module.create_network(1.0, 3, 2, None, [], case.dit.model())
    randomize(network, 3)
    network.save_weights(str(tmp_path / "half.safetensors"), torch.bfloat16, {})
    actual = load_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in actual.values()} == {torch.bfloat16}
    kohya, saved = case.dit.layer
    up = network.adapters[kohya].change.stored_tensors()["lora_up.weight"]
    assert torch.equal(actual[f"{case.dit.prefix}.{saved}.lora_B.weight"], (up.double() * (2 / 3)).bfloat16())


@pytest.mark.parametrize(
    ("name", "network_module", "arguments"),
    [
        *((name, lokr, {"factor": "2"}) for name in DITS),
        *((name, case.module, {"dora_wd": "True"}) for name, case in DITS.items()),
        (
            "krea2",
            DITS["krea2"].module,
            {"dora_wd": "True", "wd_on_output": "True"},
        ),  # includes the projector's single output
    ],
    ids=module_id,
)
def test_other_kinds_are_saved_with_comfyui_names(
    name: str, network_module: Any, arguments: dict[str, str], tmp_path: Path
) -> None:
    case, path = DITS[name], tmp_path / "ours.safetensors"
    _, expected = case.trained_file(network_module, path, arguments)
    layer = f"{case.dit.other_kinds}{case.dit.layer[1]}" if case.dit.other_kinds else case.dit.layer[0]
    assert any(key.startswith(f"{layer}.") for key in load_file(path))
    torch.testing.assert_close(case.prediction_with(path, network_module), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize(
    ("stem", "endings"),
    [
        ("diffusion_model.transformer_blocks.1.img_mlp.gate_up", ("lora_A.weight", "lora_B.weight")),
        ("lora_unet_transformer_blocks_1_img_mlp_gate_up", ("lora_down.weight", "lora_up.weight")),
        ("transformer_blocks.1.img_mlp.gate_up", ("lora_A.default.weight", "lora_B.default.weight")),
    ],
)
def test_a_layer_that_comfyui_fuses_is_split(stem: str, endings: tuple[str, str], tmp_path: Path) -> None:
    case, path, generator = DITS["qwen_image_21"], tmp_path / "fused.safetensors", torch.Generator().manual_seed(5)
    changed = case.dit.model()
    mlp = changed.transformer_blocks[1].img_mlp
    rows, columns = mlp.proj.weight.shape
    down = torch.randn(2, columns, generator=generator) / columns**0.5
    up = torch.randn(2 * rows, 2, generator=generator)
    save_file({f"{stem}.{endings[0]}": down, f"{stem}.{endings[1]}": up}, path)
    with torch.no_grad():
        mlp.gate_layer.weight.add_(up[:rows] @ down)
        mlp.proj.weight.add_(up[rows:] @ down)
    torch.testing.assert_close(case.prediction_with(path), changed(*case.dit.values()), **FLOAT32_DEEP)


def test_a_fused_layer_of_another_kind_is_rejected(tmp_path: Path) -> None:
    path, stem = tmp_path / "fused.safetensors", "diffusion_model.transformer_blocks.1.img_mlp.gate_up"
    save_file({f"{stem}.lokr_w1": torch.ones(2, 2), f"{stem}.lokr_w2": torch.ones(96, 24)}, path)
    with pytest.raises(UserError, match=r"gate_up is 2 layers in this base model, and its LoKr cannot be split"):
        DITS["qwen_image_21"].prediction_with(path, lokr)


@pytest.mark.parametrize(
    ("name", "trainer", "is_diffusers"),
    [
        pytest.param(name, trainer, is_diffusers, id=f"{name}, {trainer}{', diffusers paths' * is_diffusers}")
        for name, case in DITS.items()
        for trainer, is_diffusers in case.dit.trainers
    ],
)
def test_other_trainers_files_are_merged_trained_and_converted(
    name: str, trainer: str, is_diffusers: bool, tmp_path: Path
) -> None:
    case, path = DITS[name], tmp_path / "theirs.safetensors"
    expected = case.foreign_file(path, trainer, is_diffusers)
    assert (expected - case.dit.model()(*case.dit.values())).abs().max() > 0.01
    torch.testing.assert_close(case.prediction_with(path), expected, **FLOAT32_DEEP)
    ours = case.dit.model()
    network, _ = case.module.create_network_from_weights(1.0, str(path), None, [], ours)
    network.load_weights(str(path))
    network.apply_to([], ours, False, True)
    network.eval()
    torch.testing.assert_close(ours(*case.dit.values()), expected, **FLOAT32_DEEP)
    network.save_weights(str(tmp_path / "trained.safetensors"), None, {})
    torch.testing.assert_close(case.prediction_with(tmp_path / "trained.safetensors"), expected, **FLOAT32_DEEP)
    for naming in ("kohya", "generic", "diffusers"):
        renamed = rename(add_model(read_adapter_file(path), [case.dit.names]), case.dit.names, naming).file
        save_file(adapter_tensors(renamed), tmp_path / "converted.safetensors")
        torch.testing.assert_close(case.prediction_with(tmp_path / "converted.safetensors"), expected, **FLOAT32_DEEP)


# Gradients of adapters in a U-Net whose blocks are recomputed.


def tiny_unet(seed: int, dtype: torch.dtype) -> Any:
    unet = diffusers.UNet2DConditionModel(**UNET)
    unet.load_state_dict(fixed_init(unet, seed))
    return unet.to(dtype).requires_grad_(False).eval()


def tiny_clip(seed: int, dtype: torch.dtype) -> Any:
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP, vocab_size=99))
    clip.load_state_dict(fixed_init(clip, seed))
    return clip.to(dtype).requires_grad_(False).eval()


EVERY_FORM = {"conv_dim": "3", "use_tucker": "1", "use_scalar": "1", "train_norm": "1", "dora_wd": "1"}


@pytest.mark.parametrize("form", [{}, EVERY_FORM], ids=["plain", "every form"])
def test_gradient_checkpointing_with_dropout_keeps_the_gradients(form: dict[str, str]) -> None:
    unet, clip = tiny_unet(421, torch.float64), tiny_clip(422, torch.float64)
    network = create_network(
        1.0, 4, 2.0, None, *view([clip], unet), neuron_dropout=0.2, rank_dropout="0.2", module_dropout="0.2",
        **form,
    ).double()  # fmt: skip
    generator = torch.Generator().manual_seed(423)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    network.apply_to(*view([clip], unet), train_text_encoder=False)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    text = torch.randn(2, 7, 32, dtype=torch.float64)

    def gradients() -> list[torch.Tensor | None]:
        network.zero_grad()
        torch.manual_seed(424)
        unet(x, torch.tensor([17, 801]), text).sample.square().mean().backward()
        return [parameter.grad for parameter in network.parameters()]

    plain = gradients()
    run_unet_blocks_with(unet, recompute)
    again = gradients()
    assert sum(g is None for g in plain) == sum(g is None for g in again) > 0  # modules skipped by module dropout
    for one, other in zip(plain, again, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, **FLOAT64)

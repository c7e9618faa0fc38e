"""FLUX.3 Image Klein loads alike in every layout; other files are refused with what they are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_3_train_network import setup_parser
from library.architectures.flux_3.assembly import build
from library.architectures.flux_3.load import open_loader
from library.architectures.flux_3.options import Flux3Options
from library.architectures.specs import list_specs
from library.base.errors import UserError
from library.checkpoints.quantised import rotate_groups
from library.checkpoints.recognition import recognise_adapter
from library.models.dit_loader import DitLoader
from library.models.identify import base_of_file
from tests.running import tiny_model
from tests.tiers import first_is_fast
from tests.tiny.changes import assert_same_models, with_changes
from tests.tiny.flux_3 import build_tiny_flux_3
from tests.tiny.keys import peft
from tests.tiny.parts import BASE

tiny = tiny_model("flux_3", 3)


def options_of(arguments: list[str]) -> Flux3Options:
    return Flux3Options.from_args(setup_parser().parse_args(arguments))


def open_tiny(arguments: list[str]) -> DitLoader:
    return open_loader(options_of(arguments))


@pytest.mark.parametrize("layout", first_is_fast(["diffusers", "whole"]))
@pytest.mark.parametrize("edit", [[], ["--edit"]], ids=["text to image", "edit"])
def test_every_layout_gives_the_same_models(
    tiny: list[str], tmp_path: Path, layout: Any, edit: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The files contain `repa_projectors`, which are of no use."""
    assert_same_models(open_tiny([*build_tiny_flux_3(tmp_path, 3, layout), *edit]), open_tiny([*tiny, *edit]))
    assert "ignoring weights" not in caplog.text


def test_layers_for_references_are_loaded_with_edit_alone(tiny: list[str]) -> None:
    names, with_references = (set(open_tiny(words).denoiser().state_dict()) for words in (tiny, [*tiny, "--edit"]))
    assert names < with_references
    assert all(".image_cond." in name for name in with_references - names)
    assert not any("image_cond" in name for name in names)
    specs = [build(options_of(words)).codec.spec for words in (tiny, [*tiny, "--edit"])]
    assert [(spec.max_references, spec.needs_references) for spec in specs] == [(0, False), (10, True)]


def test_int8_weights_with_rotated_inputs_are_read_as_stored(tiny: list[str], tmp_path: Path) -> None:
    state, layer = load_file(tiny[1]), "single_blocks.0.q_proj"
    weight = state[f"{layer}.weight"]
    turned = rotate_groups(weight, 16)
    scales = turned.abs().amax(1, keepdim=True) / 127
    described = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    more = {
        f"{layer}.weight": (turned / scales).round().to(torch.int8),
        f"{layer}.weight_scale": scales,
        f"{layer}.comfy_quant": torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8),
    }
    save_file({**state, **more}, tmp_path / "int8.safetensors")
    value = open_tiny([BASE, str(tmp_path / "int8.safetensors"), *tiny[2:]]).denoiser().get_parameter(f"{layer}.weight")
    torch.testing.assert_close(value, weight, rtol=0, atol=0.02)
    assert not torch.equal(value, weight)


def test_only_the_distilled_model_without_a_training_adapter_is_warned_about(
    tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(options_of(tiny))
    distilled = build_tiny_flux_3(tmp_path, 3, is_distilled=True)
    build(options_of([*distilled, "--training_adapter", "adapter.safetensors"]))
    assert "training undoes the distillation" not in caplog.text
    build(options_of(distilled))
    assert "training undoes the distillation" in caplog.text


@pytest.mark.parametrize(
    ("flag", "changes", "message"),
    [
        (BASE, {"txt_in.weight": torch.ones(48, 256)}, "features of width 32; use Qwen/Qwen3-VL-4B-Instruct"),
        (BASE, {"txt_in.weight": torch.ones(48, 60)}, "text features of width 60; the last two must be multiples of 8"),
        (BASE, {"txt_in.weight": None}, "txt_in.weight is missing; use a complete FLUX.3 Image Klein checkpoint"),
        (BASE, {"early_stream_modulations.image.lin.weight": None}, "so it is not a FLUX.3 Image Klein transformer"),
        (BASE, {"emb_in.image.weight": torch.ones(48, 64)}, "takes 64 values per token, but only 128 are supported"),
        ("--vae", {"bn.running_mean": None}, "use the VAE of FLUX.3 Image Klein"),
        ("--text_encoder", {"model.language_model.layers.0.self_attn.q_norm.weight": None}, "is not a Qwen3-VL"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_incompatible_file_is_refused_with_the_reason(
    tiny: list[str], tmp_path: Path, flag: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        open_tiny(with_changes(tiny, flag, tmp_path, changes))


def test_a_checkpoint_without_layers_for_references_is_refused_with_edit_alone(tiny: list[str], tmp_path: Path) -> None:
    changes = {name: None for name in load_file(tiny[1]) if ".image_cond." in name}
    words = with_changes(tiny, BASE, tmp_path, changes)
    open_tiny(words)
    with pytest.raises(UserError, match=r"--edit needs layers for reference images, which .* lacks; use a"):
        open_tiny([*words, "--edit"])


@pytest.mark.parametrize(
    "stem",
    [
        "diffusion_model.single_blocks.0.q_proj",
        "diffusion_model.txt_mode_blocks.0.mlp_in",
        "transformer.mode_blocks.image.0.attn.to_q",
        "transformer.single_transformer_blocks.0.attn.to_out.0",
        "transformer.single_transformer_blocks.0.ff.linear_in",
        "diffusion_model.early_stream_modulations.txt.lin",
    ],
)
def test_adapters_of_other_trainers_are_recognised(stem: str) -> None:
    spec = recognise_adapter(list_specs(), peft(stem, 3072), {})
    assert spec is not None and spec.name == "flux_3"
    assert spec.names.find(stem.replace(".", "_")) is not None


def test_single_files_of_flux_2_and_flux_3_are_told_apart(tiny: list[str]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tiny[1]).items()}
    assert base_of_file(list_specs(), shapes) is next(spec for spec in list_specs() if spec.name == "flux_3")
    other = base_of_file(list_specs(), {"single_stream_modulation.lin.weight": (9216, 3072)})
    assert other is not None and other.name == "flux_2"

"""Krea 2 models load alike in every layout; other files are refused with what they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from krea2_train_network import setup_parser
from library.architectures.krea2.assembly import build
from library.architectures.krea2.load import open_loader
from library.architectures.krea2.options import Krea2Options
from library.base.errors import UserError
from library.models.dit_loader import DitLoader
from tests.running import tiny_model
from tests.tiny.krea2 import build_tiny_krea2

tiny = tiny_model("krea2", 3)


def options_of(arguments: list[str]) -> Krea2Options:
    return Krea2Options.from_args(setup_parser().parse_args(arguments))


def open_tiny(arguments: list[str]) -> DitLoader:
    return open_loader(options_of(arguments))


# Recognising Turbo


def test_turbo_without_a_training_adapter_is_warned_about_once(
    tiny: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for variant in ("turbo", "raw"):
        build(options_of([*tiny, "--dit_variant", variant]))
    assert caplog.text.count("is Krea 2 Turbo, which is distilled") == 1
    caplog.clear()
    build(options_of([*tiny, "--dit_variant", "turbo", "--base_weights", "adapter.safetensors"]))
    assert "distilled" not in caplog.text


# Turbo for previews


def test_turbo_dit_is_loaded_for_previews(tiny: list[str], tmp_path: Path) -> None:
    turbo = build_tiny_krea2(tmp_path, 8, name="turbo")
    preview = build(options_of([*tiny, "--turbo_dit", turbo[1]])).preview
    assert preview.load_denoiser is not None and (preview.defaults.num_steps, preview.defaults.scale) == (8, 1.0)
    actual, expected = preview.load_denoiser(None).state_dict(), open_tiny(turbo).denoiser().state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert build(options_of(tiny)).preview.load_denoiser is None


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"first.weight": None}, [], "first.weight is missing; use a complete Krea 2"),
        ({"txtfusion.projector.weight": None}, [], "--turbo_dit .*turbo.safetensors: it has no txtfusion.projector"),
        ({"blocks.0.mlp.gate.weight": torch.ones(80, 64)}, [], "and the base .* have different sizes"),
        ({"blocks.0.mlp.up.scale_weight": torch.ones(())}, [], "is stored differently from the base"),
        ({}, ["--network_args", "dora_wd=True"], "--turbo_dit does not work with dora_wd"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_turbo_dit_that_cannot_replace_the_base_is_refused(
    tiny: list[str], tmp_path: Path, changes: dict[str, Any], more: list[str], message: str
) -> None:
    turbo = build_tiny_krea2(tmp_path, 8, name="turbo")
    state: dict[str, Any] = {**load_file(turbo[1]), **changes}
    if "blocks.0.mlp.up.scale_weight" in changes:
        state["blocks.0.mlp.up.weight"] = state["blocks.0.mlp.up.weight"].to(torch.float8_e4m3fn)
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, turbo[1])
    with pytest.raises(UserError, match=message):
        build(options_of([*tiny, "--turbo_dit", turbo[1], *more]))


def test_a_turbo_dit_is_refused_for_a_dora_trained_further(tiny: list[str], tmp_path: Path) -> None:
    """Its settings are in its file, not in --network_args."""
    turbo, name = build_tiny_krea2(tmp_path, 8, name="turbo"), "diffusion_model.blocks.0.attn.wq"
    lora = {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(64, 4)}
    for file, more in (("lora", {}), ("dora", {f"{name}.lora_magnitude_vector": torch.ones(64)})):
        save_file({**lora, **more}, tmp_path / file)
    words = [*tiny, "--turbo_dit", turbo[1], "--dim_from_weights", "--network_weights"]
    build(options_of([*words, str(tmp_path / "lora")]))
    with pytest.raises(UserError, match=r"--turbo_dit does not work with a DoRA.*dora is one"):
        build(options_of([*words, str(tmp_path / "dora")]))

"""FLUX.1 models load alike in every layout; other files are refused with what they are and what to do."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_train_network import setup_parser
from library.architectures.flux.load import open_loader
from library.architectures.flux.options import FluxOptions
from library.models.dit_loader import DitLoader
from tests.tiny.changes import assert_same_models, with_changes, without
from tests.tiny.flux import build_tiny_flux


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_flux(tmp_path_factory.mktemp("flux"), 3)


def open_tiny(arguments: list[str]) -> DitLoader:
    return open_loader(FluxOptions.from_args(setup_parser().parse_args(arguments)))


BASE = "--pretrained_model_name_or_path"


@pytest.mark.parametrize(
    ("flag", "changes", "message"),
    [
        (BASE, {"distilled_guidance_layer.in_proj.weight": torch.ones(2, 2)}, "this is a Chroma model; add --model_ty"),
        (
            BASE,
            {"img_in.weight": torch.ones(64, 384)},
            "384 values per patch, but only 64 are supported; FLUX.1 Fill",
        ),
        (
            BASE,
            {"txt_in.weight": torch.ones(64, 48)},
            "has width 32, but the transformer expects text fe",
        ),
        (BASE, {"txt_in.weight": None}, "flux1.safetensors: txt_in.weight is missing; use a complete FLUX.1"),
        ("--ae", {"decoder.conv_in.weight": torch.ones(16, 4, 3, 3)}, "has 4 latent channels, but FLUX.1 needs 16"),
        ("--ae", {"decoder.conv_in.weight": None}, "is not a VAE: it has no decoder.conv_in.weight"),
        ("--t5xxl", {"shared.weight": None}, "t5xxl.safetensors is not a T5 encoder"),
        (
            "--clip_l",
            {"text_model.embeddings.token_embedding.weight": None},
            "clip_l.safetensors: embeddings.token_embedding.weight is missing",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_incompatible_file_is_refused_with_the_reason(
    tiny: list[str], tmp_path: Path, flag: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        open_tiny(with_changes(tiny, flag, tmp_path, changes))


@pytest.mark.parametrize("flag", ["--ae", "--clip_l", "--t5xxl"])
def test_the_error_for_a_missing_part_names_its_flag(tiny: list[str], flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag} is missing"):
        open_tiny(without(tiny, flag))


def test_a_missing_weight_is_reported_when_the_model_is_loaded(tiny: list[str], tmp_path: Path) -> None:
    loader = open_tiny(with_changes(tiny, BASE, tmp_path, {"double_blocks.1.img_mlp.2.bias": None}))
    with pytest.raises(
        ValueError, match=r"flux1.safetensors is incomplete: 1 of the .* double_blocks.1.img_mlp.2.bias"
    ):
        loader.denoiser()


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model."])
def test_a_vae_with_a_prefix_loads_the_same(tiny: list[str], tmp_path: Path, prefix: str) -> None:
    index = tiny.index("--ae") + 1
    path = tmp_path / "ae.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(tiny[index]).items()}, path)
    actual = open_tiny([*tiny[:index], str(path), *tiny[index + 1 :]]).vae().state_dict()
    expected = open_tiny(tiny).vae().state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_every_layout_gives_the_same_models(tiny: list[str], tmp_path: Path) -> None:
    expected = open_tiny(tiny)
    for layout in ("whole", "diffusers"):
        actual = open_tiny(build_tiny_flux(tmp_path / layout, 3, layout))  # type: ignore[arg-type]
        assert_same_models(actual, expected)


def test_parts_of_a_folder_can_be_replaced_by_files(tiny: list[str], tmp_path: Path) -> None:
    folder = build_tiny_flux(tmp_path / "folder", 4, "diffusers")
    shutil.rmtree(tmp_path / "folder" / "vae")
    index = tiny.index("--ae")
    loader = open_tiny([*folder, *tiny[index : index + 2]])
    expected = open_tiny(tiny).vae().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loader.vae().state_dict().items())


def test_models_are_loaded_frozen_and_in_the_precision_of_the_run(tiny: list[str]) -> None:
    loader = open_tiny([*tiny, "--mixed_precision", "bf16", "--no_half_vae"])
    assert {p.dtype for p in loader.denoiser().parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loader.vae().parameters()} == {torch.float32}
    assert not any(p.requires_grad for model in loader.text_encoders() for p in model.parameters())

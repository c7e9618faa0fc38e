"""Every form of a Z-Image model loads alike, and files that make none are refused with what they are."""

import importlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.specs import list_specs
from library.architectures.zimage.assembly import build
from library.architectures.zimage.load import is_turbo, open_loader
from library.architectures.zimage.options import ZImageOptions
from library.checkpoints.base_model_spec import BaseModelSpec
from library.errors import UserError
from library.models.dit_loader import DitLoader
from tests.runs.bases import BASES
from tests.tiny.changes import assert_same_models, in_two_files, with_changes, without
from tests.tiny.zimage import build_tiny_zimage, diffusers_state
from zimage_train_network import setup_parser

BASE = "--pretrained_model_name_or_path"
SCRIPT_OF_OTHERS = {name: base.script for name, base in BASES.items() if name != "zimage"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_zimage(tmp_path_factory.mktemp("zimage"), 3)


def options_of(arguments: list[str]) -> ZImageOptions:
    return ZImageOptions.from_args(setup_parser().parse_args(arguments))


def opened(arguments: list[str]) -> DitLoader:
    return open_loader(options_of(arguments))


@pytest.mark.parametrize("layout", ["whole", "diffusers"])
def test_every_layout_gives_the_same_models(tiny: list[str], tmp_path: Path, layout: Any) -> None:
    assert_same_models(opened(build_tiny_zimage(tmp_path, 3, layout)), opened(tiny))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("is_diffusers", [False, True], ids=["original", "diffusers"])
def test_a_single_file_has_either_layout_and_either_prefix(
    tiny: list[str], tmp_path: Path, prefix: str, is_diffusers: bool
) -> None:
    state = load_file(tiny[1])
    if is_diffusers:
        del state["norm_final.weight"]
        state = diffusers_state(state)
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "other.safetensors")
    assert_same_models(opened([BASE, str(tmp_path / "other.safetensors"), *tiny[2:]]), opened(tiny))


def test_numbered_files_are_named_by_their_first(tiny: list[str], tmp_path: Path) -> None:
    arguments = in_two_files(tiny, (BASE, "--text_encoder"), tmp_path)
    assert_same_models(opened(arguments), opened(tiny))
    Path(arguments[1].replace("00001", "00002", 1)).unlink()
    with pytest.raises(UserError, match=r"is the first of 2 files, but these are not beside it: .*00002-of-00002"):
        opened(arguments)


def test_8_bit_files_load_with_their_scales(tiny: list[str], tmp_path: Path) -> None:
    state = load_file(tiny[1])
    name = "layers.0.attention.qkv"
    scale = state[f"{name}.weight"].abs().max() / 448
    codes = (state[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    other = {**state, f"{name}.weight": codes, f"{name}.scale_weight": scale, "scaled_fp8": torch.zeros(2)}
    save_file(other, tmp_path / "fp8.safetensors")
    denoiser: Any = opened([BASE, str(tmp_path / "fp8.safetensors"), *tiny[2:]]).denoiser()
    torch.testing.assert_close(denoiser.layers[0].attention.qkv.weight, codes.float() * scale, rtol=1e-6, atol=0)


def test_parts_of_a_folder_can_be_replaced_by_files(tiny: list[str], tmp_path: Path) -> None:
    folder = build_tiny_zimage(tmp_path / "folder", 4, "diffusers")
    for name in ("vae", "text_encoder"):
        shutil.rmtree(tmp_path / "folder" / name)
    found = opened([*folder, *tiny[tiny.index("--vae") :]]).text_encoders()[0].state_dict()
    expected = opened(tiny).text_encoders()[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("flag", "changes", "message"),
    [
        (BASE, {"x_embedder.weight": torch.ones(48, 16)}, "takes 16 values per patch, but only 64"),
        (
            BASE,
            {"cap_embedder.1.weight": torch.ones(48, 64)},
            "has width 40, but the transformer expects text features of width 64; use Qwen/Qwen3-4B",
        ),
        (BASE, {"t_embedder.mlp.2.weight": None}, "not a Z-Image model: t_embedder.mlp.2.weight is missing"),
        (BASE, {"layers.0.attention.qkv.weight": torch.ones(80, 48)}, "heads of 16, 80 outputs of q, k and v"),
        (BASE, {"siglip_embedder.1.weight": torch.ones(4, 4)}, "this is Z-Image Omni, which cannot be trained"),
        ("--vae", {"decoder.conv_in.weight": torch.ones(16, 4, 3, 3)}, "has 4 latent channels, but Z-Image needs 16"),
        ("--vae", {"decoder.conv_in.weight": None}, "is not a VAE: it has no decoder.conv_in.weight"),
        ("--text_encoder", {"model.embed_tokens.weight": None}, "qwen_3_4b.safetensors is not a Qwen3 text encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_does_not_fit_is_named(
    tiny: list[str], tmp_path: Path, flag: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        opened(with_changes(tiny, flag, tmp_path, changes))


@pytest.mark.parametrize("flag", ["--vae", "--text_encoder"])
def test_a_missing_part_is_asked_for_by_its_flag(tiny: list[str], flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag} is missing"):
        opened(without(tiny, flag))


def test_a_tokenizer_without_the_marks_of_a_chat_is_refused(tiny: list[str], tmp_path: Path) -> None:
    arguments = build_tiny_zimage(tmp_path, 3)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|other|>"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"has no <\|im_end\|>: it belongs to another model; use that of Qwen/Qwen3-4B"):
        build(options_of(arguments))


def test_the_text_encoder_may_be_kept_in_8_bits(tiny: list[str]) -> None:
    (whole,), (small,) = opened(tiny).text_encoders(), opened([*tiny, "--fp8_llm"]).text_encoders()
    ids = torch.arange(8)[None]
    expected, found = whole(ids).last_hidden_state, small(ids).last_hidden_state
    assert not torch.equal(found, expected)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.98


# Other models' files


@pytest.fixture(scope="module")
def zimage_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_zimage(tmp_path_factory.mktemp("whole"), 5, "whole")[1]


@pytest.mark.parametrize("name", SCRIPT_OF_OTHERS)
def test_every_other_script_names_this_one(name: str, tmp_path: Path, zimage_file: str) -> None:
    spec = next(s for s in list_specs() if s.script == f"{BASES[name].script}.py")
    arguments = BASES[name].build(tmp_path)
    arguments[arguments.index(BASE) + 1] = zimage_file
    with pytest.raises(UserError, match=r"this is a Z-Image (model|checkpoint); use zimage_train_network\.py"):
        spec.build(parsed(spec, arguments))


@pytest.mark.parametrize("name", SCRIPT_OF_OTHERS)
def test_this_script_names_every_other(name: str, tmp_path: Path, tiny: list[str]) -> None:
    arguments = BASES[name].build(tmp_path)
    path = arguments[arguments.index(BASE) + 1]
    with pytest.raises(UserError, match=rf"use {SCRIPT_OF_OTHERS[name]}\.py"):
        opened([BASE, path, *tiny[2:]])


def parsed(spec: BaseModelSpec, arguments: list[str]) -> Any:
    parser = importlib.import_module(spec.script.removesuffix(".py")).setup_parser()
    return spec.options.from_args(parser.parse_args(arguments))


# Which Z-Image it is


@pytest.mark.parametrize(
    ("version", "path", "expected"),
    [
        (None, "z_image_turbo_bf16.safetensors", True),
        (None, "Tongyi-MAI/Z-Image-Turbo", True),
        (None, "Z-Image-Turbo/transformer.safetensors", True),
        (None, "z_image_de_turbo_v1_bf16.safetensors", False),
        (None, "Z-Image-De-Turbo", False),
        (None, "z_image_bf16.safetensors", False),
        ("turbo", "mine.safetensors", True),
        ("base", "z_image_turbo.safetensors", False),
        ("de-turbo", "z_image_turbo.safetensors", False),
    ],
)
def test_turbo_is_recognised_by_option_or_name(version: str | None, path: str, expected: bool) -> None:
    assert is_turbo(version, path) is expected


def test_turbo_without_a_training_adapter_is_warned_of_once(tiny: list[str], caplog: pytest.LogCaptureFixture) -> None:
    turbo, base = (build(options_of([*tiny, "--model_version", version])) for version in ("turbo", "base"))
    assert caplog.text.count("is Z-Image Turbo, which is distilled") == 1
    assert (turbo.preview.defaults.num_steps, turbo.preview.defaults.scale) == (8, 1.0)
    assert (base.preview.defaults.num_steps, base.preview.defaults.scale) == (50, 5.0)
    caplog.clear()
    build(options_of([*tiny, "--model_version", "turbo", "--base_weights", "adapter.safetensors"]))
    assert "distilled" not in caplog.text

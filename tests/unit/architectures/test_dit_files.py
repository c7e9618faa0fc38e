"""Files of the base models that use musubi-tuner's options: layouts that load alike, and files of other models."""

import importlib
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.base_model_spec import BaseModelSpec
from library.errors import UserError
from library.protocols import Loader
from tests.tiny.base import Dit
from tests.tiny.bases import BASES
from tests.tiny.changes import assert_same_models, in_two_files, rename_token, without
from tests.tiny.flux_2 import build_tiny_flux_2

BASE = "--pretrained_model_name_or_path"


DITS: Mapping[str, Dit] = {name: base.dit for name, base in BASES.items() if base.dit is not None}


def parse_options(spec: BaseModelSpec, arguments: list[str]) -> Any:
    parser = importlib.import_module(spec.script.removesuffix(".py")).setup_parser()
    return spec.options.from_args(parser.parse_args(arguments))


def open_tiny(name: str, arguments: list[str]) -> Loader:
    loaded = importlib.import_module(f"library.architectures.{name}.load").open_loader(
        parse_options(BASES[name].spec, arguments)
    )
    return loaded[0] if isinstance(loaded, tuple) else loaded  # type: ignore[no-any-return]  # FLUX.2 adds its release


@pytest.fixture(scope="module", params=DITS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tiny(name: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return DITS[name].build(tmp_path_factory.mktemp(name), 3)


@pytest.mark.slow
def test_a_sharded_model_is_given_by_its_first_file(name: str, tiny: list[str], tmp_path: Path) -> None:
    arguments = in_two_files(tiny, (BASE, "--text_encoder"), tmp_path)
    assert_same_models(open_tiny(name, arguments), open_tiny(name, tiny))
    Path(arguments[1].replace("00001", "00002", 1)).unlink()
    with pytest.raises(UserError, match=r"is the first of 2 files, but these are not next to it: .*00002-of-00002"):
        open_tiny(name, arguments)


def test_fp8_files_load_with_their_scales(name: str, tiny: list[str], tmp_path: Path) -> None:
    state, layer = load_file(tiny[1]), DITS[name].stored_layer
    scale = state[f"{layer}.weight"].abs().max() / 448
    codes = (state[f"{layer}.weight"] / scale).to(torch.float8_e4m3fn)
    other = {**state, f"{layer}.weight": codes, f"{layer}.scale_weight": scale, "scaled_fp8": torch.zeros(2)}
    save_file(other, tmp_path / "fp8.safetensors")
    denoiser = open_tiny(name, [BASE, str(tmp_path / "fp8.safetensors"), *tiny[2:]]).denoiser()
    torch.testing.assert_close(denoiser.get_parameter(f"{layer}.weight"), codes.float() * scale, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_parts_of_a_folder_can_be_replaced_by_files(name: str, tiny: list[str], tmp_path: Path) -> None:
    folder = DITS[name].build(tmp_path / "folder", 4, "diffusers")
    for part in ("vae", "text_encoder"):
        shutil.rmtree(tmp_path / "folder" / part)
    actual = open_tiny(name, [*folder, *tiny[tiny.index("--vae") :]]).text_encoders()[0].state_dict()
    expected = open_tiny(name, tiny).text_encoders()[0].state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in actual.items())


@pytest.mark.parametrize("flag", ["--vae", "--text_encoder"])
def test_the_error_for_a_missing_part_names_its_flag(name: str, tiny: list[str], flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag} is missing"):
        open_tiny(name, without(tiny, flag))


def test_a_tokenizer_without_the_special_tokens_of_the_template_is_refused(name: str, tmp_path: Path) -> None:
    dit = DITS[name]
    arguments = dit.build(tmp_path, 3)
    rename_token(tmp_path / "tokenizer", dit.mark)
    message = f"has no {dit.mark}: it belongs to another model; use that of {dit.encoder}"
    with pytest.raises(UserError, match=re.escape(message)):
        BASES[name].spec.build(parse_options(BASES[name].spec, arguments))


# Other models' files


@pytest.fixture(scope="module")
def arguments_by_model(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[str]]:
    """Return the arguments for a tiny model of each base model; those with musubi-tuner's options are single files."""
    folders = {name: tmp_path_factory.mktemp(name) for name in BASES}
    return {
        name: DITS[name].build(folder, 5, "whole") if name in DITS else BASES[name].build(folder)
        for name, folder in folders.items()
    }


@pytest.mark.parametrize(
    ("script_of", "file_of"),
    [
        pytest.param(one, other, id=f"script of {one}, file of {other}")
        for one in BASES
        for other in BASES
        if (one in DITS or other in DITS) and BASES[one].script != BASES[other].script
    ],
)
def test_the_error_for_a_file_of_another_model_names_its_script(
    script_of: str, file_of: str, arguments_by_model: Mapping[str, list[str]]
) -> None:
    arguments, other = list(arguments_by_model[script_of]), arguments_by_model[file_of]
    arguments[arguments.index(BASE) + 1] = other[other.index(BASE) + 1]
    is_called = rf"this is {re.escape(BASES[file_of].spec.called)} (model|checkpoint); " if file_of in DITS else ""
    with pytest.raises(UserError, match=rf"{is_called}use {BASES[file_of].script}\.py"):
        BASES[script_of].spec.build(parse_options(BASES[script_of].spec, arguments))


@pytest.mark.parametrize(
    ("name", "build"),
    [*((name, dit.build) for name, dit in DITS.items()), ("flux_2", partial(build_tiny_flux_2, is_dev=True))],
    ids=[*DITS, "flux_2 dev"],
)
def test_a_folder_is_recognised_by_its_pipeline(name: str, build: Callable[..., list[str]], tmp_path: Path) -> None:
    flux = BASES["flux"].spec
    with pytest.raises(
        UserError, match=rf"this is {re.escape(BASES[name].spec.called)} model; use {name}_train_network"
    ):
        flux.build(parse_options(flux, build(tmp_path, 3, "diffusers")[:2]))

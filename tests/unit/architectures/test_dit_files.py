"""Layouts and precisions in which every base model loads alike, and files of other models."""

import importlib
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.base.errors import UserError
from library.checkpoints.base_model_spec import BaseModelSpec
from library.models.loading import text_encoder_dtype
from library.protocols import Loader
from tests.tiers import first_is_fast
from tests.tiny.base import Dit
from tests.tiny.bases import BASES
from tests.tiny.changes import assert_same_models, in_two_files, rename_token, without
from tests.tiny.flux_2 import build_tiny_flux_2

BASE = "--pretrained_model_name_or_path"
DITS: Mapping[str, Dit] = {name: base.dit for name, base in BASES.items() if base.dit is not None}
LAYOUTS: Mapping[str, Callable[..., list[str]]] = {
    **{name: base.layouts for name, base in BASES.items() if base.layouts is not None},
    "flux_2 dev": partial(build_tiny_flux_2, is_dev=True),
}


def parse_options(spec: BaseModelSpec, arguments: list[str]) -> Any:
    parser = importlib.import_module(spec.script.removesuffix(".py")).setup_parser()
    return spec.options.from_args(parser.parse_args(arguments))


def open_tiny(name: str, arguments: list[str]) -> Loader:
    base = BASES[name.removesuffix(" dev")]
    loader = importlib.import_module(f"library.architectures.{base.package}.load").open_loader
    loaded = loader(parse_options(base.spec, arguments))
    return loaded[0] if isinstance(loaded, tuple) else loaded  # type: ignore[no-any-return]  # some add a size or release


@pytest.fixture(scope="module", params=DITS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tiny(name: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return DITS[name].build(tmp_path_factory.mktemp(name), 7)


@pytest.mark.parametrize(
    ("model", "layout"), first_is_fast((name, layout) for name in LAYOUTS for layout in ("whole", "diffusers"))
)
def test_every_layout_gives_the_same_models(model: str, layout: str, tmp_path: Path) -> None:
    actual, expected = (open_tiny(model, LAYOUTS[model](tmp_path / kind, 3, kind)) for kind in (layout, "files"))
    assert_same_models(actual, expected)
    assert len(actual.text_encoders()) == len(expected.text_encoders())


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("is_diffusers", [False, True], ids=["original", "diffusers"])
def test_a_single_file_may_have_either_layout_and_either_prefix(
    name: str, tmp_path: Path, prefix: str, is_diffusers: bool
) -> None:
    model = DITS[name].model()
    arguments = LAYOUTS[name if name != "flux_2" else "flux_2 dev"](tmp_path, 7)  # as `Dit.model`
    expected = open_tiny(name, arguments)
    state = (DITS[name].theirs(model) if is_diffusers else model).state_dict()
    save_file({prefix + key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "other.safetensors")
    assert_same_models(open_tiny(name, [BASE, str(tmp_path / "other.safetensors"), *arguments[2:]]), expected)


@pytest.mark.slow
def test_the_text_encoder_may_be_kept_in_8_bits(name: str, tiny: list[str]) -> None:
    ids, states = torch.arange(8)[None], []
    for more in ([], [DITS[name].encoder_in_8_bits]):
        encoder = open_tiny(name, [*tiny, *more]).text_encoders()[0]
        states.append(encoder(ids, output_hidden_states=True).hidden_states[3])  # later layers amplify the rounding
    assert not torch.equal(*states)
    assert torch.nn.functional.cosine_similarity(*states, dim=-1).min() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dtype", "more"),
    [("no", torch.float32, []), ("bf16", torch.bfloat16, ["--no_half_vae"]), ("fp16", torch.float16, [])],
)
@pytest.mark.parametrize("base", BASES)
def test_models_are_loaded_frozen_and_in_the_precision_of_the_run(
    base: str, precision: str, dtype: torch.dtype, more: list[str], tmp_path: Path
) -> None:
    words = [*BASES[base].build(tmp_path), "--mixed_precision", precision, *more]
    spec = BASES[base].spec
    load = spec.build(parse_options(spec, words)).load
    # Language models overflow in float16.
    texts = [(model, {dtype, text_encoder_dtype(dtype)}) for model in load.text_encoders()]
    for model, expected in ((load.denoiser(), {dtype}), *texts, (load.vae(), {torch.float32 if more else dtype})):
        assert len(dtypes := {weight.dtype for weight in model.parameters()}) == 1 and dtypes <= expected
        assert not any(weight.requires_grad for weight in model.parameters())
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert not model.training and not any(m.training for m in model.modules() if isinstance(m, nn.Dropout))


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
@pytest.mark.parametrize("model", LAYOUTS)
def test_parts_of_a_folder_can_be_replaced_by_files(model: str, tmp_path: Path) -> None:
    folder, files = (LAYOUTS[model](tmp_path / layout, 4, layout) for layout in ("diffusers", "files"))
    shutil.rmtree(tmp_path / "diffusers" / "vae")
    for flag, value in zip(files[2::2], files[3::2], strict=True):
        folder += [flag, value]
    assert_same_models(open_tiny(model, folder), open_tiny(model, files))


@pytest.mark.parametrize(
    "base", first_is_fast(name for name, base in BASES.items() if base.spec.script not in ("train_network.py",))
)
def test_the_error_for_a_missing_part_names_its_flag(base: str, tmp_path: Path) -> None:
    arguments = BASES[base].build(tmp_path)
    for flag in (flag for flag, value in pairwise(arguments) if value.startswith(str(tmp_path))):
        with pytest.raises(UserError, match=f"{flag} is missing"):
            BASES[base].spec.build(parse_options(BASES[base].spec, without(arguments, flag)))


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
        if BASES[one].script != BASES[other].script
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

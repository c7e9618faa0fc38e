"""Tools that merge and convert checkpoints: every weight is what the arithmetic says, in every layout."""

import importlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.architectures.flux.reference import diffusers_state
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.commands.base_models import has_pipeline
from library.protocols import Architecture
from networks.core.files.adapter_file import read_adapter_file, save_adapter_file
from networks.core.files.renaming import rename
from networks.core.protocol import open_network_module
from tests.parity.test_dit_lora import DITS
from tests.tiers import first_is_fast
from tests.tiny.anima import build_tiny_anima
from tests.tiny.base import path_argument
from tests.tiny.bases import BASES
from tests.tiny.flux import CONFIG, build_tiny_flux, tiny_flux
from tests.tiny.flux_2 import build_tiny_flux_2
from tests.tiny.sd import build_tiny_sd
from tests.tiny.sd3 import build_tiny_sd3
from tests.tiny.sdxl import build_tiny_sdxl
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAME_MATH
from tests.unit.networks.toy import randomize
from tools import convert_diffusers_to_flux, convert_lora, merge_lora, merge_models, merge_sd3_safetensors

UNET, TEXT = "model.diffusion_model.out.weight", "cond_stage_model.transformer.weight"


def write(folder: Path, seed: int, **more: torch.Tensor) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(3, 5, generator=generator) for name in (UNET, TEXT)}
    save_file({**tensors, "position_ids": torch.arange(4), **more}, folder / f"{seed}.safetensors")
    return folder / f"{seed}.safetensors"


def merge(folder: Path, *words: str) -> dict[str, torch.Tensor]:
    assert merge_models.main([*words, "--output", str(folder / "merged.safetensors")]) == 0
    return load_file(folder / "merged.safetensors")


def test_weights_are_summed_by_their_ratios(tmp_path: Path) -> None:
    paths = [write(tmp_path, seed) for seed in (3, 4, 5)]
    merged = merge(tmp_path, "--models", *map(str, paths), "--ratios", "0.5", "0.75", "-0.25")
    first, second, third = map(load_file, paths)
    for key in (UNET, TEXT):
        expected = 0.5 * first[key] + 0.75 * second[key] - 0.25 * third[key]
        torch.testing.assert_close(merged[key], expected, **FLOAT32_SAME_MATH)
    assert torch.equal(merged["position_ids"], torch.arange(4))
    assert read_metadata(tmp_path / "merged.safetensors")["modelspec.merged_from"] == "3, 4, 5"


def test_without_ratios_the_shares_are_equal_and_the_requested_precision_is_used(tmp_path: Path) -> None:
    paths = [write(tmp_path, seed) for seed in (6, 7)]
    merged = merge(tmp_path, "--models", *map(str, paths), "--saving_precision", "bf16")
    first, second = map(load_file, paths)
    assert torch.equal(merged[UNET], ((first[UNET] + second[UNET]) / 2).bfloat16())


def test_unet_only_leaves_the_other_parts_alone(tmp_path: Path) -> None:
    paths = [write(tmp_path, seed) for seed in (8, 9)]
    merged = merge(tmp_path, "--models", *map(str, paths), "--unet_only")
    assert torch.equal(merged[TEXT], load_file(paths[0])[TEXT])
    assert not torch.equal(merged[UNET], load_file(paths[0])[UNET])


def test_weights_that_the_files_do_not_share_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    four, eight = torch.full((2,), 4.0), torch.full((2,), 8.0)
    paths = write(tmp_path, 10, first_only=four), write(tmp_path, 11, second_only=eight)
    merged = merge(tmp_path, "--models", *map(str, paths), "--ratios", "0.5", "0.25", "--show_skipped")
    assert "second_only" not in merged
    torch.testing.assert_close(merged["first_only"], 0.75 * four, **FLOAT32_SAME_MATH)
    assert "omitting 1 weights that the first file lacks: second_only" in caplog.text
    assert "lacks 1 weights; using the first file's" in caplog.text


def test_invalid_values_are_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = write(tmp_path, 12), write(tmp_path, 13, **{UNET: torch.ones(7)})
    save_file({"x": torch.ones(1)}, tmp_path / "bare.safetensors")
    for words, sentence in (
        (["--models", str(first), str(other), "--ratios", "1"], "--ratios has 1 values, but --models 2"),
        (["--models", str(first), str(other)], f"{UNET} has shape (3, 5)"),
        (["--models", str(first), str(tmp_path)], "is a folder; use single-file checkpoints"),
        (["--models", str(tmp_path / "bare.safetensors"), "--unet_only"], "--unet_only: "),
        (["--models", str(tmp_path / "none.safetensors")], "--models"),
    ):
        assert merge_models.main([*words, "--output", str(tmp_path / "out.safetensors")]) == 1
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_files_without_a_common_weight_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path, 21)
    save_file({"lora_unet_a.lora_up.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    for others in ((first, tmp_path / "lora.safetensors"), (tmp_path / "none.safetensors", first)):
        words = ["--models", *map(str, others), "--output", str(tmp_path / "m.safetensors")]
        assert merge_models.main(words) == 1
        assert "have no weight in common; use checkpoints of one base model" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def test_weights_that_become_non_finite_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, large = torch.full((2,), float("nan")), torch.full((2,), 1e5)
    paths = write(tmp_path, 13, average=broken, bias=large), write(tmp_path, 14, average=broken, bias=large)
    words = ["--models", *map(str, paths)]
    merge(tmp_path, *words)
    assert "1 weights have values that are not finite" in caplog.text and ": average; --models have them" in caplog.text
    merge(tmp_path, *words, "--saving_precision", "fp16")
    assert (
        "2 weights have values that are not finite" in caplog.text
        and ": average, bias; --models have them" in caplog.text
    )


# tools/merge_lora.py and tools/convert_lora.py on every base model, in every naming and layout.

MODULAR = {"flux_3"}  # diffusers has a modular pipeline alone
FILES: Mapping[str, tuple[str, Callable[[Path], list[str]]]] = {  # title -> base model and what writes its files
    **{name: (name, base.build) for name, base in BASES.items()},
    **{
        f"{name}, {layout}": (name, partial(write_checkpoint, seed=33, layout=layout))
        for name, base in BASES.items()
        for layout in ("whole", "diffusers")
        if (write_checkpoint := base.layouts) is not None and (layout == "whole" or name not in MODULAR)
    },
    "anima, no prefix": ("anima", partial(build_tiny_anima, seed=33, prefix="")),
    "flux_2 dev, whole": ("flux_2", partial(build_tiny_flux_2, seed=33, layout="whole", is_dev=True)),
    "sd, file": ("sd", lambda f: path_argument(build_tiny_sd(f, 33, "safetensors"))),
    "sd2, file": ("sd2", lambda f: path_argument(build_tiny_sd(f, 33, "safetensors", is_v2=True), "--v2")),
    "sdxl, file": ("sdxl", lambda f: path_argument(build_tiny_sdxl(f, 33, "safetensors"))),
}
VERSIONS = {"flux_2 dev, whole": "Flux.2-dev", "sd2, file": "stable-diffusion-v2-512"}


def test_the_listed_models_have_a_modular_pipeline_alone() -> None:
    names = {name: f"{base.spec.pipelines[0]}Pipeline" for name, base in BASES.items() if base.layouts is not None}
    assert {name for name, pipeline in names.items() if not has_pipeline(pipeline)} == MODULAR


def open_model(name: str, arguments: list[str]) -> Architecture:
    spec = BASES[name].spec
    parser = importlib.import_module(spec.script.removesuffix(".py")).setup_parser()
    return spec.build(spec.options.from_args(parser.parse_args(arguments)))


def loaded(arch: Architecture) -> tuple[list[nn.Module], nn.Module]:
    return arch.load.text_encoders(), arch.load.denoiser()


def weights_of(encoders: list[nn.Module], denoiser: nn.Module) -> dict[str, Tensor]:
    return {f"{i}.{key}": t for i, part in enumerate((*encoders, denoiser)) for key, t in part.state_dict().items()}


def write_lora(name: str, path: Path, text: Any, denoiser: nn.Module) -> Any:
    """Save an adapter with random weights for most layers and return its network module."""
    module, base = open_network_module(BASES[name].module), BASES[name]
    network: Any = module.create_network(1.0, 4, 2.0, None, text, denoiser, **base.everything)
    randomize(network, 3)
    network.save_weights(str(path), None, {"ss_base_model_version": base.written[0]})
    return module


@pytest.mark.parametrize(
    ("title", "naming"),
    first_is_fast(
        (title, naming)
        for title in FILES
        for naming in ("kohya", "generic", "diffusers")
        # The names of U-Nets in other namings are those of full size.
        if naming == "kohya" or (title in BASES and title not in ("sd", "sd2"))
    ),
)
def test_a_merged_checkpoint_is_the_model_with_its_adapter_merged(
    title: str, naming: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, build = FILES[title]
    arguments = build(tmp_path)
    arch, lora, renamed = open_model(name, arguments), tmp_path / "lora.safetensors", tmp_path / "renamed.safetensors"
    text, denoiser = arch.view(*loaded(arch))
    has_text = title not in BASES or BASES[name].layouts is None  # otherwise the text encoders have files of their own
    has_text = has_text and not title.startswith("anima") and not title.endswith(", diffusers")
    module = write_lora(name, lora, text if has_text else [], denoiser)
    save_adapter_file(renamed, rename(read_adapter_file(lora), BASES[name].spec.names, naming).file)

    to = Path(arguments[1]).with_name("merged" if Path(arguments[1]).is_dir() else "merged.safetensors")
    words = ["--sd_model", arguments[1], "--models", str(renamed), "--ratios", "0.5", "--save_to", str(to)]
    assert merge_lora.main(words) == 0
    start, models = weights_of(*loaded(arch)), loaded(arch)
    network, weights = module.create_network_from_weights(0.5, str(lora), None, *arch.view(*models), for_inference=True)
    network.merge_to(*arch.view(*models), weights, torch.float32, "cpu")
    expected, actual = (
        weights_of(*models),
        weights_of(*loaded(open_model(name, [arguments[0], str(to), *arguments[2:]]))),
    )
    changed = {key for key, tensor in expected.items() if not torch.equal(tensor, start[key])}
    assert (
        changed == {key for key, tensor in actual.items() if not torch.equal(tensor, start[key])} and len(changed) > 10
    )
    for key in changed:
        torch.testing.assert_close(actual[key], expected[key], **FLOAT32_SAME_MATH)
    if title == "flux, diffusers":
        write_lora(name, lora, text, denoiser)
        assert merge_lora.main([*words[:3], str(lora), "--save_to", str(tmp_path / "text")]) == 1
        assert "text encoders in a pipeline's folder are not merged" in capsys.readouterr().err
    if to.is_file():
        assert load_file(to).keys() == load_file(arguments[1]).keys()
        assert read_metadata(to)["modelspec.architecture"] == VERSIONS.get(title, BASES[name].written[1])


@pytest.mark.parametrize("name", [name for name, base in BASES.items() if base.is_flow or name == "sd3"])
def test_a_folder_without_the_transformer_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{BASES[name].spec.pipelines[0]}Pipeline"}}')
    lora = tmp_path / "lora.safetensors"
    save_file({key: torch.ones(shape) for key, shape in BASES[name].readers[0][2].items()}, lora)
    words = ["--models", str(lora), "--save_to", str(tmp_path / "out.safetensors")]
    assert merge_lora.main(["--sd_model", str(tmp_path), *words]) == 1
    assert re.search(
        r"for .* (original layout|use the transformer's file)|names no model of \w+ that draws", capsys.readouterr().err
    )


@pytest.mark.parametrize("name", DITS)
def test_a_merged_lora_has_the_names_of_a_trained_one(name: str, tmp_path: Path) -> None:
    """ComfyUI would ignore some layers under kohya's names."""
    path, to = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    metadata = {"ss_base_model_version": name}  # sizes do not identify a tiny model
    DITS[name].trained_file(DITS[name].module, path, {})
    save_file(load_file(path), path, metadata)
    words = ["--models", str(path), str(path), "--ratios", "0.75", "0.5", "--concat", "--save_to", str(to)]
    assert merge_lora.main(words) == 0
    trained, merged = read_adapter_file(path), read_adapter_file(to)
    assert load_file(to).keys() == load_file(path).keys()
    for module in trained.modules.values():
        torch.testing.assert_close(merged.modules[module.name].weight(), 1.25 * module.weight(), **FLOAT32_DEEP)


@pytest.mark.parametrize("name", DITS)
def test_the_command_converts_into_every_naming(name: str, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    DITS[name].trained_file(DITS[name].module, lora, {})
    if name == "flux_2":
        save_file(load_file(lora), lora, {"ss_base_model_version": "flux_2"})  # sizes do not identify a tiny model
    for naming, key in zip(("kohya", "generic", "diffusers"), DITS[name].dit.converted, strict=True):
        path = tmp_path / f"{naming}.safetensors"
        assert convert_lora.main(["--model", str(lora), "--save_to", str(path), "--to", naming]) == 0
        assert key in {name for module in read_adapter_file(path).modules.values() for name in module.keys.values()}


# tools/convert_diffusers_to_flux.py and tools/merge_sd3_safetensors.py, run as commands on tiny models.


def convert(*arguments: object) -> int:
    return convert_diffusers_to_flux.main([str(argument) for argument in arguments])


def merge_parts(*arguments: object) -> int:
    return merge_sd3_safetensors.main([str(argument) for argument in arguments])


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    """Build the files of a tiny SD3: the transformer with its VAE in one file, the text encoders in others."""
    dit = build_tiny_sd3(tmp_path / "sd3", 31, with_text=False)
    return {"dit": dit, **{name: tmp_path / "sd3" / f"{name}.safetensors" for name in ("clip_l", "clip_g", "t5xxl")}}


def arguments_for(parts: dict[str, Path]) -> list[str]:
    return [word for name, path in parts.items() for word in (f"--{name}", str(path))]


@pytest.mark.parametrize("form", ["folder", "transformer", "file"])
def test_a_diffusers_flux_transformer_gets_the_original_key_names(tmp_path: Path, form: str) -> None:
    build_tiny_flux(tmp_path / "files", 33)
    build_tiny_flux(tmp_path / "folder", 33, "diffusers")
    path = {"folder": "", "transformer": "transformer", "file": "transformer/diffusion_pytorch_model.safetensors"}[form]
    out = tmp_path / "flux.safetensors"
    assert convert("--diffusers_path", tmp_path / "folder" / path, "--save_to", out, "--mem_eff_load_save") == 0
    actual, expected = load_state_dict(out), load_state_dict(tmp_path / "files" / "flux1.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def test_shards_are_read_from_the_first_file_on_and_cast(tmp_path: Path) -> None:
    state = diffusers_state(tiny_flux(34).state_dict(), CONFIG)
    names, stem = list(state), "diffusion_pytorch_model"
    shards = {f"{stem}-0000{n + 1}-of-00003.safetensors": names[n::3] for n in range(3)}
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, tmp_path / shard)
    first = tmp_path / f"{stem}-00001-of-00003.safetensors"
    arguments = ("--diffusers_path", first, "--save_to", tmp_path / "f.safetensors", "--save_precision", "bf16")
    assert convert(*arguments) == 0
    actual, expected = load_state_dict(tmp_path / "f.safetensors"), tiny_flux(34).state_dict()
    assert all(torch.equal(actual[key], tensor.bfloat16()) for key, tensor in expected.items())


def test_anything_but_a_diffusers_transformer_is_refused(
    tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_tiny_flux(tmp_path / "files", 35)
    out = tmp_path / "out.safetensors"
    unet = tiny_sd_folder / "unet" / "diffusion_pytorch_model.safetensors"
    for path in (tmp_path / "files" / "flux1.safetensors", unet):
        assert convert("--diffusers_path", path, "--save_to", out) == 1
        assert "is not a FLUX.1 transformer in diffusers' layout" in capsys.readouterr().err
    assert convert("--diffusers_path", unet, "--save_to", tmp_path / "out.ckpt") == 1
    assert "must end in .safetensors" in capsys.readouterr().err
    assert not out.exists()


def test_the_parts_of_sd3_are_merged_into_one_file(tmp_path: Path, parts: dict[str, Path]) -> None:
    expected = load_state_dict(build_tiny_sd3(tmp_path / "whole", 31))
    assert merge_parts(*arguments_for(parts), "--output", tmp_path / "all.safetensors", "--device", "cpu") == 0
    actual = load_state_dict(tmp_path / "all.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def test_eight_bit_weights_keep_their_scales_unless_they_are_decoded(tmp_path: Path, parts: dict[str, Path]) -> None:
    t5, name = load_state_dict(parts["t5xxl"]), "encoder.block.0.layer.0.SelfAttention.q"
    codes, scale = (t5[f"{name}.weight"] / 0.25).to(torch.float8_e4m3fn), torch.tensor([0.25])
    marked = {**t5, f"{name}.weight": codes, f"{name}.scale_weight": scale, "scaled_fp8": codes[:0, 0].clone()}
    save_file(marked, parts["t5xxl"])
    prefix, out = "text_encoders.t5xxl.transformer.", tmp_path / "all.safetensors"
    assert merge_parts(*arguments_for(parts), "--output", out) == 0
    actual = load_state_dict(out)
    assert torch.equal(actual[f"{prefix}{name}.weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(actual[f"{prefix}{name}.scale_weight"], scale)
    assert merge_parts(*arguments_for(parts), "--output", out, "--save_precision", "fp32") == 0
    actual = load_state_dict(out)
    assert torch.equal(actual[f"{prefix}{name}.weight"], codes.float() * 0.25)
    assert not any("scale" in key for key in actual)


def test_a_part_with_its_own_option_replaces_the_one_in_another_file(
    tmp_path: Path, parts: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    vae = {key: tensor + 1 for key, tensor in load_state_dict(tmp_path / "sd3" / "vae.safetensors").items()}
    save_file(vae, tmp_path / "vae.safetensors")
    out = tmp_path / "all.safetensors"
    assert merge_parts(*arguments_for({**parts, "vae": tmp_path / "vae.safetensors"}), "--output", out) == 0
    assert "--vae replaces the same part" in caplog.text
    actual = load_state_dict(out)
    assert all(torch.equal(actual[f"first_stage_model.{key}"], tensor) for key, tensor in vae.items())


def test_parts_of_other_models_are_named(
    tmp_path: Path, parts: dict[str, Path], tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers_vae = tiny_sd_folder / "vae" / "diffusion_pytorch_model.safetensors"
    flux = Path(build_tiny_flux(tmp_path / "flux", 36)[1])
    wrong = (
        ({"clip_l": parts["clip_g"], "clip_g": parts["clip_l"]}, "not swapped"),
        ({"dit": flux}, "--dit"),
        ({"dit": parts["clip_l"]}, "has no joint_blocks"),
        ({"vae": diffusers_vae}, "is not a VAE in the original layout"),
        ({"t5xxl": tmp_path / "none.safetensors"}, "--t5xxl"),
    )
    for other, message in wrong:
        assert merge_parts(*arguments_for({**parts, **other}), "--output", tmp_path / "no.safetensors") == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()

"""tools/merge_lora.py and tools/convert_lora.py on every base model, in every naming and layout."""

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
from tests.tiny.flux_2 import build_tiny_flux_2
from tests.tiny.sd import build_tiny_sd
from tests.tiny.sdxl import build_tiny_sdxl
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAME_MATH
from tests.unit.networks.toy import randomize
from tools import convert_lora, merge_lora

FILES: Mapping[str, tuple[str, Callable[[Path], list[str]]]] = {  # title -> base model and what writes its files
    **{name: (name, base.build) for name, base in BASES.items()},
    **{
        f"{name}, {layout}": (name, partial(write, seed=33, layout=layout))
        for name, base in BASES.items()
        for layout in ("whole", "diffusers")
        if (write := base.layouts) is not None
        and (layout == "whole" or has_pipeline(f"{base.spec.pipelines[0]}Pipeline"))
    },
    "anima, no prefix": ("anima", partial(build_tiny_anima, seed=33, prefix="")),
    "flux_2 dev, whole": ("flux_2", partial(build_tiny_flux_2, seed=33, layout="whole", is_dev=True)),
    "sd, file": ("sd", lambda f: path_argument(build_tiny_sd(f, 33, "safetensors"))),
    "sd2, file": ("sd2", lambda f: path_argument(build_tiny_sd(f, 33, "safetensors", is_v2=True), "--v2")),
    "sdxl, file": ("sdxl", lambda f: path_argument(build_tiny_sdxl(f, 33, "safetensors"))),
}
VERSIONS = {"flux_2 dev, whole": "Flux.2-dev", "sd2, file": "stable-diffusion-v2-512"}


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

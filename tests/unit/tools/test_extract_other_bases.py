"""tools/extract_lora_from_models.py on transformers: a merged change is extracted again."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.adapter_keys import recognise_naming
from library.checkpoints.headers import read_metadata
from library.commands.base_models import find_adapter_targets, open_base_model, spec_for
from networks.core.files.adapter_file import read_adapter_file
from networks.core.files.renaming import rename
from networks.core.targets.targets import TargetModule
from tests.tiny.base import Base
from tests.tiny.bases import BASES
from tests.tiny.chroma import build_tiny_chroma
from tests.tiny.flux import build_tiny_flux
from tests.tiny.qwen_image_21 import with_fused_gates
from tests.tiny.sd3 import build_tiny_sd3
from tests.tolerances import FLOAT32_DEEP
from tools import extract_lora_from_models, merge_lora

SEED, RANK = 41, 3


def path_of(base: Base, folder: Path) -> str:
    arguments = base.build(folder)
    return arguments[arguments.index("--pretrained_model_name_or_path") + 1]


MODELS: Mapping[str, tuple[Callable[[Path], str], str]] = {  # and ss_base_model_version
    **{name: (partial(path_of, base), base.written[0]) for name, base in BASES.items() if base.is_flow},
    "flux in one file": (lambda folder: build_tiny_flux(folder, SEED + 1, "whole")[1], "flux1"),
    "chroma in one file": (lambda folder: build_tiny_chroma(folder, SEED + 7, "whole")[1], "chroma"),
    "sd3.5": (lambda folder: str(build_tiny_sd3(folder, SEED + 2, "sd3.5-medium")), "5-medium"),
}
CASES = [name if name == "flux" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def write_tuned_checkpoint(base: Path, save_to: Path, target_modules: list[TargetModule]) -> None:
    """Write the checkpoint with a random change of rank 3 in each layer."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = load_file(base)
    stems = {module: stem for file in open_base_model("base", base).files for module, stem in file.stems.items()}
    for site in target_modules:
        weight = tensors[f"{stems[site.name]}.weight"]
        up = torch.randn(weight.shape[0], RANK, generator=generator)
        change = up @ torch.randn(RANK, weight[0].numel(), generator=generator)
        weight += 0.02 * change.reshape(weight.shape)
    save_file(tensors, save_to)


@pytest.mark.parametrize("name", CASES)
def test_the_extracted_lora_merged_back_gives_the_tuned_checkpoint(tmp_path: Path, name: str) -> None:
    build, version = MODELS[name]
    base = Path(build(tmp_path))
    _, target_modules = find_adapter_targets(open_base_model("base", base), with_convolutions=False)
    assert len(target_modules) > 5
    write_tuned_checkpoint(base, tmp_path / "tuned.safetensors", target_modules)
    arguments = ["--model_org", str(base), "--model_tuned", str(tmp_path / "tuned.safetensors"), "--dim", str(RANK)]
    assert extract_lora_from_models.main([*arguments, "--save_to", str(tmp_path / "lora.safetensors")]) == 0
    lora, names = read_adapter_file(tmp_path / "lora.safetensors"), spec_for(open_base_model("base", base)).names
    has_kohyas_names = {recognise_naming(module) == "kohya" for module in lora.modules}
    assert has_kohyas_names == {names.saved_naming == "kohya"}
    assert set(rename(lora, names, "kohya").file.modules) == {site.name for site in target_modules}
    assert read_metadata(tmp_path / "lora.safetensors")["ss_base_model_version"] == version
    arguments = ["--sd_model", str(base), "--models", str(tmp_path / "lora.safetensors")]
    assert merge_lora.main([*arguments, "--save_to", str(tmp_path / "merged.safetensors")]) == 0
    expected, actual = load_file(tmp_path / "tuned.safetensors"), load_file(tmp_path / "merged.safetensors")
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, **FLOAT32_DEEP, msg=lambda text, key=key: f"{key}: {text}")


def test_a_lora_is_extracted_from_files_with_fused_layers(tmp_path: Path) -> None:
    """Qwen-Image 2.1's gate layers may be fused in either file; the LoRA is the same."""
    base = Path(MODELS["qwen_image_21"][0](tmp_path))
    write_tuned_checkpoint(
        base, tmp_path / "tuned", find_adapter_targets(open_base_model("base", base), with_convolutions=False)[1]
    )
    paths = {"org": (base, tmp_path / "org_fused"), "tuned": (tmp_path / "tuned", tmp_path / "tuned_fused")}
    for path, fused in paths.values():
        save_file(with_fused_gates(load_file(path)), fused)
    extracted = []
    for place, (org, tuned) in enumerate(product(paths["org"], paths["tuned"])):
        save_to = tmp_path / f"lora{place}.safetensors"
        words = ["--model_org", str(org), "--model_tuned", str(tuned), "--save_to", str(save_to), "--dim", str(RANK)]
        assert extract_lora_from_models.main(words) == 0
        extracted.append(load_file(save_to))
    for lora in extracted[1:]:
        assert lora.keys() == extracted[0].keys()
        assert all(torch.equal(lora[key], extracted[0][key]) for key in lora)

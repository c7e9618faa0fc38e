"""Extracting adapters from DyLoRA files and from models, run as commands."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from errno import ENOSPC
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.checkpoints.adapter_keys import recognise_naming
from library.checkpoints.files import load_state_dict
from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.headers import read_metadata
from library.checkpoints.marks import mark_of
from library.checkpoints.saving import save_pickle_state_dict, save_safetensors
from library.commands.base_models import find_adapter_targets, open_base_model, spec_for
from networks.core.files.adapter_file import AdapterFile, read_adapter_file
from networks.core.files.renaming import rename
from networks.core.targets.targets import TargetModule
from tests.tiny.base import Base
from tests.tiny.bases import BASES
from tests.tiny.chroma import build_tiny_chroma
from tests.tiny.flux import build_tiny_flux
from tests.tiny.qwen_image_21 import with_fused_gates
from tests.tiny.sd3 import build_tiny_sd3
from tests.tolerances import EXACT, FLOAT32_DEEP, FLOAT32_SAME_MATH
from tools import extract_lora_from_dylora as tool
from tools import extract_lora_from_models, merge_lora
from tools.extract_lora_from_dylora import main, open_nested

ROOT = Path(__file__).parents[3]
LINEAR, CONV = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_down_blocks_0_resnets_0_conv1"
METADATA = {
    "ss_network_dim": "8",
    "ss_network_alpha": "4.0",
    "ss_network_args": json.dumps({"unit": "2", "conv_dim": "4", "conv_alpha": "3"}),
    "ss_training_comment": "my cat",
    "ss_network_module": "networks.dylora",
}


def nested_tensors(seed: int) -> dict[str, Tensor]:
    """Return a Linear of rank 8 and alpha 4 and a 3x3 convolution of rank 4 and alpha 3."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, rank, alpha, kernel in ((LINEAR, 8, 4.0, ()), (CONV, 4, 3.0, (3, 3))):
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 10, *kernel, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(12, rank, *(1,) * len(kernel), generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    save_safetensors(tmp_path / "cat.safetensors", nested_tensors(50), METADATA)
    return tmp_path / "cat.safetensors"


def test_every_extracted_rank_uses_the_first_ranks_at_the_full_scale(nested: Path) -> None:
    assert main(["--model", str(nested), "--save_to", str(nested.parent / "cut.safetensors"), "--unit", "2"]) == 0
    written = sorted(path.name for path in nested.parent.glob("cut*"))
    assert written == [f"cut-000{rank}.safetensors" for rank in (2, 4, 6, 8)]
    old = load_state_dict(nested)
    for rank in (2, 4, 6, 8):
        modules = read_adapter_file(nested.parent / f"cut-000{rank}.safetensors").modules
        up, down = old[f"{LINEAR}.lora_up.weight"], old[f"{LINEAR}.lora_down.weight"]
        assert (modules[LINEAR].rank, modules[LINEAR].alpha) == (rank, rank / 2)
        torch.testing.assert_close(modules[LINEAR].weight(), 0.5 * (up[:, :rank] @ down[:rank]), **FLOAT32_SAME_MATH)
        conv_rank = rank // 2
        up, down = old[f"{CONV}.lora_up.weight"].flatten(1), old[f"{CONV}.lora_down.weight"].flatten(1)
        assert (modules[CONV].rank, modules[CONV].alpha) == (conv_rank, 0.75 * conv_rank)
        change = 0.75 * (up[:, :conv_rank] @ down[:conv_rank]).reshape(12, 10, 3, 3)
        torch.testing.assert_close(modules[CONV].weight(), change, **FLOAT32_SAME_MATH)


def test_the_full_rank_equals_the_input_file(nested: Path) -> None:
    assert main(["--model", str(nested), "--save_to", str(nested.parent / "cut.safetensors"), "--rank", "8"]) == 0
    old, new = load_state_dict(nested), load_state_dict(nested.parent / "cut-0008.safetensors")
    assert old.keys() == new.keys()
    for key in old:
        torch.testing.assert_close(new[key], old[key], **EXACT)


def test_each_file_has_its_own_rank_comment_and_hashes(nested: Path) -> None:
    assert main(["--model", str(nested), "--save_to", str(nested.parent / "cut.safetensors"), "--rank", "2", "6"]) == 0
    hashes_seen = set()
    for rank in (2, 6):
        path = nested.parent / f"cut-000{rank}.safetensors"
        metadata = read_metadata(path)
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(rank), str(rank / 2))
        assert metadata["ss_training_comment"] == f"cut from DyLoRA of rank 8 at rank {rank}; my cat"
        assert json.loads(metadata["ss_network_args"])["conv_dim"] == str(rank // 2)
        hashes = metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]
        assert hashes == sshs_hashes(load_state_dict(path), metadata)
        hashes_seen.add(hashes[0])
    assert len(hashes_seen) == 2


def test_file_without_metadata_and_without_alpha_gives_a_ckpt(tmp_path: Path) -> None:
    tensors = {key: value for key, value in nested_tensors(51).items() if not key.endswith("alpha")}
    save_pickle_state_dict(tmp_path / "old.ckpt", tensors)
    assert main(["--model", str(tmp_path / "old.ckpt"), "--save_to", str(tmp_path / "cut.ckpt"), "--rank", "3"]) == 0
    cut = load_state_dict(tmp_path / "cut-0003.ckpt")
    assert cut.keys() == tensors.keys()
    assert torch.equal(cut[f"{LINEAR}.lora_up.weight"], tensors[f"{LINEAR}.lora_up.weight"][:, :3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "12"], "--rank 12: the file has rank 8, trained in units of 2; use one of 2, 4, 6, 8"),
        (["--rank", "4", "3"], "--rank 3"),
        (["--unit", "3"], "--unit 3: the file has rank 8, trained in units of 2; use one of 2, 4, 8"),
        (["--unit", "2", "--rank", "4"], "exclude each other"),
    ],
)
def test_impossible_rank_names_the_possible_ones(
    nested: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(nested), "--save_to", str(nested.parent / "cut.safetensors"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(nested.parent.glob("cut*"))


def test_a_status_of_1_says_that_nothing_was_written(
    nested: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full at the third of four files; the file of an earlier run stays."""
    before = nested.parent / "cut-0002.safetensors"
    save_safetensors(before, nested_tensors(51), mark=mark_of(tool.WRITER, before))
    content, honest, saved = before.read_bytes(), tool.save_adapter_file, []

    def save(path: Path, file: AdapterFile, mark: str) -> None:
        if len(saved) == 2:
            raise OSError(ENOSPC, "No space left on device", str(path))
        saved.append(path)
        honest(path, file, mark=mark)

    monkeypatch.setattr(tool, "save_adapter_file", save)
    assert main(["--model", str(nested), "--save_to", str(nested.parent / "cut.safetensors"), "--unit", "2"]) == 1
    assert "cut-0006." in capsys.readouterr().err and len(saved) == 2
    assert sorted(path.name for path in nested.parent.iterdir()) == ["cat.safetensors", before.name]
    assert before.read_bytes() == content


def test_the_report_is_the_distance_of_the_dense_changes(nested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(nested), "--report"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    full = read_adapter_file(nested).modules
    norm = sum(float(module.weight().square().sum()) for module in full.values())
    for line, rank in zip(lines, (2, 4, 6, 8), strict=True):
        missed = 0.0
        for name, module_rank in ((LINEAR, rank), (CONV, rank // 2)):
            up, down = full[name].factors()
            missed += float((full[name].scale * up[:, module_rank:] @ down[module_rank:]).square().sum())
        assert line.split() == [str(rank), f"{(missed / norm) ** 0.5:.4f}"]


def test_dora_cannot_be_truncated(nested: Path) -> None:
    save_safetensors(nested, {**nested_tensors(52), f"{LINEAR}.dora_scale": torch.ones(1, 10)}, METADATA)
    with pytest.raises(ValueError, match=f"{LINEAR} is DoRA"):
        open_nested(nested)


def test_the_path_of_sd_scripts_runs_the_same_command(nested: Path) -> None:
    command = [sys.executable, "networks/extract_lora_from_dylora.py", "--model", str(nested), "--report"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["8", "0.0000"]


# tools/extract_lora_from_models.py on transformers: a merged change is extracted again.

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

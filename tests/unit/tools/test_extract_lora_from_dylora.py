"""tools/extract_lora_from_dylora.py, run as a command."""

import json
import subprocess
import sys
from errno import ENOSPC
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.headers import read_metadata
from library.checkpoints.marks import mark_of
from library.checkpoints.saving import save_pickle_state_dict, save_safetensors
from networks.core.files.adapter_file import AdapterFile, read_adapter_file
from tests.tolerances import EXACT, FLOAT32_SAME_MATH
from tools import extract_lora_from_dylora as tool
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

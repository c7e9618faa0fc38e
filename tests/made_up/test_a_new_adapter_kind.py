"""An adapter kind is one file in networks/core/kinds and a module of three lines: VeRA is added to a copy."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from library.checkpoints.files import load_state_dict
from tests.made_up.vera import SEED, B, D, VeRA, projection
from tests.running import ROOT, make_images

HERE = Path(__file__).parent
FOLDERS = ("library", "networks", "tools")
MODULE = '''"""VeRA, two trained vectors beside projections that all layers share."""

from networks.core.kinds.vera import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
'''
ADDED = {Path("networks", "core", "kinds", "vera.py"), Path("networks", "vera.py")}


@dataclass(frozen=True)
class Project:
    """A copy of the project with its training data."""

    root: Path
    model: Path
    data: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], cwd=self.root, capture_output=True, text=True)

    def train(self, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return self.run(
            "train_network.py", "--pretrained_model_name_or_path", str(self.model), "--train_data_dir", str(self.data),
            "--caption_extension", ".txt", "--resolution", "64", "--output_dir", str(out), "--output_name", "mine",
            "--network_dim", "4", "--network_alpha", "8", "--learning_rate", "1e-2", "--seed", "7",
            "--max_train_steps", "2", "--max_data_loader_n_workers", "0", "--network_train_unet_only", *more,
        )  # fmt: skip


VERA = ("--network_module", "networks.vera", "--network_args", "conv_dim=2", "projection_seed=31", "rank_dropout=0.2")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_sd_folder: Path) -> Project:
    folder = tmp_path_factory.mktemp("made_up")
    root = folder / "project"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_network.py", root)
    shutil.copy(HERE / "vera.py", root / "networks" / "core" / "kinds")  # the kind
    (root / "networks" / "vera.py").write_text(MODULE, encoding="utf-8")  # nothing else is added
    make_images(folder / "data" / "1_thing", 2, seed=983)
    return Project(root, tiny_sd_folder, folder / "data")


@pytest.fixture(scope="module")
def trained_folder(project: Project) -> Path:
    """Train once and return the output folder, with the state of the first step."""
    out = project.data.parent / "out"
    done = project.train(out, *VERA, "--save_state", "--save_every_n_steps", "1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"denoiser: \d+ modules adapted, rank 2, 4, alpha 1, 8, [\d,]+ parameters", done.stderr)
    return out


def test_two_vectors_per_layer_train_and_the_projections_are_not_saved(trained_folder: Path) -> None:
    tensors = load_state_dict(trained_folder / "mine.safetensors")
    assert {key.partition(".")[2] for key in tensors} == {B, D, SEED, "vera.shape", "alpha"}
    seeds, starts = ([t for key, t in tensors.items() if key.endswith(end)] for end in (SEED, D))
    assert {int(seed) for seed in seeds} == {31}
    assert any(float(t.abs().max()) > 0 for key, t in tensors.items() if key.endswith(B))
    assert any((d != 0.1).any() for d in starts) and {len(d) for d in starts} == {2, 4}
    assert torch.equal(projection(31, 4, 9), projection(31, 4, 40)[:9])  # so all layers share them


def test_a_resumed_run_is_exact(project: Project, trained_folder: Path, tmp_path: Path) -> None:
    done = project.train(tmp_path, *VERA, "--resume", str(trained_folder / "mine-step00000001-state"))
    assert done.returncode == 0, done.stderr
    expected, resumed = (load_state_dict(folder / "mine.safetensors") for folder in (trained_folder, tmp_path))
    first = load_state_dict(trained_folder / "mine-step00000001.safetensors")
    assert expected.keys() == resumed.keys() and all(torch.equal(expected[key], resumed[key]) for key in expected)
    assert any(not torch.equal(expected[key], first[key]) for key in expected)


def test_the_merge_tool_follows_the_formula(project: Project, trained_folder: Path, tmp_path: Path) -> None:
    done = project.run(
        "networks/merge_lora.py", "--sd_model", str(project.model),
        "--models", str(trained_folder / "mine.safetensors"),
        "--ratios", "0.5", "--save_to", str(tmp_path / "merged"), "--save_precision", "float",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tensors = load_state_dict(trained_folder / "mine.safetensors")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    base_OI, merged_OI = (
        load_state_dict(model / "unet" / "diffusion_pytorch_model.safetensors")[
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        ]
        for model in (project.model, tmp_path / "merged")
    )
    b_O, d_R = tensors[f"{name}.{B}"], tensors[f"{name}.{D}"]
    up_OR, down_IR = projection(32, 4, base_OI.shape[0]), projection(31, 4, base_OI.shape[1])
    change_OI = torch.einsum("o,or,r,ir->oi", b_O, up_OR, d_R, down_IR) * 8 / 4
    assert change_OI.abs().max() > 1e-4
    torch.testing.assert_close(merged_OI, base_OI + 0.5 * change_OI, rtol=1e-5, atol=1e-6)


def test_its_files_are_recognised_and_other_modules_name_it(
    project: Project, trained_folder: Path, tmp_path: Path
) -> None:
    check = project.run("networks/check_lora_weights.py", str(trained_folder / "mine.safetensors"))
    assert check.returncode == 0 and "vera" in check.stdout
    other = project.train(
        tmp_path, "--network_module", "networks.lora", "--network_weights", str(trained_folder / "mine.safetensors"),
        "--dim_from_weights",
    )  # fmt: skip
    assert other.returncode != 0 and "Use --network_module networks.vera" in other.stderr


def test_an_adapted_layer_computes_the_same_as_the_merged_weight() -> None:
    torch.manual_seed(984)
    for layer in (nn.Linear(7, 5), nn.Conv2d(3, 5, 3, stride=2, padding=1)):
        delta = VeRA(layer, 4, seed=3)
        nn.init.normal_(delta.vera_lambda_b)
        x = torch.randn(2, 7) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 6, 6)
        changed = torch.func.functional_call(layer, {"weight": layer.weight + delta.weight()}, (x,))  # type: ignore[operator]
        torch.testing.assert_close(delta.up(delta.down(x), layer(x)), changed, rtol=1e-5, atol=1e-5)


def test_no_file_of_the_project_was_edited(project: Project) -> None:
    copied = {path.relative_to(project.root) for name in FOLDERS for path in (project.root / name).rglob("*.py")}
    ours = {path.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    assert copied - ours == ADDED and ours <= copied
    assert all((project.root / path).read_bytes() == (ROOT / path).read_bytes() for path in ours)
    assert len([line for line in MODULE.splitlines() if line and not line.startswith('"""')]) == 3

"""A data source is one file in library/data/sources: zip archives are added to a copy of the project."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from PIL import Image

from library.checkpoints.files import load_state_dict
from tests.running import ROOT, make_images

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Project:
    """A copy of the project with seven images, as a folder and as an archive."""

    root: Path
    model: Path
    data: Path

    def run(self, subset: str, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """Train four steps on a subset."""
        out.mkdir()
        dataset = "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nnum_repeats = 2\n"
        (out / "data.toml").write_text(f"{dataset}{subset}\n", encoding="utf-8")
        words = [
            "--pretrained_model_name_or_path", str(self.model), "--dataset_config", str(out / "data.toml"),
            "--caption_extension", ".txt", "--output_dir", str(out), "--output_name", "mine", "--network_module",
            "networks.lora", "--network_dim", "4", "--learning_rate", "1e-3", "--max_train_steps", "4", "--seed", "5",
            "--max_data_loader_n_workers", "0", "--shuffle_caption", "--validation_split", "0.3",
        ]  # fmt: skip
        return subprocess.run(
            [sys.executable, "train_network.py", *words, *more], cwd=self.root, capture_output=True, text=True
        )

    @property
    def folder(self) -> str:
        return f'image_dir = "{(self.data / "things").as_posix()}"'

    @property
    def archive(self) -> str:
        return f'zip = "{(self.data / "*.zip").as_posix()}"'

    @property
    def caches(self) -> dict[str, int]:
        """Return the modification time of each cache of the archive's images."""
        return {path.name: path.stat().st_mtime_ns for path in (self.data / "things.cache").iterdir()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_sd_folder: Path) -> Project:
    folder = tmp_path_factory.mktemp("made_up")
    root, data = folder / "project", folder / "data"
    for name in ("library", "networks"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "train_network.py", root)
    shutil.copy(HERE / "zip.py", root / "library" / "data" / "sources")  # nothing else is added
    make_images(data / "things", 7, seed=991)
    (data / "things" / "06.txt").unlink()
    with ZipFile(data / "things.zip", "w", ZIP_DEFLATED) as archive:
        for path in sorted((data / "things").iterdir()):
            archive.write(path, path.name)
    return Project(root, tiny_sd_folder, data)


def have_equal_weights(one: Path, other: Path) -> bool:
    first, second = (load_state_dict(path / "mine.safetensors") for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_it_trains_like_the_folder_and_a_resumed_run_reuses_its_caches(project: Project, tmp_path: Path) -> None:
    to_disk = ["--cache_latents_to_disk"]
    done = project.run(project.folder, tmp_path / "folder", *to_disk)
    assert done.returncode == 0, done.stderr
    options = ["--save_state", "--save_every_n_steps", "2", "--max_data_loader_n_workers", "2"]
    done = project.run(project.archive, tmp_path / "zip", *to_disk, *options)
    assert done.returncode == 0, done.stderr
    assert "2 of 7 images are held out" in done.stderr and "things.zip/06.png" in done.stderr
    assert have_equal_weights(tmp_path / "folder", tmp_path / "zip")
    before = project.caches
    assert len(before) == 7
    state = tmp_path / "zip" / "mine-step00000002-state"
    done = project.run(project.archive, tmp_path / "resumed", *to_disk, "--resume", str(state))
    assert done.returncode == 0, done.stderr
    assert have_equal_weights(tmp_path / "zip", tmp_path / "resumed") and project.caches == before


@pytest.mark.nightly
def test_it_is_audited(project: Project, tmp_path: Path) -> None:
    with ZipFile(project.data / "more.zip", "w", ZIP_DEFLATED) as archive:
        archive.write(project.data / "things" / "01.png", "again.png")
        Image.new("RGB", (64, 64), (9, 90, 9)).save(tmp_path / "green.png")
        archive.write(tmp_path / "green.png", "green.png")
        archive.writestr("broken.png", b"no image")
    done = project.run(project.archive, tmp_path / "audit", "--audit_only")
    assert done.returncode == 0, done.stderr
    assert "more.zip/broken.png" in done.stderr and "1 image of a single colour" in done.stderr
    assert "2 images near-duplicated" in done.stderr
    assert (tmp_path / "audit" / "mine-audit.html").is_file()


@pytest.mark.nightly
def test_its_key_is_validated_like_those_of_other_sources(project: Project, tmp_path: Path) -> None:
    subsets = [f"{project.archive}\n{project.folder}", f'{project.archive}\nimage_column = "a"']
    done = project.run("\n[[datasets.subsets]]\n".join(subsets), tmp_path / "wrong")
    assert done.returncode == 1
    assert "has image_dir and zip; each is a separate source" in done.stderr
    assert "['image_column'] has no effect with zip; it is for dataset_name and parquet" in done.stderr

"""After kill -9 at any file operation the same command resumes and leaves the same files as an undisturbed run."""

import re
import shutil
import signal
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from library.checkpoints.headers import LENGTH_BYTES, read_header
from library.data.decoding.npz import LEFT_OVER
from tests.killing import Job, run_jobs
from tests.running import make_images
from tests.tiny.bases import BASES


@dataclass(frozen=True)
class UndisturbedRun:
    """A run that was not killed, as the reference."""

    start: Path  # a copy of the folder before the run
    folder: Path
    arguments: list[str]
    script: str
    operations: list[str]

    def first(self, pattern: str) -> int:
        """Return the number of the first file operation whose line matches."""
        return next(number for number, line in enumerate(self.operations) if re.search(pattern, line))

    @property
    def kill_points(self) -> list[tuple[int, bool]]:
        """Return every operation, and every safetensors file also half written."""
        points = [(number, False) for number in range(len(self.operations))]
        return points + [(number, True) for number, line in enumerate(self.operations) if line.startswith("save ")]


def run_undisturbed(
    root: Path, arguments: list[str], num_images: int, prompts: str, script: str = "train_network"
) -> UndisturbedRun:
    """Run once with relative paths, since states record the command line."""
    make_images(root / "start" / "data" / "1_thing", num_images)
    (root / "start" / "prompts.txt").write_text(prompts)
    shutil.copytree(root / "start", root / "whole")
    (result,) = run_jobs([Job(arguments, str(root / "whole"), script)], root)
    assert result.status == 0, result.output
    return UndisturbedRun(root / "start", root / "whole", arguments, script, result.operations)


Content = bytes | tuple[dict[str, str], bytes] | dict[str, bytes]


def content(folder: Path) -> dict[str, Content]:
    """Return a run's files by path, without the tests' files and partial caches, which are kept for an hour."""
    test_files = ("log", "operations", "prompts.txt")
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: content_of(path)
        for name, path in files.items()
        if not (name in test_files or LEFT_OVER.fullmatch(path.name))
    }


def content_of(path: Path) -> Content:
    """Return a file's content without random parts: safetensors shuffles metadata, archives contain times."""
    if path.suffix == ".safetensors":
        header = read_header(path)
        return dict(header.metadata), path.read_bytes()[LENGTH_BYTES + header.num_bytes :]
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            return {entry.filename: archive.read(entry) for entry in archive.infolist()}
    return path.read_bytes()


def assert_resumes(reference: UndisturbedRun, folder: Path, points: Sequence[tuple[int, bool]]) -> None:
    """Kill a run at each point (operation number, half a file left) and compare the files of the resumed run."""
    jobs = []
    for number, is_half in points:
        at = str(shutil.copytree(reference.start, folder / f"{number}{'-half' * is_half}"))
        jobs.append(Job(reference.arguments, at, reference.script, dies_at=number, leaves_half=is_half))
        jobs.append(Job(reference.arguments, at, reference.script))
    results = run_jobs(jobs, folder, timeout=7200)
    wanted = content(reference.folder)
    for (number, is_half), job, killed, after in zip(points, jobs[::2], results[::2], results[1::2], strict=True):
        point = f"at {number} ({killed.operations[-1]}{', half written' * is_half})"
        assert killed.status == -signal.SIGKILL, f"{point}: {killed.output}"
        assert after.status == 0, f"{point}: {after.output}"
        actual = content(Path(job.folder))
        assert actual.keys() == wanted.keys(), point
        assert not [name for name in wanted if actual[name] != wanted[name]], point


def arguments(base: list[str], *more: str) -> list[str]:
    return [
        *base, "--train_data_dir", "data", "--caption_extension", ".txt",
        "--resolution", "64", "--train_batch_size", "2", "--output_dir", "out", "--output_name", "mine", "--seed", "5",
        "--network_module", "networks.lora", "--network_dim", "2", "--network_train_unet_only", "--learning_rate",
        "1e-3", "--max_data_loader_n_workers", "0", "--cache_latents_to_disk", "--save_state", "--autoresume",
        "--save_last_n_steps", "1", "--save_every_n_epochs", "1", "--save_last_n_epochs", "1", "--sample_prompts",
        "prompts.txt", "--no_report", *more,
    ]  # fmt: skip


@pytest.mark.nightly
def test_a_run_killed_around_its_saves_loses_nothing(tiny_sd_folder: Path, tmp_path: Path) -> None:
    words = ["--max_train_steps", "3", "--save_every_n_steps", "1", "--sample_every_n_epochs", "3"]
    base = ["--pretrained_model_name_or_path", str(tiny_sd_folder)]
    reference = run_undisturbed(tmp_path, arguments(base, *words), 2, "a cat --w 64 --h 64 --s 1 --d 1\n")
    points = [
        (reference.first(r"save \.\.mine-000001"), False),  # the step's state exists, the epoch's file does not
        (reference.first(r"unlink mine-step00000001"), False),  # rotation
        (reference.first(r"open \.mine_e000003_00"), False),  # an image of the last step
        (reference.first(r"save \.\.mine\."), True),  # the last step's state exists, the last file is half written
    ]
    assert_resumes(reference, tmp_path, points)


FAMILIES = ("sd", "flux", "lumina")
"""A U-Net, a transformer of two streams and one of one stream; the transformers with cached captions too."""


def everything(name: str, folder: Path) -> list[str]:
    """Return arguments with caching, states, rotation, previews and validation."""
    words = [
        "--max_train_steps", "6", "--save_every_n_steps", "2", "--sample_every_n_epochs", "1", "--validation_split",
        "0.2", "--keep_best_checkpoint",
    ]  # fmt: skip
    if name != "sd":
        words.append("--cache_text_encoder_outputs_to_disk")
    return arguments(BASES[name].build(folder), *words)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_killed_at_every_file_operation_loses_nothing(name: str, tmp_path: Path) -> None:
    prompts = "a cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 2 --d 2\n"
    reference = run_undisturbed(tmp_path, everything(name, tmp_path / "base"), 5, prompts, BASES[name].script)
    # every point for one family, every fifth for the others, since each point takes two runs
    assert_resumes(reference, tmp_path, reference.kill_points[:: 1 if name == "sd" else 5])


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAMILIES[1:])
def test_a_run_of_a_transformer_killed_around_its_caches_and_saves_loses_nothing(name: str, tmp_path: Path) -> None:
    prompts = "a cat --w 64 --h 64 --s 2 --d 1\n"
    reference = run_undisturbed(tmp_path, everything(name, tmp_path / "base"), 5, prompts, BASES[name].script)
    points = [
        (reference.first(rf"replace \.\d\d_0064x0064_{name}"), False),  # an image's latents
        (reference.first(r"replace \.\d\d_.*_te\."), False),  # an image's captions
        (reference.first(r"save \.\.mine-000001"), True),
        (reference.first(r"open \.mine_e000001_00"), False),
        (reference.first(r"save \.\.mine\."), True),
    ]
    assert_resumes(reference, tmp_path, points)

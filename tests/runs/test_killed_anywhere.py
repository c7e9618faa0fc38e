"""kill -9 at any file operation: the same command goes on, and leaves the folder that an undisturbed run leaves."""

import re
import shutil
import signal
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from library.checkpoints.files import LENGTH_BYTES, read_header
from library.data.decoding.npz import LEFT_OVER
from tests.killing import Job, run_jobs
from tests.running import make_images
from tests.runs.bases import BASES


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbs."""

    start: Path  # a folder as it is before
    folder: Path
    arguments: list[str]
    script: str
    operations: list[str]

    def first(self, pattern: str) -> int:
        """The number of the first file operation whose line matches."""
        return next(number for number, line in enumerate(self.operations) if re.search(pattern, line))

    @property
    def kill_points(self) -> list[tuple[int, bool]]:
        """Every operation, and every file of safetensors also half written."""
        points = [(number, False) for number in range(len(self.operations))]
        return points + [(number, True) for number, line in enumerate(self.operations) if line.startswith("save ")]


def undisturbed(
    root: Path, arguments: list[str], num_images: int, prompts: str, script: str = "train_network"
) -> Whole:
    """Run once; names are relative, since states record the command line."""
    make_images(root / "start" / "data" / "1_thing", num_images)
    (root / "start" / "prompts.txt").write_text(prompts)
    shutil.copytree(root / "start", root / "whole")
    (ended,) = run_jobs([Job(arguments, str(root / "whole"), script)], root)
    assert ended.status == 0, ended.output
    return Whole(root / "start", root / "whole", arguments, script, ended.operations)


Content = bytes | tuple[dict[str, str], bytes] | dict[str, bytes]


def content(folder: Path) -> dict[str, Content]:
    """Every file of a run by its path, without what the tests write and without half caches, which stay an hour."""
    ours = ("log", "operations", "prompts.txt")
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: content_of(path) for name, path in files.items() if not (name in ours or LEFT_OVER.fullmatch(path.name))
    }


def content_of(path: Path) -> Content:
    """Return a file's content without what differs by chance: safetensors shuffles metadata, archives hold times."""
    if path.suffix == ".safetensors":
        header = read_header(path)
        return dict(header.metadata), path.read_bytes()[LENGTH_BYTES + header.num_bytes :]
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            return {entry.filename: archive.read(entry) for entry in archive.infolist()}
    return path.read_bytes()


def assert_goes_on(whole: Whole, folder: Path, points: Sequence[tuple[int, bool]]) -> None:
    """Kill a run at each point, a number and whether half a file is left, and compare what the next one leaves."""
    jobs = []
    for number, is_half in points:
        at = str(shutil.copytree(whole.start, folder / f"{number}{'-half' * is_half}"))
        jobs.append(Job(whole.arguments, at, whole.script, dies_at=number, leaves_half=is_half))
        jobs.append(Job(whole.arguments, at, whole.script))
    ended = run_jobs(jobs, folder, timeout=7200)
    wanted = content(whole.folder)
    for (number, is_half), job, killed, after in zip(points, jobs[::2], ended[::2], ended[1::2], strict=True):
        point = f"at {number} ({killed.operations[-1]}{', half written' * is_half})"
        assert killed.status == -signal.SIGKILL, f"{point}: {killed.output}"
        assert after.status == 0, f"{point}: {after.output}"
        found = content(Path(job.folder))
        assert found.keys() == wanted.keys(), point
        assert not [name for name in wanted if found[name] != wanted[name]], point


def arguments(base: list[str], *more: str) -> list[str]:
    return [
        *base, "--train_data_dir", "data", "--caption_extension", ".txt",
        "--resolution", "64", "--train_batch_size", "2", "--output_dir", "out", "--output_name", "mine", "--seed", "5",
        "--network_module", "networks.lora", "--network_dim", "2", "--network_train_unet_only", "--learning_rate",
        "1e-3", "--max_data_loader_n_workers", "0", "--cache_latents_to_disk", "--save_state", "--autoresume",
        "--save_last_n_steps", "1", "--save_every_n_epochs", "1", "--save_last_n_epochs", "1", "--sample_prompts",
        "prompts.txt", "--no_report", *more,
    ]  # fmt: skip


def test_a_run_killed_around_its_saves_loses_nothing(tiny_sd_folder: Path, tmp_path: Path) -> None:
    words = ["--max_train_steps", "3", "--save_every_n_steps", "1", "--sample_every_n_epochs", "3"]
    base = ["--pretrained_model_name_or_path", str(tiny_sd_folder)]
    whole = undisturbed(tmp_path, arguments(base, *words), 2, "a cat --w 64 --h 64 --s 1 --d 1\n")
    points = [
        (whole.first(r"save \.\.mine-000001"), False),  # the step's state is there, the file of its epoch is not
        (whole.first(r"unlink mine-step00000001"), False),  # rotation
        (whole.first(r"open \.mine_e000003_00"), False),  # an image of the last step
        (whole.first(r"save \.\.mine\."), True),  # the last step's state is there, the last file is half written
    ]
    assert_goes_on(whole, tmp_path, points)


def sweep_arguments(base_folder: Path) -> list[str]:
    """Two adapters, of which rotation keeps one state each."""
    base = ["--pretrained_model_name_or_path", str(base_folder)]
    words = ["--max_train_steps", "6", "--save_every_n_steps", "2", "--sweep", "learning_rate=1e-3,2e-3"]
    return arguments(base, *words)


@pytest.mark.nightly
def test_a_sweep_killed_between_the_saves_of_its_adapters_loses_nothing(tiny_sd_folder: Path, tmp_path: Path) -> None:
    whole = undisturbed(tmp_path, sweep_arguments(tiny_sd_folder), 4, "")
    points = [
        (whole.first(r"save \.\.mine-lr2e-3-step00000004"), False),  # only the first adapter has the state of step 4
        (whole.first(r"rmdir .*mine-lr1e-3-step00000002"), False),  # only the first adapter's old state is deleted
    ]
    assert_goes_on(whole, tmp_path, points)
    lines = [(tmp_path / str(number) / "log").read_text() for number, _ in points]
    assert ["at step 2 of 6" in lines[0], "at step 4 of 6" in lines[1]] == [True, True]


@pytest.mark.nightly
def test_a_sweep_whose_states_share_no_step_ends_with_an_error(tiny_sd_folder: Path, tmp_path: Path) -> None:
    whole = undisturbed(tmp_path, sweep_arguments(tiny_sd_folder), 4, "")
    for folder in (whole.folder / "out").glob("mine-lr2e-3*-state"):
        shutil.rmtree(folder)
    before = content(whole.folder)
    (ended,) = run_jobs([Job(whole.arguments, str(whole.folder))], tmp_path)
    assert ended.status == 1
    assert (
        "have no undamaged states of a common step in --output_dir out (steps with a state: lr1e-3: [" in ended.output
    )
    assert "lr2e-3: none)" in ended.output
    assert content(whole.folder) == before


FAMILIES = ("sd", "flux", "lumina")
"""A U-Net, a transformer of two streams and one of one stream; the transformers with cached captions too."""


def everything(name: str, folder: Path) -> list[str]:
    """A command line with training, caching, states, rotation, previews and validation."""
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
    whole = undisturbed(tmp_path, everything(name, tmp_path / "base"), 5, prompts, BASES[name].script)
    # one family at every point, of the others every fifth: each point is two runs
    assert_goes_on(whole, tmp_path, whole.kill_points[:: 1 if name == "sd" else 5])


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAMILIES[1:])
def test_a_run_of_a_transformer_killed_around_its_caches_and_saves_loses_nothing(name: str, tmp_path: Path) -> None:
    prompts = "a cat --w 64 --h 64 --s 2 --d 1\n"
    whole = undisturbed(tmp_path, everything(name, tmp_path / "base"), 5, prompts, BASES[name].script)
    points = [
        (whole.first(rf"replace \.\d\d_0064x0064_{name}"), False),  # an image's latents
        (whole.first(r"replace \.\d\d_.*_te\."), False),  # an image's captions
        (whole.first(r"save \.\.mine-000001"), True),
        (whole.first(r"open \.mine_e000001_00"), False),
        (whole.first(r"save \.\.mine\."), True),
    ]
    assert_goes_on(whole, tmp_path, points)

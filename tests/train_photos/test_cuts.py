"""train.py killed at any file operation: the same command line goes on, and nothing that is whole is replaced."""

import re
import signal
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.killing import FRONT_DOOR, Ended, Job, run_jobs
from tests.train_photos.test_train import build_base, write_turned

OWN = re.compile(
    r"mine\.toml|mine-dataset|mine-prompts|strengths|timed|\.lock| \.?mine\.safetensors| mine-state|^mkdir out"
)
"""The files of train.py itself, and those that decide what it does next."""
NUM_PARTS = 15  # each of a few cuts, which take minutes


def start(folder: Path) -> Path:
    (folder / "photos").mkdir(parents=True)
    write_turned(folder / "photos")
    return folder


def outcome(folder: Path, before: str, again: Ended) -> str:
    """Return what the second call did, judged by its words and files."""
    said = [
        line for line in again.output.splitlines() if line.startswith(("an unfinished run is there", "mine is fin"))
    ]
    what = re.sub(r"\d+ of", "N of", said[0]) if said else "a new run"
    return f"{what} (cut at {before.split()[0]})" if not said else what


def cut_at(points: list[tuple[int, bool]], arguments: list[str], whole: Path, tmp_path: Path) -> Counter[str]:
    """Kill runs at these operations, and give the same command again. Return what that did, counted."""
    jobs = []
    for number, is_half in points:
        at = str(start(tmp_path / f"{number}{'-half' * is_half}"))
        jobs.append(Job(arguments, at, FRONT_DOOR, dies_at=number, leaves_half=is_half))
        jobs.append(Job(arguments, at, FRONT_DOOR))
    results = run_jobs(jobs, tmp_path, timeout=7200)
    expected, outcomes = load_file(whole / "out" / "mine.safetensors"), Counter[str]()
    for job, killed, again in zip(jobs[::2], results[::2], results[1::2], strict=True):
        point, out = f"at {killed.operations[-1]}", Path(job.folder) / "out"
        # A later run has a few operations less than the first, and may have ended before the last numbers.
        assert killed.status in (-signal.SIGKILL, 0), point
        assert again.status == 0, f"{point}: {again.output}"
        saved = load_file(out / "mine.safetensors")
        assert saved.keys() == expected.keys() and all(saved[name].equal(expected[name]) for name in saved), point
        assert (out / "mine-strengths" / "strengths.png").is_file(), point
        is_new = "mine is finished and stays" in again.output
        assert (out / "mine-2.safetensors").exists() == is_new, point
        assert not [path.name for path in out.iterdir() if "timed" in path.name or "unfinished" in path.name], point
        outcomes[outcome(out, killed.operations[-1], again)] += 1
    return outcomes


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_train_py_killed_at_every_file_operation_of_its_own_goes_on(part: int, tmp_path: Path) -> None:
    base = build_base("sd3", tmp_path / "base")
    words = ["photos", "--base", base, "--trigger", "mycat, a cat", "--steps", "3", "--name", "mine", "--output_dir"]
    arguments = [*words, "out", "--seed", "5", "--save_every_n_minutes", "1e-9", "--yes"]
    whole = start(tmp_path / "whole")
    (undisturbed,) = run_jobs([Job(arguments, str(whole), FRONT_DOOR)], tmp_path)
    assert undisturbed.status == 0, undisturbed.output
    operations = undisturbed.operations
    points = [(number, False) for number, line in enumerate(operations) if OWN.search(line)]
    points += [(number, True) for number, line in enumerate(operations) if line.startswith("save ")]
    points = points[part::NUM_PARTS]
    outcomes = cut_at(points, arguments, whole, tmp_path)
    print("\n".join(f"{count:4}  {what}" for what, count in outcomes.most_common()))
    assert points and sum(outcomes.values()) == len(points)

"""A job that begins with --resume goes on from its own state once it has one."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from library.architectures.scripts import list_scripts
from library.base.errors import UserError
from library.training.run_queue.adding import make_job
from library.training.run_queue.jobs import Job
from library.training.run_queue.runner import run_queue
from library.training.saving.state import NETWORK_FILE, TENSOR_FILE, save_state
from library.training.saving.state_names import MANIFEST_FILE
from tests.running import ROOT
from tests.unit.training.queue_jobs import StandIns
from tools.run_queue import list_script_names, read_script

NOW = 1_800_000_000.0
SCRIPT, TOY = "train_network.py", ROOT / "configs" / "quickstart" / "toy_base"
DATASET = ROOT / "configs" / "quickstart" / "dataset.toml"


def make_state(job: Job, ending: str, seconds: float) -> Path:
    """Save a state, as if it were some seconds after the job was added."""
    path = Path(f"{job.output}{ending}")
    save_state(
        path, step=1, epoch=1, seed=0, num_processes=1, options={}, dataset={}, network=nn.Linear(1, 1), keepers={}
    )
    os.utime(path / MANIFEST_FILE, (NOW + seconds, NOW + seconds))
    return path


def job_in(folder: Path, since: float | None = NOW) -> Job:
    return Job("x.py", "x.toml", "", ("--resume", "/x"), str(folder), str(folder / "out" / "cat"), None, since)


def test_a_job_goes_on_from_the_state_that_it_saved_itself(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    assert job.find_own_state() is None  # so it begins with its --resume
    make_state(replace(job, output=f"{job.output}-2"), "-state", 5)  # of another run
    (tmp_path / "out" / "cat-step00000300-state").mkdir()  # not whole
    assert job.find_own_state() is None
    own = make_state(job, "-step00000020-timed-state", 10)
    assert job.find_own_state() == own
    assert job_in(tmp_path, None).find_own_state() is None  # --autoresume alone has always done so


def test_a_farther_state_of_an_earlier_run_is_not_taken_for_its_own(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    make_state(job, "-step00000200-state", -10)
    assert job.find_own_state() is None
    own = make_state(job, "-step00000120-state", 10)
    assert job.find_own_state() == own


@pytest.mark.parametrize("file", [MANIFEST_FILE, NETWORK_FILE, TENSOR_FILE])
def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path: Path, file: str) -> None:
    job = job_in(tmp_path)
    first, second = make_state(job, "-step00000120-state", 10), make_state(job, "-step00000140-state", 20)
    for state, found in ((second, first), (first, None)):  # at last the one that the job began with
        content = bytearray((state / file).read_bytes())
        content[-2] ^= 1
        modified = (state / file).stat().st_mtime
        (state / file).write_bytes(content)
        os.utime(state / file, (modified, modified))
        assert job.find_own_state() == found


def test_jobs_keep_when_they_were_added_and_those_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path, job = tmp_path / "job.json", job_in(tmp_path)
    path.write_text(job.as_text())
    assert Job.read(path) == job
    path.write_text(job.as_text().replace(f',\n "since": {NOW}', ""))
    assert Job.read(path) == replace(job, since=None)
    path.write_text(job.as_text().replace(str(NOW), '"x"'))
    with pytest.raises(UserError, match="is no job of this version's queue"):
        Job.read(path)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_the_queue_starts_the_training_from_its_own_state(tmp_path: Path) -> None:
    jobs = StandIns(tmp_path)
    (jobs.folder / "stand_in.py").write_text(
        "import json, sys; open(sys.argv[3] + '/words.json', 'w').write(json.dumps(sys.argv))"
    )
    path = jobs.queue.path("waiting", jobs.add("mine", "--resume", "/x"))
    job = replace(Job.read(path), since=NOW)
    path.write_text(job.as_text())
    make_state(job, "-step00000200-state", -10)
    own = make_state(job, "-step00000007-state", 10)
    assert run_queue(jobs.queue, [""], jobs.folder) == 0
    words = json.loads((jobs.folder / "words.json").read_text())
    assert [words[n + 1] for n, word in enumerate(words) if word == "--resume"] == ["/x", str(own)]


@pytest.mark.parametrize("words", [[], ["--resume", "STATE"]])
def test_a_job_is_added_with_the_time_if_it_begins_with_a_state(tmp_path: Path, words: list[str]) -> None:
    state = tmp_path / "before-state"
    state.mkdir()
    (tmp_path / "mine.toml").write_text(
        f'pretrained_model_name_or_path = "{TOY}"\ndataset_config = "{DATASET}"\nnetwork_module = "networks.lora"\n'
        f'output_dir = "{tmp_path}"\noutput_name = "mine"\n'
    )
    given = [word.replace("STATE", str(state)) for word in words]
    scripts = list_scripts()
    job = make_job(tmp_path / "mine.toml", SCRIPT, given, list_script_names(scripts), partial(read_script, scripts))
    assert (job.since is not None) == bool(words)

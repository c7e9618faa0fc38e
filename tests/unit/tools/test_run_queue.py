"""`tools/run_queue.py`: what `add` accepts, and what `list` shows."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from library.training.run_queue.folder import Queue
from library.training.run_queue.jobs import Job
from library.training.run_queue.progress import Progress, format_queue, read_progress
from tests.running import ROOT
from tests.unit.data.builders import full_disk, unwritable
from tools.run_queue import main

QUICKSTART = ROOT / "configs" / "quickstart" / "train.toml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the quickstart's files under a name with a space."""
    place = tmp_path / "my runs"
    shutil.copytree(ROOT / "configs", place / "configs", ignore=shutil.ignore_patterns("recipes"))
    monkeypatch.chdir(place)
    return place


def add(*words: str) -> int:
    return main(["add", "configs/quickstart/train.toml", *words])


def read_job(folder: Path, number: int = 1) -> Job:
    return Job.read(folder / "output" / "queue" / "waiting" / f"{number:06d}.json")


def test_a_job_holds_all_that_its_command_needs(folder: Path) -> None:
    assert add("--", "--output_name", "café 1", "--max_train_steps", "3") == 0
    config = folder / "configs" / "quickstart" / "train.toml"
    job = read_job(folder)
    assert job.script == "train_network.py", "the file's first comment names it"
    assert (job.config, job.text) == (str(config), config.read_text())
    assert job.options == ("--output_name", "café 1", "--max_train_steps", "3")
    assert (job.folder, job.output) == (str(folder), str(folder / "output" / "quickstart" / "café 1"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--script", "train_netwrk.py"], r"--script train_netwrk.py .*did you mean train_network.py"),
        (["--script", "tools/start.py"], "--script tools/start.py is no training script"),
        (["--", "--pretrained_model_name_or_path", "gone.safetensors"], "gone.safetensors does not exist"),
        (["--", "--dataset_config", "gone.toml"], "--dataset_config gone.toml does not exist"),
        (["--", "--config_file", "other.toml"], "--config_file"),
        (["--", "--output_config"], "--output_config"),
        (["--", "--help"], "--help after NAME.toml"),
        (["--", "--full_fp16", "--mixed_precision", "bf16"], "--full_fp16 needs"),
    ],
)
def test_what_cannot_train_is_refused(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(*words) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "output").exists()


def test_a_missing_file_and_an_unknown_option_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["add", "gone.toml", "--script", "train_network.py"]) == 1
    assert "gone.toml, but there is no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        add("--", "--network_dimm", "4")
    assert end.value.code == 2 and not (folder / "output").exists()


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("# Options of flux_train_network.py.\n\nseed = 1\n", "flux_train_network.py"),
        ('recipe = "sdxl_character"\n', "sdxl_train_network.py"),
        ("seed = 1\n# train_network.py\n", None),
        ("# train_network.py or sdxl_train_network.py\n", None),
        ("# written by train.py\n", None),
    ],
)
def test_a_file_names_its_script(
    folder: Path, text: str, script: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.toml").write_text(text)
    assert main(["add", "mine.toml"]) == 1  # it names neither data nor a model
    error = capsys.readouterr().err
    assert ("names no training script; add --script" in error) == (script is None)


def test_leco_is_trained_by_both_of_its_scripts(folder: Path) -> None:
    Path("pair.toml").write_text('[[prompts]]\ntarget = "a cat"\n')
    base, prompts = str(ROOT / "configs" / "quickstart" / "toy_base"), str(folder / "pair.toml")
    Path("leco.toml").write_text(
        f'pretrained_model_name_or_path = "{base}"\nprompts_file = "{prompts}"\noutput_dir = "out"\n'
        'network_module = "networks.lora"\n'
    )
    for number, script in enumerate(("train_leco.py", "sdxl_train_leco.py"), 1):
        assert main(["add", "leco.toml", "--script", script, "--", "--output_name", script]) == 0
        assert read_job(folder, number).script == script
    # An option that other base models have.
    words = ["--discrete_flow_shift", "3", "--output_name", "flow"]
    assert main(["add", "leco.toml", "--script", "train_leco.py", "--", *words]) == 0


def test_an_earlier_state_of_the_name_is_pointed_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "output" / "quickstart" / "quickstart-state").mkdir(parents=True)
    assert add() == 0 and "quickstart-state is there: the job continues an earlier run" in caplog.text


def test_unused_keys_of_the_file_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "configs" / "quickstart" / "train.toml"
    path.write_text(path.read_text() + "\nnetwork_dimm = 4\n")
    assert add() == 0 and "no such option: network_dimm" in caplog.text


@pytest.mark.parametrize("command", [["list"], ["run"], ["stop"], ["remove", "1"]])
def test_other_commands_need_a_queue(folder: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 1
    assert "is no queue" in capsys.readouterr().err and not (folder / "output").exists()


def on_read_only_folder(folder: Path) -> AbstractContextManager[None]:
    return unwritable(folder, *(path for path in folder.rglob("*") if path.is_dir()))


@pytest.mark.parametrize("command", [["add", QUICKSTART, "--", "--output_name", "b"], ["run"], ["stop"]])
@pytest.mark.parametrize("trouble", ["full disk", "read-only"])
def test_a_folder_that_cannot_be_written_is_named(
    folder: Path, command: list[str], trouble: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add() == 0
    queue = folder / "output" / "queue"
    before = sorted(queue.rglob("*"))
    with full_disk() if trouble == "full disk" else on_read_only_folder(queue):
        status = main([str(word) for word in command])
    said = capsys.readouterr().err
    assert status == 1 and f"error: --folder {queue} cannot be written: " in said and "make room" in said, said
    assert sorted(queue.rglob("*")) == before


@pytest.mark.parametrize("gpus", ["", "0,0", "0,,1"])
def test_gpus_are_different(gpus: str) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--gpus", gpus])


def test_the_command_imports_no_torch() -> None:
    code = "import sys, tools.run_queue; tools.run_queue.list_scripts(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# The list


def write_events(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps({"v": 1, **line}, separators=(",", ":")) + "\n" for line in lines))
    return path


def step(number: int, at: float, average: float | None = 0.5) -> dict[str, object]:
    return {"event": "step", "time": at, "step": number, "loss": 1.0, "average": average}


PLAN = {"event": "plan", "time": 0.0, "max_train_steps": 100}


def test_progress_is_read_from_the_last_plan_and_steps(tmp_path: Path) -> None:
    path = write_events(
        tmp_path / "events.jsonl",
        {**PLAN, "max_train_steps": 7},
        step(1, 0.0),
        step(2, 1000.0),
        PLAN,
        step(11, 5000.0),
        step(21, 5020.0, 0.25),
    )
    with path.open("a") as file:
        file.write('{"v":1,"event":"step","ti')  # still being written
    assert read_progress(path) == Progress(21, 100, 0.25, 158.0)


@pytest.mark.parametrize(
    ("lines", "progress"),
    [
        ((), Progress()),
        ((PLAN,), Progress(max_steps=100)),
        ((PLAN, step(1, 0.0, None)), Progress(1, 100, None)),
        ((step(1, 0.0), step(2, 1.0)), Progress(2, None, 0.5)),
        (({**PLAN, "max_train_steps": "x"}, {**step(1, 0.0), "average": "y"}), Progress()),
    ],
)
def test_progress_of_few_events(tmp_path: Path, lines: tuple[dict[str, object], ...], progress: Progress) -> None:
    assert read_progress(write_events(tmp_path / "events.jsonl", *lines)) == progress
    assert read_progress(tmp_path / "gone.jsonl") == Progress()


def test_long_events_are_read_from_their_end(tmp_path: Path) -> None:
    preview = {"event": "preview", "time": 0.0, "thumbnail": "x" * 200_000}
    path = write_events(tmp_path / "events.jsonl", PLAN, step(1, 0.0), preview, preview, step(90, 8.0), step(91, 9.0))
    assert read_progress(path) == Progress(91, 100, 0.5, 9.0)


def test_the_list_shows_step_loss_time_left_and_report(folder: Path) -> None:
    add()
    queue = Queue(folder / "output" / "queue")
    (ticket,) = queue.list_tickets("waiting")
    job = read_job(folder)
    report = Path(f"{job.output}-report.html")
    report.parent.mkdir(parents=True)
    report.touch()
    write_events(queue.events_of(ticket, job), PLAN, step(1, 0.0), step(2, 60.0))
    os.rename(queue.path("waiting", ticket), queue.folder / "running" / "000001@elsewhere@1-1@2-2@3.json")
    row = format_queue(queue)[1].split()
    assert row[:7] == ["1", "running", "quickstart", "2/100", "0.5000", "98", "min"]
    assert format_queue(queue)[1].endswith(f"{report}, on elsewhere, GPU 3")

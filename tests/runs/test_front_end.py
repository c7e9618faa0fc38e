"""Front ends: installing, forms, requests to a run, and the queue, as they start them."""

import contextlib
import html
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import flux_2_train_network
from library.architectures.specs import list_specs
from library.base.version import NAME, VERSION
from library.front_ends.layouts import ABSENT, FOLDERS, PREFIXES
from library.training.loop.steps import Steps
from library.training.run_queue.folder import Queue
from library.training.run_queue.tickets import ProcessId, Ticket
from library.training.step.accumulation import Window
from tests.browser import in_browser
from tests.chromium import ask
from tests.running import ROOT, Finished, make_images
from tests.runs.test_processes import launch_two
from tests.runs.test_resume import ALL_RANDOM, assert_equal_states
from tests.tiny.bases import BASES
from tests.unit.training.queue_jobs import wait_until
from tools.capabilities import main as capabilities
from tools.front_end import main


@pytest.fixture
def front_end(tmp_path: Path) -> Path:
    """Create a front end like kohya_ss with its environment inside the scripts folder, as in LoRA_Easy."""
    folder = tmp_path / "gui"
    (folder / "sd-scripts" / "venv" / "bin").mkdir(parents=True)
    (folder / "sd-scripts" / "train_network.py").write_text("raise SystemExit('the old one')\n")
    (folder / "sd-scripts" / "only_there.py").touch()
    return folder


def start(front_end: Path, script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": "", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(front_end / "sd-scripts" / script), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=front_end, env=environment, timeout=280)


def test_a_training_runs_from_the_front_end_and_the_folder_can_be_restored(front_end: Path, tmp_path: Path) -> None:
    assert main([str(front_end)]) == 0
    assert (front_end / "sd-scripts" / "venv" / "bin").is_dir() and not (front_end / "sd-scripts" / "tests").exists()
    installed = (front_end / "sd-scripts" / "requirements.txt").read_text("utf-8").splitlines()
    ours = (Path(__file__).parents[2] / "requirements.txt").read_text("utf-8").splitlines()
    assert [line for line in ours if line not in installed] == ["torch>=2.6"]  # the front end keeps its own torch
    assert [line for line in installed if line not in ours] == ["-e ."]  # LoRA_Easy imports `library` from outside
    make_images(tmp_path / "data" / "1_thing", 2)
    done = start(
        front_end, "train_network.py", *BASES["sd"].build(tmp_path / "model"), "--train_data_dir",
        str(tmp_path / "data"), "--resolution", "64", "--network_module", "networks.lora", "--max_train_steps", "1",
        "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--max_data_loader_n_workers", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "mine.safetensors").is_file()
    assert f"{NAME} {VERSION}" in done.stderr.splitlines()[0]
    own_adapter = front_end / "sd-scripts/networks/own.py"
    own_adapter.write_text("mine")
    assert main([str(front_end)]) == 0  # a second call updates
    assert own_adapter.read_text() == "mine" and main([str(front_end), "--check"]) == 0
    assert main([str(front_end), "--restore"]) == 0
    assert sorted(path.name for path in front_end.iterdir()) == ["sd-scripts", "sd-scripts.aside"]
    assert [path for path in (front_end / "sd-scripts.aside").rglob("*") if path.is_file()] == [
        front_end / "sd-scripts.aside/networks/own.py"
    ]
    assert sorted(path.name for path in (front_end / "sd-scripts").iterdir()) == [
        "only_there.py",
        "train_network.py",
        "venv",
    ]
    assert main([str(front_end), "--restore"]) == 1


@pytest.mark.parametrize("script", ["sdxl_train.py", "train_db.py", "finetune/tag_images_by_wd14_tagger.py"])
def test_absent_scripts_exit_with_a_one_sentence_message(script: str, front_end: Path) -> None:
    assert main([str(front_end)]) == 0
    done = start(front_end, script, "--pretrained_model_name_or_path", "x")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"{script} ") and done.stderr.count("\n") == 1 and "sd-scripts" in done.stderr


def test_suggested_scripts_exist_and_none_is_shadowed() -> None:
    root = Path(__file__).parents[2]
    assert not any((root / name).exists() for name in ABSENT)
    suggested = {
        word for text in ABSENT.values() for word in text.replace(",", " ").split() if word.endswith("_network.py")
    }
    assert suggested and all((root / name).is_file() for name in suggested)


def test_musubi_tuners_own_command_line_starts_this_suites_script(tmp_path: Path) -> None:
    """The training ends at the missing model, which is named by musubi-tuner's flag."""
    script = tmp_path / "musubi-tuner" / "src" / "musubi_tuner" / "zimage_train_network.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit('the old one')\n")
    assert main([str(tmp_path / "musubi-tuner")]) == 0
    command = [sys.executable, str(script), "--dit", "none.safetensors", "--output_dir", str(tmp_path)]
    command += ["--network_module", "networks.lora_zimage", "--train_data_dir", str(tmp_path), "--resolution", "64"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert done.returncode == 1 and f"{NAME} {VERSION}" in done.stderr.splitlines()[0]
    assert "--dit none.safetensors does not exist" in done.stderr, done.stderr


def test_every_script_of_sd_scripts_that_this_suite_lacks_is_replaced() -> None:
    prefixes = {spec.script.removesuffix("train_network.py") for spec in list_specs()}
    assert prefixes == set(PREFIXES)


def test_other_folders_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "gone")]) == 1 and main([str(tmp_path)]) == 1
    assert "is not a folder" in (err := capsys.readouterr().err) and FOLDERS[0] in err
    assert main([str(Path(__file__).parents[3])]) == 1 and "contains this suite" in capsys.readouterr().err


# A form made from tools/capabilities.py alone, filled in by a browser: its words are what the script accepts.

SCRIPT = "flux_2_train_network.py"
# Fill in every field, and return the words of the command line and the fields that refuse what is out of range.
FILL = """
const words = [], strict = [];
for (const field of document.querySelectorAll("[data-flag]")) {
  if (field.min !== "" && field.type === "number") {
    field.value = Number(field.min) - 1;
    if (!field.checkValidity()) strict.push(field.name);
  }
  if (field.type === "checkbox") field.checked = true;
  else if (field.tagName === "SELECT") field.selectedIndex = field.options.length - 1;
  else field.value = field.type === "number" ? (field.max || Number(field.min || 0) + 1) : "x";
  if (!field.checkValidity()) throw Error(field.name + " refuses " + field.value);
  words.push(field.type === "checkbox" ? [field.dataset.flag] : [field.dataset.flag, field.value]);
}
return {words, strict, groups: [...document.querySelectorAll("fieldset")].map((set) => set.id)};
"""


def field_of(option: dict[str, Any]) -> str:
    words = f'name="{option["name"]}" data-flag="{option["flag"]}" title="{html.escape(option["help"])}"'
    if option["type"] == "flag":
        return f'<input type="checkbox" {words}>'
    if option["choices"] and not option["takes_other_values"]:
        return f"<select {words}>{''.join(f'<option>{choice}</option>' for choice in option['choices'])}</select>"
    if option["type"] in ("text", "path"):
        return f"<input {words}>"
    step = 'step="1"' if option["type"] == "int" else 'step="any"'
    least = option["minimum"] if option["minimum"] is not None else option["exclusive_minimum"]
    limits = [(name, value) for name, value in (("min", least), ("max", option["maximum"])) if value is not None]
    return f'<input type="number" {step} {" ".join(f"{name}={value}" for name, value in limits)} {words}>'


@pytest.mark.slow
@in_browser
def test_a_form_of_the_json_fills_in_every_option_of_the_help(tmp_path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert capabilities(["--json", "--script", SCRIPT]) == 0
    (script,) = json.loads(printed.getvalue())["scripts"]
    options = {option["name"]: option for option in script["options"]}
    groups: dict[str, list[str]] = {}
    for option in options.values():
        groups.setdefault(option["group_id"], []).append(field_of(option))
    sets = "".join(f'<fieldset id="{name}">{"".join(fields)}</fieldset>' for name, fields in groups.items())
    policy = "<meta http-equiv=Content-Security-Policy content=\"script-src 'none'\">"
    found, told = ask(f"<!doctype html>{policy}<title>form</title><form>{sets}</form>", FILL, tmp_path)
    assert not told and found["groups"] == list(groups)
    flags = [flag for flag, *_ in found["words"]]
    shown = subprocess.run([sys.executable, ROOT / SCRIPT, "--help_all"], capture_output=True, text=True, check=True)
    in_help = {word.rstrip(",") for word in shown.stdout.split() if word.startswith("--")}
    assert {flag for flag in flags if not options[flag[2:]]["help"].startswith("==")} <= in_help
    # A form may send every value that its fields accept: the parser takes all of them.
    words = [word for pair in found["words"] for word in pair if pair[0] not in ("--help_all", "--version")]
    args = vars(flux_2_train_network.setup_parser().parse_args(words))
    for name, option in options.items():
        if option["type"] in ("int", "float") and not option["is_list"]:
            assert isinstance(args[name], (int, float)), name
    assert set(found["strict"]) >= {"network_dim", "max_train_steps"} & options.keys()


# Files that ask a run that trains to save or draw now, between the steps of its schedule.

Train = Callable[..., Finished]
PROMPT = "a (red:1.3) cat --w 64 --h 64 --d 3 --s 3 --l 4\n"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[str]]]:
    """Files that appear in the output folder `out` while the step after the key is computed."""
    files, finish = dict[int, list[str]](), Steps.finish

    def finish_and_ask(steps: Steps, window: Window) -> None:
        finish(steps, window)
        for name in files.get(window.step + 1, []):
            (tmp_path / "out" / name).touch()

    monkeypatch.setattr(Steps, "finish", finish_and_ask)
    yield files


@pytest.fixture
def arguments(base_arguments: list[str], tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text(PROMPT)
    previews = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "4"]
    return [
        *base_arguments,
        *ALL_RANDOM,
        *previews,
        "--max_train_steps",
        "8",
        "--save_state",
        "--save_every_n_steps",
        "4",
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def assert_equal_but_for_the_stop(whole: Path, asked: Path) -> None:
    """Compare states of which one lists step 3 as saved between the steps of the schedule."""
    manifest = asked / "train_state.json"
    text = manifest.read_text()
    without = re.sub(r'("stops",\s*\{\s*"list":\s*\[)\s*3\s*\]', r"\1]", text)
    assert without != text
    manifest.write_text(without)
    assert_equal_states(whole, asked)


def test_a_run_that_is_asked_to_save_and_draw_trains_as_one_that_is_not(
    train: Train, arguments: list[str], tmp_path: Path, asked: dict[int, list[str]]
) -> None:
    whole = train([*arguments, "--output_dir", str(tmp_path / "whole")]).ok()
    asked |= {2: ["mine-save-now", "mine-draw-now"], 3: ["mine-save-now", "mine-draw-now"], 8: ["mine-save-now"]}
    done = train(arguments).ok()
    more = {"mine-step00000003.safetensors", "mine-step00000003-state"}
    assert {*names(tmp_path / "out")} == {*names(tmp_path / "whole")} | more
    drawn = [path.name.split("_")[1] for path in sorted((tmp_path / "out" / "sample").glob("*.png"))]
    assert drawn == ["000003", "000004", "000008"]
    assert done.stdout.count("saving checkpoint") == whole.stdout.count("saving checkpoint") + 1
    assert_equal_but_for_the_stop(tmp_path / "whole" / "mine-state", tmp_path / "out" / "mine-state")
    train([*arguments, "--resume", str(tmp_path / "out" / "mine-step00000003-state")]).ok()
    assert_equal_but_for_the_stop(tmp_path / "whole" / "mine-state", tmp_path / "out" / "mine-state")


def test_what_was_saved_on_request_is_outdated_like_a_stop(
    train: Train, arguments: list[str], tmp_path: Path, asked: dict[int, list[str]]
) -> None:
    asked |= {2: ["mine-save-now"]}
    train([*arguments, "--save_last_n_steps", "4"]).ok()
    assert not [name for name in names(tmp_path / "out") if "step00000003" in name]


def test_without_prompts_a_request_to_draw_says_what_is_missing(
    train: Train, base_arguments: list[str], tmp_path: Path, asked: dict[int, list[str]]
) -> None:
    asked |= {1: ["mine-draw-now"], 2: ["mine-save-now.txt"]}
    done = train([*base_arguments, "--max_train_steps", "3"])
    assert done.status == 0 and "this run has no --sample_prompts with an interval" in done.stderr
    assert "mine-draw-now" not in names(tmp_path / "out") and "mine-save-now.txt" in names(tmp_path / "out")


def test_a_file_with_content_is_no_request(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine-save-now").write_text("the user's")
    done = train([*base_arguments, "--max_train_steps", "2"])
    assert done.status == 0 and (tmp_path / "out" / "mine-save-now").read_text() == "the user's"
    assert done.stdout.count("saving checkpoint") == 1


@pytest.mark.slow
def test_two_processes_answer_together(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("mine-save-now", "mine-draw-now"):
        (tmp_path / "out" / name).touch()
    launch_two(arguments).ok()
    assert "mine-step00000001.safetensors" in names(tmp_path / "out")
    drawn = [path.name.split("_")[1] for path in sorted((tmp_path / "out" / "sample").glob("*.png"))]
    assert drawn == ["000001", "000004", "000008"]


# A queue of real trainings, by its own command.


def run_tool(folder: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "tools" / "run_queue.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def process_of(queue: Queue, number: int) -> ProcessId | None:
    ticket = queue.find_running(number)
    return None if ticket is None or ticket.claim is None else ticket.claim.process


def add_jobs(folder: Path, arguments: list[str], *names: str) -> Queue:
    """Add trainings that differ in their names alone, and delete the TOML file."""
    (folder / "trained here.toml").write_text("# train_network.py\nsave_state = true\nsave_every_n_steps = 1\n")
    for name in names:
        done = run_tool(folder, "add", "trained here.toml", "--", *arguments, "--output_name", name)
        assert done.wait() == 0, done.communicate()
    (folder / "trained here.toml").unlink()
    return Queue(folder / "output" / "queue")


@pytest.mark.skipif(os.name != "posix", reason="the test sends SIGKILL")
def test_a_queue_of_three_trains_though_one_is_killed(base_arguments: list[str], tmp_path: Path) -> None:
    queue = add_jobs(tmp_path, [*base_arguments, "--max_train_steps", "12"], "first", "zweite Ü", "third")
    run = run_tool(tmp_path, "run")
    wait_until(lambda: (tmp_path / "out" / "zweite Ü-step00000003-state").is_dir() or run.poll() is not None)
    process = process_of(queue, 2)
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    _, log = run.communicate()
    assert run.returncode == 0, log
    assert queue.list_tickets("done") == [Ticket(1), Ticket(2, losses=1), Ticket(3)]
    events = [json.loads(line) for line in (queue.logs / "000002.jsonl").read_text().splitlines()]
    first_steps = [event["first_step"] for event in events if event["event"] == "plan"]
    assert len(first_steps) == 2 and first_steps[0] == 0 and 3 <= first_steps[1] < 12
    files = [load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("first", "zweite Ü", "third")]
    assert all(torch.equal(files[0][key], other[key]) for other in files[1:] for key in files[0])
    listed, _ = run_tool(tmp_path, "list").communicate()
    assert listed.count("12/12") == 3 and "zweite Ü-report.html" not in listed, "base_arguments leave reports out"


@pytest.mark.skipif(os.name != "posix", reason="the test sends SIGKILL")
@pytest.mark.nightly
def test_stop_saves_a_training_and_run_resumes_it(base_arguments: list[str], tmp_path: Path) -> None:
    queue = add_jobs(tmp_path, [*base_arguments, "--max_train_steps", "12"], "mine", "other")
    run = run_tool(tmp_path, "run")
    wait_until(lambda: (tmp_path / "out" / "mine-step00000002-state").is_dir() or run.poll() is not None)
    assert run_tool(tmp_path, "stop").wait() == 0
    _, log = run.communicate()
    assert run.returncode == 0 and queue.list_tickets("waiting") == [Ticket(1), Ticket(2)], log
    assert not (tmp_path / "out" / "mine.safetensors").exists()
    assert run_tool(tmp_path, "run").wait() == 0
    assert queue.list_tickets("done") == [Ticket(1), Ticket(2)]
    mine, other = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("mine", "other"))
    assert all(torch.equal(mine[key], other[key]) for key in mine)

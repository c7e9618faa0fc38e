"""The checkpoint that a run suggests, by losses, by votes, and for stopping early."""

import json
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Timer
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.training.report_page.local_server import LocalServer, TakeForm
from library.training.report_page.page import build_page
from library.training.report_page.writer import read_report
from library.training.saving.saved_files import read_num_steps
from tests.browser import WATCH, in_browser, opened, with_scripts
from tests.contracts.test_docs import ROOT, commands_of
from tests.ranks import Job, Rank, run_ranks
from tests.running import Finished, make_images
from tests.runs.test_report import events_of, of_kind
from tests.tiny.bases import BASES
from tests.tolerances import SUMS_OF_A_RUN
from tools import choose_checkpoint, vote

Train = Callable[..., Finished]


@pytest.fixture
def arguments(base_arguments: list[str], tmp_path: Path) -> list[str]:
    """Return arguments for six steps with a rate that overshoots, saving every two; 8 of 16 images are held out."""
    words = [word for word in base_arguments if word != "--no_report"]
    make_images(tmp_path / "data" / "1_more", 10, seed=3)
    return [
        *words, "--console_log_simple", "--validation_split", "0.5", "--learning_rate", "0.03", "--max_train_steps",
        "6", "--save_every_n_steps", "2", "--validate_every_n_steps", "2", "--validate_at_first", "--seed", "11",
    ]  # fmt: skip


def test_a_run_compares_its_checkpoints_by_its_validation_losses(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    """A resumed run gives the same comparison, which the report contains."""
    command = [*arguments, "--log_events", str(tmp_path / "whole.jsonl")]
    uninterrupted = train(command)
    assert uninterrupted.status == 0, uninterrupted.stdout
    events = events_of(tmp_path / "whole.jsonl")
    (choice,) = of_kind(events, "choice")
    losses = {event["step"]: event["loss"] for event in of_kind(events, "validation")}
    candidates = choice["candidates"]
    assert [event["step"] for event in candidates] == [0, 2, 4, 6] and candidates[0]["file"] is None
    assert [event["loss"] for event in candidates] == pytest.approx(
        [losses[event["step"]] for event in candidates], rel=1e-12
    )
    best = min(candidates[1:], key=lambda event: event["loss"])
    assert all(event["difference"] == pytest.approx(event["loss"] - best["loss"], abs=1e-12) for event in candidates)
    suggested = next(event for event in candidates if event["file"] == choice["suggested"])
    assert suggested["step"] <= best["step"] and not suggested["is_worse"]
    assert (choice["step"], choice["num_pictures"]) == (suggested["step"], 8)
    assert f"suggested file: {Path(suggested['file']).name}" in uninterrupted.stdout
    report = read_report(tmp_path / "out" / "mine-report.html")
    assert report.choice == {name: choice[name] for name in choice if name not in ("v", "event", "time")}

    cut = [*arguments, "--save_state", "--max_train_steps", "4"]
    assert train(cut).status == 0
    assert read_report(tmp_path / "out" / "mine-report.html").choice is not None
    state = str(tmp_path / "out" / "mine-step00000004-state")
    resumed = train([*arguments, "--resume", state, "--log_events", str(tmp_path / "resumed.jsonl")])
    assert resumed.status == 0, resumed.stdout
    assert of_kind(events_of(tmp_path / "resumed.jsonl"), "choice")[0]["candidates"] == candidates


def test_checkpoints_without_a_validation_loss_are_mentioned(train: Train, arguments: list[str]) -> None:
    done = train([*arguments, "--validate_every_n_steps", "4", "--max_train_steps", "4"])
    assert "1 of 2 saved files were not measured as they are; python3 tools/choose_checkpoint.py" in done.stdout
    pickled = train([*arguments, "--max_train_steps", "2", "--save_every_n_steps", "1", "--save_model_as", "pt"])
    # A file without a step number does not count as step 0.
    assert "2 of 3 saved files were not measured" in pickled.stdout
    assert "suggested file: " not in done.stdout  # the last file is that of step 4, so one file was measured


def with_early_stopping(arguments: list[str], patience: int, *more: str) -> list[str]:
    """Return arguments with a rate that ruins the adapter after some steps, validated after every step."""
    words = [
        "--learning_rate",
        "0.3",
        "--max_train_steps",
        "40",
        "--validate_every_n_steps",
        "1",
        "--save_every_n_steps",
        "1",
    ]
    return [*arguments, *words, "--early_stop_patience", str(patience), *more]


@pytest.mark.nightly
def test_a_run_that_only_gets_worse_stops_early_and_keeps_its_count_when_resumed(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    events_path = tmp_path / "events.jsonl"
    uninterrupted = train(with_early_stopping(arguments, 2, "--log_events", str(events_path), "--save_state"))
    assert uninterrupted.status == 0, uninterrupted.stdout
    events = events_of(events_path)
    (line,) = re.findall(
        r"the run ends after step (\d+): the last 2 validations were worse than that after step", uninterrupted.stdout
    )
    last = int(line)
    assert last < 40 and of_kind(events, "step")[-1]["step"] == last
    assert (events[-1]["reason"], events[-1]["step"]) == ("finished", last)
    losses = {event["step"]: event["loss"] for event in of_kind(events, "validation")}
    assert all(losses[step] > min(losses.values()) for step in range(last - 1, last + 1))
    assert read_num_steps(tmp_path / "out" / "mine.safetensors") == last
    (choice,) = of_kind(events, "choice")
    assert choice["candidates"][-1]["step"] == last and choice["step"] < last

    state = tmp_path / "out" / f"mine-step{last - 1:08d}-state"  # the count is one
    resumed = train(with_early_stopping(arguments, 2, "--resume", str(state)))
    assert f"the run ends after step {last}: the last 2" in resumed.stdout
    again = train(with_early_stopping(arguments, 2, "--autoresume", "--log_events", str(events_path)))
    assert again.status == 0 and f"the run ends after step {last}: the last 2" in again.stdout
    # No further step was trained.
    assert max(event["step"] for event in of_kind(events_of(events_path), "step")) == last


def is_close(actual: float, expected: float) -> bool:
    """Return True if losses agree up to the order of float32 sums (a saved file against weights in memory)."""
    return actual == pytest.approx(expected, rel=2e-5)


CACHED = ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"]
OTHERS = [pytest.param(name, [], marks=pytest.mark.nightly) for name in BASES if name not in ("sd", "flux")]


@pytest.mark.parametrize(
    ("name", "words"), [("sd", []), pytest.param("flux", CACHED, marks=pytest.mark.nightly), *OTHERS]
)
def test_the_tool_measures_the_same_losses_as_the_run(
    train: Train, tmp_path: Path, name: str, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Every file is measured on the same images and noise, also when the run cached everything."""
    base, out, events_path = BASES[name], tmp_path / "out", tmp_path / "events.jsonl"
    make_images(tmp_path / "data" / "1_thing", 16, seed=len(name))
    arguments = [
        *base.build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt",
        "--resolution", "64", "--output_dir", str(out), "--output_name", "mine", "--network_module", base.module,
        "--network_dim", "4", "--learning_rate", "3e-2", "--max_train_steps", "4", "--save_every_n_steps", "2",
        "--max_data_loader_n_workers", "0", "--validation_split", "0.5", "--log_events", str(events_path), *words,
    ]  # fmt: skip
    run = [*arguments, "--validate_every_n_steps", "2", "--validate_at_first", "--network_dropout", "0.1"]
    assert train([*run, "--seed", "6"], script=base.script).status == 0
    tool = ["--script", f"{base.script}.py", *arguments]  # without --seed, which the files' metadata contains
    assert choose_checkpoint.main(tool) == 0
    first, second = of_kind(events_of(events_path), "choice")
    assert [candidate["step"] for candidate in second["candidates"]] == [0, 2, 4]
    for ours, runs in zip(second["candidates"], first["candidates"], strict=True):
        assert is_close(ours["loss"], runs["loss"]) and ours["file"] == runs["file"]
    printed = capfd.readouterr().out
    assert "mine-step00000002.safetensors" in printed and "suggested file: " in printed
    assert len(re.findall(r"^mine\S* +[24] +\d+\.\d{5} \(.*(yes|no|-)", printed, re.MULTILINE)) == 2
    assert "memorization gap: with" in printed and "than on images that were set aside" in printed
    report = read_report(out / "mine-report.html")
    assert report.choice is not None and report.choice["candidates"] == second["candidates"]


def perturb(path: Path, seed: int) -> None:
    """Add 1 % noise to each weight, which makes the file different but neither better nor worse."""
    generator = torch.Generator().manual_seed(seed)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {
        key: value
        if key.endswith("alpha")
        else value + 0.01 * value.std() * torch.randn(value.shape, generator=generator)
        for key, value in load_file(path).items()
    }
    save_file(tensors, path, metadata)


@pytest.mark.nightly
def test_copies_have_no_winner_and_training_images_give_no_suggestion(
    train: Train, base_arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Measure copies of one file once, then files that differ by noise, then with mirrored images only."""
    make_images(tmp_path / "data" / "1_more", 18, seed=3)
    words = [*base_arguments, "--learning_rate", "0.03"]
    assert train([*words, "--validation_split", "0.34"]).status == 0
    file, events_path = tmp_path / "out" / "mine.safetensors", tmp_path / "events.jsonl"
    copies = [str(tmp_path / f"copy{i}.safetensors") for i in range(3)]
    for copy in copies:
        Path(copy).write_bytes(file.read_bytes())
    tool = ["--script", "train_network.py", "--models", *copies, *words, "--log_events", str(events_path)]
    assert choose_checkpoint.main([*tool, "--validation_split", "0.34"]) == 0
    printed = capfd.readouterr()
    assert "there is one file" in printed.out and printed.err.count("has the same adapter as") == 2
    for seed, copy in enumerate(copies[1:]):
        perturb(Path(copy), seed)
    assert choose_checkpoint.main([*tool, "--validation_split", "0.34"]) == 0
    assert choose_checkpoint.main(tool) == 0
    printed = capfd.readouterr()
    aside, noisy, without = of_kind(events_of(events_path), "choice")
    assert not noisy["has_winner"] and noisy["suggested"] in copies
    assert len({candidate["loss"] for candidate in noisy["candidates"]}) == 4
    assert not aside["has_winner"] and aside["suggested"] == copies[0] and aside["num_pictures"] == 8
    assert without["suggested"] is None and "no file is suggested: no images are held out" in printed.out
    assert "may have been trained on the held-out images" in printed.err
    memories = [candidate["memorised"] for candidate in without["candidates"][1:]]
    assert without["num_pictures"] == 24 and memories[0]["unseen"] == "mirrored"
    assert memories[0]["low"] < memories[0]["more"] < memories[0]["high"]
    assert choose_checkpoint.main([*tool, "--flip_aug"]) == 0
    assert "--flip_aug trained these too" in capfd.readouterr().err
    assert all(
        candidate["memorised"] is None for candidate in of_kind(events_of(events_path), "choice")[-1]["candidates"]
    )


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--script", "nothing.py"], "is not a training script"),
        (["--script", "train_network.py"], "or --output_dir to search for them"),
        (["--script", "train_network.py", "--files", "no.pt"], "no.pt does not exist"),
        (
            ["--script", "train_network.py", "--files", "some.pt"],
            "--seed is not set, and the files record no common seed",
        ),
    ],
)
def test_missing_inputs_are_named(
    words: list[str], wanted: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some.pt").write_bytes(b"x")
    assert choose_checkpoint.main(words) == 1
    assert wanted in capfd.readouterr().err


# Early stopping with two processes, which all stop at the same step as a single process.

WARMED = ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "4"]  # so that the best loss comes early
RUNS = {"patience": ["--learning_rate", "2000", *WARMED, "--early_stop_patience", "2", "--max_train_steps", "9"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Rank]]]:
    """Return the folder and the logs of each run: "<name> 2" with two processes, "<name> 1" with one."""
    folder = tmp_path_factory.mktemp("runs")
    make_images(folder / "data" / "1_thing", 25, seed=71)
    (folder / "model").mkdir()
    words = [
        *BASES["flux"].build(folder / "model"), "--train_data_dir", str(folder / "data"), "--caption_extension",
        ".txt", "--resolution", "64", "--train_batch_size", "2", "--output_name", "mine", "--network_module",
        "networks.lora_flux", "--network_dim", "2", "--optimizer_type", "SGD", "--seed", "8", "--max_grad_norm", "0",
        "--max_data_loader_n_workers", "0", "--save_precision", "float", "--no_report", "--network_train_unet_only",
        "--validation_split", "0.5", "--validate_every_n_steps", "1",
    ]  # fmt: skip
    jobs = []
    for name, more in RUNS.items():
        for count, accumulated in ((2, "1"), (1, "2")):
            run_folder = folder / f"{name} {count}"
            run_folder.mkdir()
            command = [
                *words,
                *more,
                "--gradient_accumulation_steps",
                accumulated,
                "--output_dir",
                str(run_folder / "out"),
            ]
            jobs.append(Job(command, count, str(run_folder), "flux_train_network"))
    results = run_ranks(jobs, folder)
    return folder, {Path(job.folder).name: ranks for job, ranks in zip(jobs, results, strict=True)}


@pytest.mark.nightly
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_stop_at_the_same_step_as_one(name: str, runs: tuple[Path, dict[str, list[Rank]]]) -> None:
    folder, ranks = runs
    for rank in (*ranks[f"{name} 2"], *ranks[f"{name} 1"]):
        assert rank.status == 0, rank.said
    two, single = (early_stopping_lines(ranks[f"{name} {count}"][0].said) for count in (2, 1))
    assert two == single and len(two) == 1
    files = {path.name: path for path in (folder / f"{name} 1" / "out").glob("*.safetensors")}
    assert files.keys() == {path.name for path in (folder / f"{name} 2" / "out").glob("*.safetensors")}
    for file, path in files.items():
        other = folder / f"{name} 2" / "out" / file
        assert read_metadata(path)["ss_steps"] == read_metadata(other)["ss_steps"]
        wanted, ours = load_state_dict(path), load_state_dict(other)
        for key, tensor in wanted.items():
            assert float((ours[key] - tensor).norm()) <= SUMS_OF_A_RUN * float(tensor.norm()), (file, key)


def early_stopping_lines(log: str) -> list[str]:
    """Return the log lines about early stopping."""
    lines = [line.partition("INFO")[2].strip() for line in log.splitlines()]
    return [line for line in lines if "ends after step" in line]


# Votes in a browser on images of a tiny model, and the documented preference training on them.

PROMPTS = "a red circle --w 64 --h 64 --s 1\na blue square --w 64 --h 64 --s 1\na <b>dog --w 64 --h 64 --s 1\n"
# Votes as soon as the images of a page are there, and sends in the end what the pages showed.
PRESS = """
addEventListener("load", async () => {
  const images = [...document.querySelectorAll("img")];
  await Promise.all(images.map((one) => one.decode()));
  const shown = JSON.parse(sessionStorage.shown ?? "[]");
  const [left, right] = images.map((one) => one.getBoundingClientRect());
  const sizes = images.map((one) => one.naturalWidth);
  shown.push([document.querySelector("h1").textContent, sizes, images.length && left.right <= right.left, window.told]);
  sessionStorage.shown = JSON.stringify(shown);
  const key = ["ArrowRight", "ArrowLeft", "ArrowDown", ""][shown.length - 1];
  for (const repeat of [true, false]) dispatchEvent(new KeyboardEvent("keydown", {key, repeat, cancelable: true}));
  if (!key) {
    const form = Object.assign(document.createElement("form"), {method: "post"});
    form.append(Object.assign(document.createElement("input"), {name: "shown", value: sessionStorage.shown}));
    document.body.append(form);
    form.submit();
  }
});
"""


class Browsed(LocalServer):
    """Shows its pages to a browser until that sends what they showed, for ten minutes at most."""

    shown: ClassVar[list[Any]] = []

    def __init__(self, pages: vote.VotingPages, port: int, take: TakeForm) -> None:
        def take_shown(fields: Mapping[str, str]) -> bool:
            if "shown" not in fields:
                return take(fields)
            self.shown[:] = json.loads(fields["shown"])
            super(Browsed, self).shutdown()
            return True

        super().__init__(pages, port, take_shown)

    def shutdown(self) -> None:
        """Go on after the last vote: the page that says so is to send what it shows."""

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        deadline = Timer(600, super().shutdown)
        deadline.start()
        with tempfile.TemporaryDirectory() as profile, opened(self.url, Path(profile)):
            super().serve_forever(poll_interval)
        deadline.cancel()


@in_browser
def test_votes_by_key_become_the_data_of_the_documented_training(
    train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = BASES["sdxl"].build(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(PROMPTS)

    def pressed_page(title: str, script: str, data: Mapping[str, Any]) -> str:
        return with_scripts(build_page(title, script, data), WATCH, PRESS)

    monkeypatch.setattr(vote, "LocalServer", Browsed)
    monkeypatch.setattr(vote, "build_page", pressed_page)
    model = base[base.index("--pretrained_model_name_or_path") + 1]
    assert vote.main(["--base", model, "--prompts", "prompts.txt", "--output", "pictures"]) == 0

    texts = ["a red circle", "a blue square", "a <b>dog"]
    assert Browsed.shown == [*([text, [64, 64], True, []] for text in texts), ["All pairs are voted", [], 0, []]]
    assert sorted(path.name for path in Path("pictures/preferred").iterdir()) == [
        "01_1.png",
        "01_1.txt",
        "03_1.png",
        "03_1.txt",
    ]
    assert [path.name for path in Path("pictures/skipped").iterdir()] == ["05_1.png"]
    assert Path("pictures/preferred/03_1.txt").read_text() == "a blue square"
    for voted, drawn in {
        "preferred/01_1": "02_2",
        "rejected/01_1": "01_1",
        "preferred/03_1": "03_1",
        "rejected/03_1": "04_2",
    }.items():
        images = (Image.open(f"pictures/{name}.png") for name in (voted, f"candidates/{drawn}"))
        one, other = map(np.asarray, images)
        assert np.array_equal(one, other)

    example = (ROOT / "configs/examples/preferences.toml").read_text()
    Path("data.toml").write_text(example.replace("resolution = 1024", "resolution = 64\nmin_bucket_reso = 64"))
    command = next(line for line in commands_of(ROOT / "docs/preferences.md") if "sdxl_train_network.py" in line)
    words = shlex.split(command)[2:]
    changes = {
        "--dataset_config": ["data.toml"],
        "--pretrained_model_name_or_path": [model],
        "--max_train_steps": ["2"],
    }
    for flag, values in changes.items():
        at = words.index(flag)
        words[at + 1 : at + 2] = values
    words[words.index("--mixed_precision") + 1] = "no"
    done = train(words, script="sdxl_train_network").ok()
    assert "one partner in pictures/rejected for each image" in done.stderr
    assert done.losses[0] == 0.693 and Path("output/preferred/preferred.safetensors").is_file()

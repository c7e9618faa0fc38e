"""The saved file that a run suggests, and what tools/choose_checkpoint.py measures of the same files."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.training.report_page.writer import read_report
from library.training.saving.saved_files import read_num_steps
from tests.running import Finished, make_images
from tests.runs.bases import BASES
from tests.runs.test_events import events_of, of_kind
from tools import choose_checkpoint

Train = Callable[..., Finished]


@pytest.fixture
def arguments(base_arguments: list[str], tmp_path: Path) -> list[str]:
    """Eight of sixteen images are set aside; six steps with a rate that overshoots, saved after every second one."""
    words = [word for word in base_arguments if word != "--no_report"]
    make_images(tmp_path / "data" / "1_more", 10, seed=3)
    return [
        *words, "--console_log_simple", "--validation_split", "0.5", "--learning_rate", "0.03", "--max_train_steps",
        "6", "--save_every_n_steps", "2", "--validate_every_n_steps", "2", "--validate_at_first", "--seed", "11",
    ]  # fmt: skip


def test_a_run_compares_its_files_from_the_validations_it_made(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    """Resumed in the middle it says the same, and the report has it."""
    told = [*arguments, "--log_events", str(tmp_path / "whole.jsonl")]
    whole = train(told)
    assert whole.status == 0, whole.stdout
    events = events_of(tmp_path / "whole.jsonl")
    (choice,) = of_kind(events, "choice")
    losses = {one["step"]: one["loss"] for one in of_kind(events, "validation")}
    found = choice["candidates"]
    assert [one["step"] for one in found] == [0, 2, 4, 6] and found[0]["file"] is None
    assert [one["loss"] for one in found] == pytest.approx([losses[one["step"]] for one in found], rel=1e-12)
    best = min(found[1:], key=lambda one: one["loss"])
    assert all(one["difference"] == pytest.approx(one["loss"] - best["loss"], abs=1e-12) for one in found)
    suggested = next(one for one in found if one["file"] == choice["suggested"])
    assert suggested["step"] <= best["step"] and not suggested["is_worse"]
    assert (choice["step"], choice["num_pictures"]) == (suggested["step"], 8)
    assert f"suggested file: {Path(suggested['file']).name}" in whole.stdout
    report = read_report(tmp_path / "out" / "mine-report.html")
    assert report.choice == {name: choice[name] for name in choice if name not in ("v", "event", "time")}

    cut = [*arguments, "--save_state", "--max_train_steps", "4"]
    assert train(cut).status == 0
    assert read_report(tmp_path / "out" / "mine-report.html").choice is not None
    state = str(tmp_path / "out" / "mine-step00000004-state")
    resumed = train([*arguments, "--resume", state, "--log_events", str(tmp_path / "resumed.jsonl")])
    assert resumed.status == 0, resumed.stdout
    assert of_kind(events_of(tmp_path / "resumed.jsonl"), "choice")[0]["candidates"] == found


def test_files_that_were_not_measured_are_told_of(train: Train, arguments: list[str]) -> None:
    done = train([*arguments, "--validate_every_n_steps", "4", "--max_train_steps", "4"])
    assert "1 of 2 saved files were not measured as they are; python3 tools/choose_checkpoint.py" in done.stdout
    pickled = train([*arguments, "--max_train_steps", "2", "--save_every_n_steps", "1", "--save_model_as", "pt"])
    assert "2 of 3 saved files were not measured" in pickled.stdout  # one says no step and is not taken for the start
    assert "suggested file: " not in done.stdout  # the last file is that of step 4: one was measured


def early(arguments: list[str], patience: int, *more: str) -> list[str]:
    """A rate that ruins the adapter after some steps, measured after every step."""
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
def test_a_run_that_only_gets_worse_ends_early_and_goes_on_counting_when_resumed(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    told = tmp_path / "events.jsonl"
    whole = train(early(arguments, 2, "--log_events", str(told), "--save_state"))
    assert whole.status == 0, whole.stdout
    events = events_of(told)
    (line,) = re.findall(
        r"the run ends after step (\d+): the last 2 validations were worse than that after step", whole.stdout
    )
    last = int(line)
    assert last < 40 and of_kind(events, "step")[-1]["step"] == last
    assert (events[-1]["reason"], events[-1]["step"]) == ("finished", last)
    losses = {one["step"]: one["loss"] for one in of_kind(events, "validation")}
    assert all(losses[step] > min(losses.values()) for step in range(last - 1, last + 1))
    assert read_num_steps(tmp_path / "out" / "mine.safetensors") == last
    (choice,) = of_kind(events, "choice")
    assert choice["candidates"][-1]["step"] == last and choice["step"] < last

    state = tmp_path / "out" / f"mine-step{last - 1:08d}-state"  # the count stands at one
    resumed = train(early(arguments, 2, "--resume", str(state)))
    assert f"the run ends after step {last}: the last 2" in resumed.stdout
    again = train(early(arguments, 2, "--autoresume", "--log_events", str(told)))
    assert again.status == 0 and f"the run ends after step {last}: the last 2" in again.stdout
    assert max(one["step"] for one in of_kind(events_of(told), "step")) == last  # nothing was trained any more


def same(found: float, expected: float) -> bool:
    """A saved file against the weights in memory: float32 sums in another order."""
    return found == pytest.approx(expected, rel=2e-5)


CACHED = ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"]
OTHERS = [pytest.param(name, [], marks=pytest.mark.nightly) for name in BASES if name not in ("sd", "flux")]


@pytest.mark.parametrize(("name", "words"), [("sd", []), ("flux", CACHED), *OTHERS])
def test_the_tool_measures_what_the_run_measured(
    train: Train, tmp_path: Path, name: str, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Every file on the same images with the same noise, also where the run cached everything."""
    base, out, told = BASES[name], tmp_path / "out", tmp_path / "events.jsonl"
    make_images(tmp_path / "data" / "1_thing", 16, seed=len(name))
    arguments = [
        *base.build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt",
        "--resolution", "64", "--output_dir", str(out), "--output_name", "mine", "--network_module", base.module,
        "--network_dim", "4", "--learning_rate", "3e-2", "--max_train_steps", "4", "--save_every_n_steps", "2",
        "--max_data_loader_n_workers", "0", "--validation_split", "0.5", "--log_events", str(told), *words,
    ]  # fmt: skip
    run = [*arguments, "--validate_every_n_steps", "2", "--validate_at_first", "--network_dropout", "0.1"]
    assert train([*run, "--seed", "6"], script=base.script).status == 0
    tool = ["--script", f"{base.script}.py", *arguments]  # without --seed: the files tell it
    assert choose_checkpoint.main(tool) == 0
    first, second = of_kind(events_of(told), "choice")
    assert [one["step"] for one in second["candidates"]] == [0, 2, 4]
    for ours, runs in zip(second["candidates"], first["candidates"], strict=True):
        assert same(ours["loss"], runs["loss"]) and ours["file"] == runs["file"]
    printed = capfd.readouterr().out
    assert "mine-step00000002.safetensors" in printed and "suggested file: " in printed
    assert len(re.findall(r"^mine\S* +[24] +\d+\.\d{5} \(.*(yes|no|-)", printed, re.MULTILINE)) == 2
    assert "memorization gap: with" in printed and "than on images that were set aside" in printed
    report = read_report(out / "mine-report.html")
    assert report.choice is not None and report.choice["candidates"] == second["candidates"]


def perturb(path: Path, seed: int) -> None:
    """Add noise of a hundredth of each weight's size: the file differs, and is neither better nor worse for it."""
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
def test_copies_name_no_winner_and_trained_images_choose_nothing(
    train: Train, base_arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Copies of one file are measured once. Files that differ by noise follow, then mirror images alone."""
    make_images(tmp_path / "data" / "1_more", 18, seed=3)
    words = [*base_arguments, "--learning_rate", "0.03"]
    assert train([*words, "--validation_split", "0.34"]).status == 0
    file, told = tmp_path / "out" / "mine.safetensors", tmp_path / "events.jsonl"
    copies = [str(tmp_path / f"copy{i}.safetensors") for i in range(3)]
    for copy in copies:
        Path(copy).write_bytes(file.read_bytes())
    tool = ["--script", "train_network.py", "--models", *copies, *words, "--log_events", str(told)]
    assert choose_checkpoint.main([*tool, "--validation_split", "0.34"]) == 0
    printed = capfd.readouterr()
    assert "there is one file" in printed.out and printed.err.count("has the same adapter as") == 2
    for seed, copy in enumerate(copies[1:]):
        perturb(Path(copy), seed)
    assert choose_checkpoint.main([*tool, "--validation_split", "0.34"]) == 0
    assert choose_checkpoint.main(tool) == 0
    printed = capfd.readouterr()
    aside, noisy, without = of_kind(events_of(told), "choice")
    assert not noisy["has_winner"] and noisy["suggested"] in copies
    assert len({one["loss"] for one in noisy["candidates"]}) == 4
    assert not aside["has_winner"] and aside["suggested"] == copies[0] and aside["num_pictures"] == 8
    assert without["suggested"] is None and "no file is suggested: no image is set aside" in printed.out
    assert "may have been trained on the held-out images" in printed.err
    memories = [one["memorised"] for one in without["candidates"][1:]]
    assert without["num_pictures"] == 24 and memories[0]["unseen"] == "mirrored"
    assert memories[0]["low"] < memories[0]["more"] < memories[0]["high"]
    assert choose_checkpoint.main([*tool, "--flip_aug"]) == 0
    assert "--flip_aug trained these too" in capfd.readouterr().err
    assert all(one["memorised"] is None for one in of_kind(events_of(told), "choice")[-1]["candidates"])


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
def test_what_is_missing_is_said(
    words: list[str], wanted: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some.pt").write_bytes(b"x")
    assert choose_checkpoint.main(words) == 1
    assert wanted in capfd.readouterr().err

"""--log_events of complete runs, validated with docs/events.schema.json."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.running import ROOT, Finished

Train = Callable[..., Finished]
SCHEMA = json.loads((ROOT / "docs" / "events.schema.json").read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)


def events_of(path: Path) -> list[dict[str, Any]]:
    """Return the events of a file after validating each with the schema."""
    text = path.read_text(encoding="ascii")
    assert text.endswith("\n")
    events = [json.loads(line) for line in text.splitlines()]
    for event in events:
        VALIDATOR.validate(event)
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    return events


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def test_a_run_logs_an_event_for_everything_that_happens(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    """Run with validation, previews, saved and rotated files, caching, a damaged image, and a warning."""
    (tmp_path / "prompts.txt").write_text("a red cat --w 64 --h 128 --s 2 --d 3\n")
    (tmp_path / "data" / "2_thing" / "broken.png").write_bytes(b"no image")
    file = tmp_path / "new" / "events.jsonl"
    done = train(
        [
            *base_arguments, "--log_events", str(file), "--validation_split", "0.34", "--max_train_steps", "12",
            "--validate_every_n_steps", "4", "--validate_at_first", "--sample_prompts", str(tmp_path / "prompts.txt"),
            "--sample_every_n_steps", "12", "--save_every_n_steps", "4", "--save_last_n_steps", "6", "--cache_latents",
            "--huggingface_token", "hf_secret", "--log_prefix", "idle", "--network_args", "loraplus_lr_ratio=4",
            "--keep_best_checkpoint", "--save_state_on_train_end",
        ]
    )  # fmt: skip
    assert done.status == 0, done.stderr
    events = events_of(file)
    elsewhere = {"finding", "forgetting", "strengths", "scores"}  # of audits, probes, --am, --score_previews
    assert set(Counter(event["event"] for event in events)) == {*SCHEMA["properties"]["event"]["enum"]} - elsewhere
    assert "hf_secret" not in file.read_text()

    start = events[0]
    assert start["event"] == "start" and start["options"]["max_train_steps"] == 12 and "torch" in start["versions"]
    assert start["command"][start["command"].index("--huggingface_token") + 1] == "***"
    assert "huggingface_token" not in start["options"] and "v_parameterization" not in start["options"]

    (audit,) = of_kind(events, "audit")
    (dataset,) = audit["datasets"]
    assert dataset["buckets"] == [{"width": 64, "height": 64, "num_draws": 8, "num_batches": 4}]
    assert audit["num_dropped"] == 1 and audit["dropped"][0]["file"].endswith("broken.png")
    assert sum(count for _, count in audit["caption_lengths"]["counts"]) == 4
    assert audit["caption_lengths"]["unit"] == "tokens" and audit["caption_lengths"]["most"] == 75
    assert sum(count for _, count in audit["tags"]) == 16

    stages = [(stage["name"], stage["state"]) for stage in of_kind(events, "stage")]
    for name in ("loading", "caching latents", "training", "validation steps", "previews"):
        assert stages.index((name, "begin")) < stages.index((name, "end"))
    caching = [stage for stage in of_kind(events, "stage") if stage["name"] == "caching latents"]
    assert caching[-1]["done"] == caching[-1]["total"] == 6

    steps = of_kind(events, "step")
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert [bool(step["norms"]) for step in steps] == [step in (1, 11) for step in range(1, 13)]
    shown = [float(f"{step['average']:.3g}") for step in steps]
    assert shown == [pytest.approx(loss, rel=1e-6) for loss in done.losses]
    for measured in (steps[0], steps[10]):
        squares = [norms["gradient"] ** 2 for norms in measured["norms"].values()]
        assert len(squares) == 4  # up and down matrices of both models
        assert sum(squares) ** 0.5 == pytest.approx(measured["gradient_norm"], rel=1e-5)
    assert steps[0]["timing"] is None and steps[5]["timing"]["step"] == 5

    validations = of_kind(events, "validation")
    assert [stage["step"] for stage in validations] == [0, 4, 8, 12]
    assert validations[0]["compared"] is None and validations[1]["compared"]["to_step"] == 0
    levels = [level["loss"] for level in validations[2]["levels"]]
    assert sum(levels) / len(levels) == pytest.approx(validations[2]["loss"], rel=1e-9)

    (preview,) = of_kind(events, "preview")
    assert preview["prompt"] == "a red cat" and (preview["width"], preview["height"], preview["seed"]) == (64, 128, 3)
    saved, removed = of_kind(events, "saved"), of_kind(events, "removed")
    last = {Path(stage["file"]).name: stage for stage in saved if stage["kind"] == "weights"}
    assert {name: stage["reason"] for name, stage in last.items()} == {
        "mine-step00000004.safetensors": "step",
        "mine-step00000008.safetensors": "step",
        "mine.safetensors": "end",
        "mine-step00000012.safetensors": "step",
        "mine-best.safetensors": "best",
    }
    assert last["mine.safetensors"]["num_bytes"] == (tmp_path / "out" / "mine.safetensors").stat().st_size
    assert [Path(stage["file"]).name for stage in removed] == ["mine-step00000004.safetensors"]
    assert [Path(stage["file"]).name for stage in saved if stage["kind"] == "state"] == ["mine-state"]

    assert any("--log_prefix has no effect" in stage["text"] for stage in of_kind(events, "warning"))
    end = events[-1]
    assert (end["event"], end["reason"], end["step"], end["error"]) == ("end", "finished", 12, None)
    assert end["file"].endswith("mine.safetensors") and "a step took" in end["summary"]


def test_events_do_not_change_training_and_a_resumed_run_appends_to_the_file(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "events.jsonl"
    arguments = [*base_arguments, "--network_dropout", "0.2", "--mixed_precision", "bf16"]
    command = [*arguments, "--log_events", str(file), "--autoresume"]
    assert train([*arguments, "--output_name", "silent"]).status == 0
    file.write_text("")
    assert train([*command, "--save_every_n_steps", "2", "--save_state", "--lr_scheduler", "constant"]).status == 0
    out = tmp_path / "out"
    from safetensors.torch import load_file

    silent, logged = load_file(out / "silent.safetensors"), load_file(out / "mine.safetensors")
    assert all(tensor.equal(logged[key]) for key, tensor in silent.items())

    with file.open("a") as half:
        half.write('{"v":1,"event":"st')  # as a killed process may leave it
    assert train([*command, "--max_train_steps", "6"]).status == 0
    events = events_of(file)
    plans = of_kind(events, "plan")
    assert [event["first_step"] for event in plans] == [0, 4] and plans[1]["resumed_from"].endswith("mine-state")
    assert [event["step"] for event in of_kind(events, "step")] == [1, 2, 3, 4, 5, 6]
    assert train([*command, "--max_train_steps", "6"]).status == 0
    assert [event["reason"] for event in of_kind(events_of(file), "end")] == [
        "finished",
        "finished",
        "already complete",
    ]


def test_standard_output_contains_only_events(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    done = train([*base_arguments, "--log_events", "-"])
    assert done.status == 0, done.stderr
    for line in done.stdout.splitlines():
        VALIDATOR.validate(json.loads(line))
    assert "training: 12 images" in done.stderr


def test_an_error_is_an_event_and_a_dry_run_writes_none(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"v":1,"event":"of an earlier run"}\n')  # a fresh run truncates it
    missing = [*base_arguments, "--log_events", str(file), "--network_args", "conv_dim=four"]
    assert train(missing).status == 1
    end = events_of(file)[-1]
    assert (end["reason"], end["step"]) == ("error", None) and "conv_dim" in end["error"]
    file.unlink()
    done = train([*base_arguments, "--log_events", str(file), "--dry_run"])
    assert done.status == 0 and not file.exists()
    assert "--log_events has no effect with --dry_run" in done.stderr


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--log_events", "-", "--console_log_simple"], "both write to standard output"),
        (["--log_events", "{tmp}/data"], "is a folder"),
        (["--log_events", "{tmp}/data/2_thing/00.png"], "is a PNG image, not an event log"),
    ],
)
def test_an_unwritable_event_path_is_rejected(
    train: Train, base_arguments: list[str], tmp_path: Path, given: list[str], wanted: str
) -> None:
    done = train([*base_arguments, *(word.format(tmp=tmp_path) for word in given)])
    assert done.status == 1 and "--log_events" in done.stderr + done.stdout and wanted in done.stderr + done.stdout

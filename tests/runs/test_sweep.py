"""Adapters trained together over one base model equal those trained separately."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.checkpoints.files import load_state_dict, read_metadata
from library.options.machine.memory import PrecisionOptions
from library.training.loop import loop, stacked_step
from library.training.report_page.page import read_data
from library.training.report_page.writer import read_report
from library.training.run import optimization
from tests.running import Finished, make_images
from tests.tiny.bases import BASES
from tests.tolerances import SUMS_OF_A_RUN

Train = Callable[..., Finished]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Return arguments for three steps of FLUX.1 and its text encoder with SGD, whose steps scale with gradients."""
    make_images(tmp_path / "data" / "1_thing", 5, seed=71)
    return [
        *BASES["flux"].build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--caption_extension",
        ".txt", "--resolution", "64", "--train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--output_name",
        "mine", "--network_module", "networks.lora_flux", "--network_alpha", "2", "--learning_rate", "0.5",
        "--optimizer_type", "SGD", "--seed", "8", "--max_data_loader_n_workers", "0", "--max_train_steps", "3",
        "--save_precision", "float", "--no_report", "--max_grad_norm", "0.2",
    ]  # fmt: skip


def assert_same_files(one: Path, other: Path) -> None:
    """Assert that files agree up to the rounding of sums over more rows and that something was learned."""
    actual, wanted = load_state_dict(one), load_state_dict(other)
    assert actual.keys() == wanted.keys()
    for key, tensor in wanted.items():
        off = (actual[key] - tensor).norm() / tensor.norm().clamp(min=1e-30)
        assert off < SUMS_OF_A_RUN, (key, float(off))
    assert max(float(tensor.abs().max()) for key, tensor in wanted.items() if "lora_up" in key) > 1e-3


def test_every_combination_equals_its_separate_run(train: Train, words: list[str], tmp_path: Path) -> None:
    """Combine ranks, rates, dropout and seeds; a swept seed changes only the adapter, not the batches."""
    combined = ["--sweep", "network_dim=2,3", "learning_rate=0.5,1", "network_dropout=0.2,0"]
    done = train([*words, *combined], "flux_train_network")
    assert done.status == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert names == {
        f"mine-dim{dim}-lr{lr}-dropout{drop}.safetensors"
        for dim in "23"
        for lr in ("0.5", "1")
        for drop in ("0.2", "0")
    }
    for dim, alpha, rate, drop in (("2", "2", "0.5", "0.2"), ("3", "3", "1", "0")):  # alpha / rank stays constant
        adapter_options = [
            "--network_dim",
            dim,
            "--network_alpha",
            alpha,
            "--learning_rate",
            rate,
            "--network_dropout",
            drop,
        ]
        adapter_options += ["--output_name", "alone"]
        assert train([*words, *adapter_options], "flux_train_network").status == 0
        name = f"mine-dim{dim}-lr{rate}-dropout{drop}.safetensors"
        assert_same_files(tmp_path / "out" / name, tmp_path / "out" / "alone.safetensors")


MEASURED = ["--validation_split", "0.5", "--validate_every_n_steps", "2", "--network_train_unet_only"]


@pytest.mark.nightly
def test_a_resumed_sweep_equals_the_uninterrupted_one(train: Train, words: list[str], tmp_path: Path) -> None:
    """With dropout, averages and a seed per adapter, resume from the last step for which all have a state."""
    more = [
        *MEASURED, "--sweep", "network_dim=2,3", "seed=4,5", "--network_dropout", "0.2", "--optimizer_type", "AdamW",
        "--learning_rate", "1e-3", "--ema_decay", "0.5", "--gradient_accumulation_steps", "2", "--save_state",
        "--save_every_n_steps", "1", "--max_train_steps", "4", "--lr_scheduler", "cosine",
    ]  # fmt: skip
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    assert train([*words, *more, "--output_dir", str(whole)], "flux_train_network").status == 0
    rest.mkdir()
    for folder in whole.glob("*-state"):  # one of them is a step ahead
        step = folder.name.removesuffix("-state").rpartition("-")[2]
        if step in ("step00000001", "step00000002") or folder.name == "mine-dim3-seed5-step00000003-state":
            shutil.copytree(folder, rest / folder.name)
    done = train([*words, *more, "--output_dir", str(rest), "--autoresume"], "flux_train_network")
    assert done.status == 0, done.stderr
    assert done.stderr.count("at step 2 of 4") == 4 and "uninterrupted" not in done.stderr
    names = {path.name for path in whole.glob("*.safetensors") if "step" not in path.name}
    assert len(names) == 4
    for name in names:
        expected, other = load_state_dict(whole / name), load_state_dict(rest / name)
        assert all(torch.equal(expected[key], other[key]) for key in expected)
    validation_lines = [
        line.partition("INFO")[2] for line in done.stderr.splitlines() if "validation after step 4" in line
    ]
    assert len(validation_lines) == 4
    named = train(
        [*words, *more, "--output_dir", str(rest), "--resume", str(whole / "last-state")], "flux_train_network"
    )
    assert named.status == 1 and "is no state of an adapter of --sweep" in named.stderr


def test_an_adapter_whose_losses_are_not_finite_ends_alone(train: Train, words: list[str], tmp_path: Path) -> None:
    more = ["--sweep", "learning_rate=0.5,1e38", "--max_grad_norm", "0", "--on_nonfinite", "stop", *MEASURED]
    done = train([*words, *more], "flux_train_network")
    assert done.status == 0, done.stderr
    assert "lr1e38: step 2" in done.stderr and "The other adapters go on" in done.stderr
    alone = [*words, *more[2:], "--network_train_unet_only", "--output_name", "alone"]
    assert train(alone, "flux_train_network").status == 0
    assert_same_files(tmp_path / "out" / "mine-lr0.5.safetensors", tmp_path / "out" / "alone.safetensors")
    assert not (tmp_path / "out" / "mine-lr1e38.safetensors").exists()


def test_damaged_weights_that_are_to_be_saved_end_one_adapter(train: Train, words: list[str], tmp_path: Path) -> None:
    """AdamW's first step at this rate is infinite, and the file of that step is due before another loss is known."""
    more = ["--optimizer_type", "AdamW", "--save_every_n_steps", "1", "--max_train_steps", "2", *MEASURED[-1:]]
    done = train([*words, *more, "--sweep", "learning_rate=1e38,1e-3"], "flux_train_network")
    assert done.status == 0, done.stderr
    assert "lr1e38: the adapter has weights that are NaN or infinite after step 1" in done.stderr
    assert done.stderr.count("Nothing is saved now") == 1
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"mine-lr1e-3{end}.safetensors" for end in ("-step00000001", "-step00000002", "")]
    done = train([*words, *more, "--sweep", "learning_rate=1e38,2e38"], "flux_train_network")
    assert done.status == 1 and done.stderr.count("The other adapters go on") == 1


def test_a_file_that_is_saved_elsewhere_costs_no_other_adapter(
    train: Train, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked, plain = tmp_path / "out" / "mine-lr0.5.safetensors", os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == blocked:
            raise PermissionError(1, "Operation not permitted")
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    more = ["--sweep", "learning_rate=0.5,1", "--max_train_steps", "1", *MEASURED[-1:]]
    done = train([*words, *more], "flux_train_network")
    assert done.status == 1 and f"training is complete, but {blocked} could not be written" in done.stderr
    assert (tmp_path / "out" / "mine-lr0.5-rescued.safetensors").exists()
    assert (tmp_path / "out" / "mine-lr1.safetensors").exists()


def test_each_adapter_has_its_own_loss_scale(
    train: Train, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One adapter starts with a loss scale at which its gradients overflow and skips steps until the scale is small
    enough, while the other trains. In float32, because fp16 needs a GPU."""
    scales = {"0.5": 2.0**127, "1": 8.0}
    scalers: list[torch.amp.GradScaler] = []

    def make(options: PrecisionOptions, device: torch.device) -> torch.amp.GradScaler:
        scale = [*scales.values()][len(scalers) % len(scales)]  # both of the sweep, then the separate runs
        scalers.append(torch.amp.GradScaler("cpu", init_scale=scale))
        return scalers[-1]

    one_loss, losses = loop.loss_of, stacked_step.compute_stacked_losses
    monkeypatch.setattr(optimization, "gradient_scaler", make)
    # Overflows float32 at 2^127.
    monkeypatch.setattr(loop, "loss_of", lambda *loss_arguments: 64 * one_loss(*loss_arguments))
    monkeypatch.setattr(
        stacked_step, "compute_stacked_losses", lambda *loss_arguments: [64 * loss for loss in losses(*loss_arguments)]
    )
    more = ["--max_train_steps", "14", "--network_train_unet_only", "--network_dim", "2"]
    done = train([*words, *more, "--sweep", "learning_rate=0.5,1"], "flux_train_network")
    assert done.status == 0, done.stderr
    actual = [scaler.get_scale() for scaler in scalers]
    assert 2.0**115 < actual[0] < 2.0**127 and actual[1] == 8.0
    for rate in scales:
        alone = ["--learning_rate", rate, "--output_name", "alone"]
        assert train([*words, *more, *alone], "flux_train_network").status == 0
        assert scalers[-1].get_scale() == actual[list(scales).index(rate)]
        assert_same_files(tmp_path / "out" / f"mine-lr{rate}.safetensors", tmp_path / "out" / "alone.safetensors")


def test_worse_adapters_stop_early_and_all_are_ranked(train: Train, words: list[str], tmp_path: Path) -> None:
    """A learning rate that is far too high soon gives NaN losses."""
    make_images(tmp_path / "data" / "1_more", 20, seed=72)
    more = [
        *MEASURED, "--validate_every_n_steps", "1", "--sweep", "learning_rate=1e-3,1e6", "--sweep_stop_after", "2",
        "--max_grad_norm", "0", "--log_events", str(tmp_path / "events.jsonl"),
    ]  # fmt: skip
    done = train([word for word in [*words, *more] if word != "--no_report"], "flux_train_network")
    assert done.status == 0, done.stderr
    assert "lr1e6: ends after step 2: another one was significantly better" in done.stderr
    assert read_metadata(tmp_path / "out" / "mine-lr1e6.safetensors")["ss_steps"] == "2"
    page = read_data((tmp_path / "out" / "mine-sweep.html").read_text(encoding="utf-8"))
    rows = {row["label"]: row for row in page["rows"]}
    assert [row["label"] for row in page["rows"]][-1] == "lr1e6" and rows["lr1e6"]["compared"]["is_worse"]
    assert [run["label"] for run in page["runs"]] == list(page["chosen"]) == ["lr1e-3", "lr1e6"]
    assert page["reports"]["lr1e6"] == "mine-lr1e6-report.html"
    assert page["num_pictures"] == 12 and rows["lr1e-3"]["step"] == 3 and rows["lr1e6"]["step"] == 2
    for label in rows:
        lines = [json.loads(line) for line in (tmp_path / f"events-{label}.jsonl").read_text().splitlines()]
        assert (lines[0]["event"], lines[-1]["event"], lines[-1]["reason"]) == ("start", "end", "finished")
        assert len([line for line in lines if line["event"] == "step"]) == rows[label]["step"]
        assert read_report(tmp_path / "out" / f"mine-{label}-report.html").plan is not None

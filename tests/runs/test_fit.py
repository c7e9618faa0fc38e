"""--fit configures the run as the planner chose and reports the choice."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors import safe_open

from library.commands.counted_plan import count
from library.memory.planner.gpus import TYPICAL
from library.memory.planner.prediction import MemoryMode, predict
from library.training.planning import correction, counting
from library.training.planning.correction import Gauge
from tests.running import Finished, make_images
from tests.tiny.bases import BASES

Train = Callable[..., Finished]
MIB = 2**20


def flux_arguments(tmp_path: Path, *more: str) -> list[str]:
    base = BASES["flux"]
    make_images(tmp_path / "data" / "1_thing", 4, side=256)
    return [
        *base.build(tmp_path / "model"), "--network_module", base.module, "--network_dim", "4", "--train_data_dir",
        str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "256", "--output_dir",
        str(tmp_path / "out"), "--output_name", "mine", "--max_train_steps", "3", "--learning_rate", "1e-3", "--seed",
        "6", "--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only",
        "--max_data_loader_n_workers", "0", *more,
    ]  # fmt: skip


def budget_between(arguments: Sequence[str], more: MemoryMode, less: MemoryMode, spare: int = 512) -> str:
    """Return a budget that the first configuration exceeds and the second fits into, with `spare` MB left free."""
    _, counted = count("flux_train_network", arguments)
    needs = [predict(counted.step, mode, TYPICAL[0]).device_bytes for mode in (more, less)]
    assert needs[0] > needs[1]
    return f"{sum(needs) / 2 / MIB + spare:.3f}MB"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.nightly
def test_with_a_large_budget_activations_are_kept(train: Train, tmp_path: Path) -> None:
    command = ["--log_events", str(tmp_path / "events.jsonl"), "--no_report"]
    done = train(flux_arguments(tmp_path, "--fit", "12GB", *command), script="flux_train_network").ok()
    assert "11.2 GiB free of 12 GB (counted as this processor" in done.stderr
    assert "selected: ->. To pin this choice, add: --vae_batch_size 8 --text_encoder_batch_size 8" in done.stderr
    assert metadata_of(tmp_path / "out" / "mine.safetensors")["ss_gradient_checkpointing"] == "False"
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (planned,) = (line["planned"] for line in lines if line["event"] == "plan")
    assert 0 < planned["tensor_bytes"] < planned["card_bytes"] < 12 * 1024 * MIB and planned["seconds"] > 0


@pytest.mark.nightly
def test_with_a_small_budget_activations_are_recomputed(train: Train, tmp_path: Path) -> None:
    arguments = flux_arguments(tmp_path, "--blocks_to_swap", "0")
    room = budget_between(arguments, MemoryMode(recompute_every=2), MemoryMode(recompute_every=1))
    done = train([*arguments, "--fit", room], script="flux_train_network").ok()
    assert re.search(r"add: --gradient_checkpointing(?! --gradient_checkpointing_every)", done.stderr)
    assert metadata_of(tmp_path / "out" / "mine.safetensors")["ss_gradient_checkpointing"] == "True"


@pytest.mark.nightly
def test_weight_formats_are_chosen_from_the_allowed_ones(train: Train, tmp_path: Path) -> None:
    """A model with two blocks of each kind cannot swap any; 32-bit weights need more memory than 8-bit ones."""
    arguments = flux_arguments(tmp_path)
    room = (
        f"{float(budget_between(arguments, MemoryMode(None, 1, True), MemoryMode('int8', 1, True))[:-2]) - 512:.3f}MB"
    )
    done = train([*arguments, "--fit", room, "--fit_formats", "int8"], script="flux_train_network").ok()
    assert re.search(r"denoiser: \d+ layers in int8", done.stderr)
    refused = train([*arguments, "--fit", room], script="flux_train_network")
    assert refused.status == 1
    assert "nothing fits: the least is 0.7 GiB with --gradient_checkpointing" in refused.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("name", BASES)
def test_every_base_model_can_be_fitted(name: str, train: Train, tmp_path: Path) -> None:
    base = BASES[name]
    make_images(tmp_path / "data" / "1_thing", 2)
    arguments = [
        *base.build(tmp_path / "model"), "--network_module", base.module, "--network_dim", "4", "--train_data_dir",
        str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64", "--output_dir",
        str(tmp_path / "out"), "--max_train_steps", "1", "--fit", "12GB", "--fit_formats", "int8", "--blocks_to_swap",
        "0", "--gradient_checkpointing",
    ]  # fmt: skip
    done = train(arguments, script=base.script).ok()
    assert re.search(r"-> +--base_format int8 --gradient_checkpointing ", done.stderr)
    assert re.search(r"denoiser: \d+ layers in int8", done.stderr)


def test_a_budget_that_is_too_small_ends_the_run_before_loading(train: Train, tmp_path: Path) -> None:
    done = train(flux_arguments(tmp_path, "--fit", "701MB"), script="flux_train_network")
    assert done.status == 1
    assert "--fit 701MB" in done.stderr
    assert re.search(r"nothing fits: the least is .* are frozen weights .* the adapter, its gradients", done.stderr)
    assert "Traceback" not in done.stderr and "caching" not in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("auto", "--fit auto measures the free memory of the GPU, and there is none"),
        ("lots", "'lots' is not a memory size"),
    ],
)
def test_impossible_budgets_are_named(size: str, message: str, train: Train, tmp_path: Path) -> None:
    done = train(flux_arguments(tmp_path, "--fit", size), script="flux_train_network")
    assert done.status == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("factor", "messages"),
    [
        pytest.param(1.02, ("memory of a step:",), marks=pytest.mark.nightly),
        (0.5, ("a step takes 50 % less memory than was planned", "switching to plain")),
        pytest.param(
            3.0,  # within the part of the GPU that a plan leaves free
            ("a step takes 200 % more memory than was planned", "keeping the configuration"),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            3000.0,
            ("more memory than was planned", "makes it fit 1.2 GiB; where memory runs out, start again with smaller"),
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_the_first_steps_are_compared_with_the_plan_which_is_corrected_once(
    factor: float, messages: tuple[str, ...], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flux_arguments(tmp_path, "--blocks_to_swap", "0")
    mode = MemoryMode(recompute_every=1)
    # Both plans are for this machine, where nothing is fused.
    monkeypatch.setattr(counting, "has_fused_kernels", lambda *_: False)
    _, counted = count("flux_train_network", arguments)
    room = budget_between(arguments, MemoryMode(recompute_every=2), mode)
    planned = predict(counted.step, mode, TYPICAL[0]).tensor_bytes
    measured = iter([int(factor * planned)])  # for the second step, the only one that is read
    resets: list[int] = []
    gauge = Gauge(lambda: next(measured), lambda: resets.append(1))
    monkeypatch.setattr(correction, "make_gauge", lambda device: gauge)
    done = train([*arguments, "--fit", room], script="flux_train_network").ok()
    for message in messages:
        assert message in done.stderr
    assert ("than was planned" in done.stderr) == (len(messages) == 2)
    assert done.stderr.count("memory of a step:") == 1

"""Preferences and sliders from image pairs on every base model: training, exact resuming, validation, errors."""

from collections.abc import Callable
from math import log
from pathlib import Path

import pytest
import torch

from library.checkpoints.files import load_state_dict
from library.training.report_page.writer import read_report
from tests.running import Finished, make_images
from tests.runs.test_events import events_of, of_kind
from tests.tiny.bases import BASES
from tools import choose_checkpoint

Run = Callable[..., Finished]

DATASET = """
[general]
resolution = 64
caption_extension = ".txt"
batch_size = 2

[[datasets]]
[[datasets.subsets]]
image_dir = "{folder}/preferred"
opposite_dir = "{folder}/rejected"
"""
HELD_OUT = "validation_split = 0.34\n"
PREFERENCES, SLIDER = ("--preference_loss", "dpo"), ("--pair_slider", "0.7")
FAST = ("sd", "flux")
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.nightly) for name in BASES]


@pytest.fixture
def run(train: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return `run(base, folder, ...)`, which trains three steps on pairs with a base model."""
    make_images(tmp_path / "preferred", 6, seed=4)
    make_images(tmp_path / "rejected", 6, side=96, seed=5)
    write_dataset(tmp_path, HELD_OUT)
    models: dict[str, list[str]] = {}

    def start(name: str, folder: str, *more: str, status: int = 0) -> Finished:
        base = BASES[name]
        if name not in models:
            models[name] = base.build(tmp_path_factory.mktemp("model"))
        words = [
            *models[name], "--dataset_config", str(tmp_path / "data.toml"), "--output_dir", str(tmp_path / folder),
            "--output_name", "mine", "--network_module", base.module, "--network_dim", "4", "--learning_rate", "1e-2",
            "--max_train_steps", "3", "--seed", "5", "--max_data_loader_n_workers", "0", "--cache_latents",
            "--validate_at_first", "--validate_every_n_steps", "1", "--log_events", str(tmp_path / f"{folder}.jsonl"),
            *(() if "text" in folder else ("--network_train_unet_only",)), *more,
        ]  # fmt: skip
        done = train(words, script=base.script)
        assert done.status == status, done.stderr
        return done

    return start


def write_dataset(folder: Path, more: str) -> None:
    (folder / "data.toml").write_text(DATASET.replace("{folder}", folder.as_posix()) + more)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_state_dict(path / "mine.safetensors")


def are_equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_a_preference_run_starts_without_a_preference_and_resumes_bit_for_bit(
    run: Run, name: str, tmp_path: Path
) -> None:
    uninterrupted = run(name, "whole", *PREFERENCES, "--save_state", "--save_every_n_steps", "1")
    state = tmp_path / "whole" / "mine-step00000001-state"
    rest = run(name, "rest", *PREFERENCES, "--resume", str(state), "--gradient_checkpointing")
    assert len(uninterrupted.losses) == 3 and rest.losses == uninterrupted.losses[1:]
    assert are_equal(tmp_path / "whole", tmp_path / "rest")
    assert uninterrupted.losses[0] == 0.693, "the adapter changes nothing yet"

    validations = of_kind(events_of(tmp_path / "whole.jsonl"), "validation")
    assert validations[0]["loss"] == pytest.approx(log(2), rel=1e-6)
    assert validations[0]["preference"]["accuracy"] == 0.5 and abs(validations[0]["preference"]["margin"]) < 1e-6
    assert (
        all(abs(event["preference"]["margin"]) > 1e-3 for event in validations[1:])
        and validations[0]["num_pictures"] == 2
    )
    again = of_kind(events_of(tmp_path / "rest.jsonl"), "validation")
    assert [event["preference"] for event in again] == [event["preference"] for event in validations[2:]]
    report_items = read_report(tmp_path / "whole" / "mine-report.html").validations.items
    assert [item["preference"] for item in report_items] == [event["preference"] for event in validations]
    assert "preferred images ahead in 50.0%, mean margin" in uninterrupted.stderr
    assert (
        f"one partner in {(tmp_path / 'rejected').as_posix()} for each image, resized to the size"
        in uninterrupted.stderr
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_slider_from_pairs_resumes_bit_for_bit(run: Run, name: str, tmp_path: Path) -> None:
    uninterrupted = run(name, "whole", *SLIDER, "--save_state", "--save_every_n_steps", "1")
    state = tmp_path / "whole" / "mine-step00000001-state"
    rest = run(name, "rest", *SLIDER, "--resume", str(state), "--gradient_checkpointing")
    assert len(uninterrupted.losses) == 3 and rest.losses == uninterrupted.losses[1:]
    assert are_equal(tmp_path / "whole", tmp_path / "rest")
    run(name, "other", "--pair_slider", "0.3")
    assert not are_equal(tmp_path / "whole", tmp_path / "other")
    assert all(event["preference"] is None for event in of_kind(events_of(tmp_path / "whole.jsonl"), "validation"))


PROBE = """
[[datasets.subsets]]
image_dir = "{folder}/probe"
control_dirs = ["{folder}/before"]
control_resolution = 96
is_forgetting_probe = true
"""


def test_references_of_a_forgetting_probe_are_not_taken_for_partners(run: Run, tmp_path: Path) -> None:
    """An untrained adapter measures the same loss with pairs as without."""
    for folder, side in (("probe", 64), ("before", 96)):
        make_images(tmp_path / folder, 2, side=side, seed=side)
    write_dataset(tmp_path, PROBE.replace("{folder}", tmp_path.as_posix()))
    run("flux", "pairs", *PREFERENCES, "--max_train_steps", "1")
    text = (tmp_path / "data.toml").read_text()
    (tmp_path / "data.toml").write_text(text.replace(f'opposite_dir = "{tmp_path.as_posix()}/rejected"', ""))
    run("flux", "plain", "--max_train_steps", "1")
    pairs, plain = (of_kind(events_of(tmp_path / f"{name}.jsonl"), "forgetting")[0] for name in ("pairs", "plain"))
    assert pairs["loss"] == plain["loss"]


@pytest.mark.nightly
def test_a_partner_is_not_seen_by_a_text_encoder_that_sees_references(run: Run, tmp_path: Path) -> None:
    """Cached outputs of the text encoder train as those of the caption alone, encoded in every step."""
    for folder, caching in (("plain", ()), ("cached", ("--cache_text_encoder_outputs",))):
        run("qwen_image_21", folder, *PREFERENCES, *caching)
    assert are_equal(tmp_path / "plain", tmp_path / "cached")


def test_text_encoders_train_on_preferences_and_checkpoints_are_compared(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], tiny_sd_folder: Path
) -> None:
    """The reference model uses text encoders without the adapter."""
    done = run("sd", "text", *PREFERENCES, "--save_every_n_steps", "1", "--gradient_accumulation_steps", "2")
    assert done.losses[0] == 0.693  # log 2, rounded as in the progress bar
    assert any(
        key.startswith("lora_te_") and float(tensor.abs().max()) > 0
        for key, tensor in weights(tmp_path / "text").items()
        if "lora_up" in key
    )
    words = [
        "--script", "train_network.py", "--pretrained_model_name_or_path", str(tiny_sd_folder), "--dataset_config",
        str(tmp_path / "data.toml"), "--output_dir", str(tmp_path / "text"), "--output_name", "mine", "--seed", "5",
        "--network_module", "networks.lora", *PREFERENCES,
    ]  # fmt: skip
    assert choose_checkpoint.main(words) == 0
    assert "0.69315" in capfd.readouterr().out, "the base model prefers neither"


@pytest.mark.nightly
@pytest.mark.parametrize("words", [PREFERENCES, SLIDER], ids=["preferences", "slider"])
def test_each_adapter_of_a_sweep_equals_its_separate_run(run: Run, words: tuple[str, str], tmp_path: Path) -> None:
    run("sd", "sweep", *words, "--sweep", "learning_rate=1e-2,2e-2")
    for rate in ("1e-2", "2e-2"):
        run("sd", rate, *words, "--learning_rate", rate)
        separate, other = weights(tmp_path / rate), load_state_dict(tmp_path / "sweep" / f"mine-lr{rate}.safetensors")
        assert separate.keys() == other.keys() and all(torch.equal(separate[key], other[key]) for key in separate)


@pytest.mark.nightly
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("words", [PREFERENCES, SLIDER], ids=["preferences", "slider"])
def test_plan_dry_run_and_selftest_work(run: Run, name: str, words: tuple[str, str]) -> None:
    done = run(name, "fit", *words, "--fit", "8GB", "--max_train_steps", "1")
    assert "matches your options" in done.stderr or "To pin this choice" in done.stderr
    assert "dry run: the largest batch has 2 images" in run(name, "dry", *words, "--dry_run").stderr
    run(name, "self", *words, "--selftest", "--gradient_checkpointing")
    run(name, "uncached", *words, "--max_train_steps", "1", "--sweep", "network_dim=2,4", "--dry_run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preference_loss", "dpo", "--preference_beta", "0"), "--preference_beta is 0.0; use a number above 0"),
        (("--preference_loss", "dpo", "--pair_slider", "1"), "each trains pairs in its own way; leave one of them out"),
        ((), "has opposite_dir, whose pairs are trained with --preference_loss dpo or --pair_slider 1"),
    ],
    ids=["beta", "both", "neither"],
)
def test_invalid_options_are_named_before_loading(run: Run, words: tuple[str, ...], message: str) -> None:
    done = run("sd", "out", *words, status=1)
    assert message in done.stderr and "loading" not in done.stderr

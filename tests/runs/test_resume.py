"""A run that is interrupted anywhere and resumed repeats the uninterrupted run bit for bit."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from library.checkpoints.files import load_state_dict
from tests.running import Finished, make_images

Train = Callable[..., Finished]
NIGHTLY = partial(pytest.param, marks=pytest.mark.nightly)

ALL_RANDOM = [
    "--shuffle_caption", "--caption_dropout_rate", "0.2", "--caption_tag_dropout_rate", "0.2", "--random_crop",
    "--flip_aug", "--color_aug", "--network_dropout", "0.1", "--noise_offset", "0.1", "--multires_noise_iterations",
    "3", "--ip_noise_gamma", "0.1", "--gradient_accumulation_steps", "2", "--token_warmup_step", "4",
    "--network_args", "rank_dropout=0.1", "module_dropout=0.1", "--ema_decay", "0.7", "--ema_update_after_step", "2",
    "--guidance_loss", "2",
]  # fmt: skip


@pytest.fixture
def arguments(base_arguments: list[str], tmp_path: Path) -> list[str]:
    """Return arguments for nine batches per epoch: five steps with two accumulated, the last with a single batch."""
    make_images(tmp_path / "data" / "1_more", 6, seed=1)
    return [*base_arguments, "--max_train_steps", "8"]


def load_saved(folder: Path, name: str = "mine.safetensors") -> dict[str, torch.Tensor]:
    return load_state_dict(folder / name)


def assert_equal_states(one: Path, other: Path) -> None:
    for name in ("network.safetensors", "training.safetensors"):
        first, second = load_state_dict(one / name), load_state_dict(other / name)
        assert first.keys() == second.keys()
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different
    manifest = [json.loads((folder / "train_state.json").read_text()) for folder in (one, other)]
    assert manifest[0]["parts"] == manifest[1]["parts"]
    assert manifest[0]["current_step"] == manifest[1]["current_step"]


def interrupt_and_resume(
    train: Train, arguments: list[str], folder: Path, cuts: list[int], **changes: list[str]
) -> None:
    """Train into `folder/whole`, and with interruptions after every step of `cuts` into `folder/parts`."""
    uninterrupted = train([*arguments, "--save_state_on_train_end", "--output_dir", str(folder / "whole")])
    assert uninterrupted.status == 0, uninterrupted.stderr
    parts = [*arguments, "--save_state", "--save_every_n_steps", "1", "--output_dir", str(folder / "parts")]
    first = train(parts)
    assert first.status == 0, first.stderr
    for number, cut in enumerate(cuts):
        for path in (folder / "parts").iterdir():
            if path.name != f"mine-step{cut:08d}-state":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        resumed = [*parts, "--resume", str(folder / "parts" / f"mine-step{cut:08d}-state")]
        done = train([*resumed, *changes.get(f"after_{number}", [])])
        assert done.status == 0, done.stderr
        assert "uninterrupted" not in done.stderr
        assert uninterrupted.losses[-1] == done.losses[-1]
    assert_equal_states(folder / "whole" / "mine-state", folder / "parts" / "mine-state")
    expected, other = load_saved(folder / "whole"), load_saved(folder / "parts")
    assert all(torch.equal(expected[key], other[key]) for key in expected)
    assert expected.keys() == other.keys()


def test_resuming_is_exact_after_any_step_and_repeatedly_with_all_randomness_on(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    interrupt_and_resume(train, [*arguments, *ALL_RANDOM], tmp_path, cuts=[2, 5, 6])


@pytest.mark.nightly
@pytest.mark.parametrize(
    "extra",
    [
        ["--network_module", "networks.dylora", "--network_args", "unit=2"],
        ["--network_module", "networks.lora_fa"],
        NIGHTLY(["--mixed_precision", "bf16", "--full_bf16"]),
        NIGHTLY(["--network_args", "dora_wd=True", "use_scalar=True", "conv_dim=2", "train_norm=True"]),
        NIGHTLY(["--network_args", "dora_wd=True", "wd_on_output=True", "conv_dim=2"]),
        NIGHTLY(["--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "preset=attn-mlp"]),
        NIGHTLY(["--network_module", "lycoris.kohya", "--network_args", "preset=attn-mlp", "use_scalar=True"]),
        NIGHTLY(["--network_module", "lycoris.kohya", "--network_args", "preset=attn-mlp", "algo=dylora"]),
        NIGHTLY(["--network_args", "ggpo_sigma=0.05", "ggpo_beta=0.05"]),
        NIGHTLY(["--network_train_unet_only", "--cache_latents"]),
        NIGHTLY(["--scale_weight_norms", "0.1"]),
    ],
    ids=lambda words: words[-1],
)
def test_resuming_is_exact_with_every_network_module(
    train: Train, arguments: list[str], tmp_path: Path, extra: list[str]
) -> None:
    interrupt_and_resume(train, [*arguments, *extra], tmp_path, cuts=[3])


@pytest.mark.nightly
def test_the_number_of_loader_workers_may_change_on_resume(train: Train, arguments: list[str], tmp_path: Path) -> None:
    workers = ["--max_data_loader_n_workers", "4"]
    interrupt_and_resume(train, [*arguments, *ALL_RANDOM], tmp_path, cuts=[2, 4], after_0=workers)


def test_no_batch_before_the_resumed_step_is_loaded(
    train: Train, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.data.batches.batches import BatchMaker

    requested: list[tuple[int, ...]] = []
    plain = BatchMaker.draft
    monkeypatch.setattr(BatchMaker, "draft", lambda self, order: requested.append(order.draws) or plain(self, order))
    train([*arguments, "--save_state", "--save_every_n_steps", "5"])
    in_one_go = list(requested)
    requested.clear()
    train([*arguments, "--resume", str(tmp_path / "out" / "mine-step00000005-state")])
    assert requested == in_one_go[5:]


def test_repeating_a_finished_command_with_autoresume_trains_nothing(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    first = train([*arguments, "--max_train_steps", "2", "--autoresume"])
    written = (tmp_path / "out" / "mine.safetensors").stat().st_mtime_ns
    second = train([*arguments, "--max_train_steps", "2", "--autoresume"])
    assert first.status == second.status == 0
    assert "nothing is left to train" in second.stderr and "saving checkpoint" not in second.stdout
    assert (tmp_path / "out" / "mine.safetensors").stat().st_mtime_ns == written


def test_options_changed_on_resume_take_effect_and_are_logged(
    train: Train, arguments: list[str], images: Path, tmp_path: Path
) -> None:
    words = [*arguments, "--max_train_steps", "3", "--lr_scheduler", "linear", "--save_state_on_train_end"]
    assert train(words).status == 0
    edited = images / "2_thing" / "00.png"
    edited.write_bytes((images / "2_thing" / "01.png").read_bytes())
    state = str(tmp_path / "out" / "mine-state")
    more = ["--max_train_steps", "4", "--learning_rate", "4e-3", "--logging_dir", str(tmp_path / "logs")]
    done = train([*words, "--resume", state, *more])
    assert done.status == 0, done.stderr
    assert "--learning_rate was 0.001 in the state and is 0.004, which takes effect from here on" in done.stderr
    assert "--max_train_steps was 3 in the state and is 4: learning rates that depend on the length" in done.stderr
    assert f"1 image changed since the state was saved: {edited}" in done.stderr
    assert [rate for _, rate in points(tmp_path / "logs")["lr/unet"]] == pytest.approx([4e-3 / 4])


def test_charts_continue_with_the_same_steps_and_values(train: Train, arguments: list[str], tmp_path: Path) -> None:
    words = [*arguments, *ALL_RANDOM, "--save_state", "--save_every_n_steps", "3"]
    assert train([*words, "--logging_dir", str(tmp_path / "whole")]).status == 0
    resumed = [*words, "--resume", str(tmp_path / "out" / "mine-step00000003-state")]
    assert train([*resumed, "--logging_dir", str(tmp_path / "rest")]).status == 0
    uninterrupted, rest = points(tmp_path / "whole"), points(tmp_path / "rest")
    assert uninterrupted.keys() == rest.keys() and len(rest["loss/current"]) == 9
    for name in uninterrupted:
        assert rest[name] == uninterrupted[name][-len(rest[name]) :]


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return every chart of a run except its speed as (step, value) pairs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith("speed/")]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_an_interruption_at_the_end_of_an_epoch_still_saves_the_epoch(
    train: Train, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training.failures.interruption import Interruption

    stop_requests = iter([False] * 8 + [True] * 9)
    monkeypatch.setattr(Interruption, "is_requested", property(lambda _: next(stop_requests)))
    done = train([*arguments, "--max_train_steps", "18", "--save_every_n_epochs", "1"])
    assert done.status == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"mine-000001.safetensors", "mine-step00000009.safetensors", "mine-step00000009-state"}


def test_an_interruption_within_an_epoch_logs_no_epoch_average(
    train: Train, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training.failures.interruption import Interruption

    stop_requests = iter([False, True])
    monkeypatch.setattr(Interruption, "is_requested", property(lambda _: next(stop_requests)))
    done = train([*arguments, "--logging_dir", str(tmp_path / "logs")])
    assert done.status == 0, done.stderr
    charts = points(tmp_path / "logs")
    assert "loss/current" in charts and "loss/epoch_average" not in charts

"""Handling of NaN losses and gradients during a run."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.training.command_line import training
from library.training.failures.nonfinite import MAX_IN_A_ROW
from library.training.loop import loop
from library.training.run import optimization
from library.training.run_parts import Run
from library.training.step.context import StepContext
from tests.running import Finished, load_saved

Train = Callable[..., Finished]
Weights = dict[str, torch.Tensor]


def are_equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_change(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def files(tmp_path: Path) -> list[str]:
    folder = tmp_path / "out"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Run]]:
    """Return `spoil`; `spoil([2])` makes the loss of batch 2 NaN, or only its gradient, and returns the runs seen."""

    def spoil_batches(numbers: list[int] | range, only_gradient: bool = False) -> list[Run]:
        honest, honest_backward, runs = loop.loss_of, loop.backward, []

        def loss_of(context: StepContext, batch: Any, batch_number: int) -> torch.Tensor:
            loss = honest(context, batch, batch_number)
            if batch_number not in numbers:
                return loss
            if not only_gradient:
                return loss * float("nan")
            weight = context.network.trainable_parameters()[0]
            return loss + torch.sqrt((weight - weight.detach()).sum())  # 0, with an infinite slope

        def backward(run: Run, *rest: Any) -> torch.Tensor:
            runs.append(run)
            return honest_backward(run, *rest)

        monkeypatch.setattr(loop, "loss_of", loss_of)
        monkeypatch.setattr(loop, "backward", backward)
        return runs

    return spoil_batches


@pytest.mark.parametrize(
    ("optimizer", "only_gradient"),
    [
        (["AdamW"], False),
        (["AdamW"], True),
        (["AdamWScheduleFree"], False),
        pytest.param(["AdamW8bit"], True, marks=pytest.mark.nightly),
        pytest.param(["prodigy", "--learning_rate", "1"], False, marks=pytest.mark.nightly),
        pytest.param(["Adafactor"], False, marks=pytest.mark.nightly),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else f"only_gradient={value}",
)
def test_a_nan_step_leaves_the_weights_and_the_next_one_changes_them(
    train: Train, base_arguments: list[str], tmp_path: Path, spoil: Any, optimizer: list[str], only_gradient: bool
) -> None:
    """Schedule-free weights change by the rounding of swapping them in and out at each save."""
    spoil([2], only_gradient)
    done = train([*base_arguments, "--optimizer_type", *optimizer, "--save_every_n_steps", "1"]).ok()
    before, skipped, after = (load_saved(tmp_path, f"mine-step0000000{step}") for step in (2, 3, 4))
    rounding = 1e-7 if "ScheduleFree" in optimizer[0] else 0.0
    assert largest_change(before, skipped) <= rounding
    assert largest_change(skipped, after) > 10 * rounding
    assert all(weight.isfinite().all() for weight in after.values())
    assert "1 of 4 steps were skipped" in done.stderr


def test_the_message_names_step_images_and_noise_levels(
    train: Train, base_arguments: list[str], tmp_path: Path, spoil: Any
) -> None:
    spoil([1])
    timestep = 137
    levels = ["--min_timestep", str(timestep), "--max_timestep", str(timestep)]
    done = train([*base_arguments, *levels])
    (line,) = [line for line in done.stderr.splitlines() if "step 2: loss nan" in line]
    assert line.count(f"(timestep {timestep})") == 2 and line.count(".png") == 2


def test_learning_rate_and_optimizer_do_not_see_a_nan_step(
    train: Train, base_arguments: list[str], tmp_path: Path, spoil: Any
) -> None:
    runs = spoil([1, 3])
    train([*base_arguments, "--lr_scheduler", "linear", "--max_train_steps", "6"]).ok()
    optimizer = runs[0].optimization.optimizer
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([1e-3 * (1 - 4 / 6)] * len(rates))


def test_a_nan_batch_affects_only_its_window(
    train: Train, base_arguments: list[str], tmp_path: Path, spoil: Any
) -> None:
    """Batches 2 and 3 form step 2; the message names the images of batch 3 only."""
    spoil([3])
    options = ["--gradient_accumulation_steps", "2", "--save_every_n_steps", "1", "--max_train_steps", "3"]
    done = train([*base_arguments, *options]).ok()
    first, second, third = (load_saved(tmp_path, f"mine-step0000000{step}") for step in (1, 2, 3))
    assert are_equal(first, second) and not are_equal(second, third)
    (line,) = [line for line in done.stderr.splitlines() if "step 2: loss nan" in line]
    assert line.count(".png") == 2


def test_too_many_nan_steps_end_the_run_with_the_last_good_adapter(
    train: Train, base_arguments: list[str], tmp_path: Path, spoil: Any
) -> None:
    train([*base_arguments, "--max_train_steps", "2", "--output_name", "two"])
    spoil(range(2, 100))
    done = train([*base_arguments, "--max_train_steps", "50"])
    assert done.status == 1 and "Traceback" not in done.stderr
    assert f"{MAX_IN_A_ROW + 1} steps in a row" in done.stderr and "step 8: " in done.stderr
    assert files(tmp_path) == ["mine-step00000002.safetensors", "two.safetensors"]
    assert are_equal(load_saved(tmp_path, "mine-step00000002"), load_saved(tmp_path, "two"))


def test_isolated_nan_steps_do_not_end_the_run(
    train: Train, base_arguments: list[str], tmp_path: Path, spoil: Any
) -> None:
    spoil(range(1, 16, 2))
    done = train([*base_arguments, "--max_train_steps", "16"]).ok()
    assert "8 of 16 steps were skipped" in done.stderr


def test_stop_ends_the_run_at_the_first_nan(
    train: Train, base_arguments: list[str], tmp_path: Path, spoil: Any
) -> None:
    spoil([2])
    done = train([*base_arguments, "--on_nonfinite", "stop"])
    assert done.status == 1 and "step 3: loss nan" in done.stderr
    assert files(tmp_path) == ["mine-step00000002.safetensors"]


def test_a_run_that_never_had_a_good_step_saves_nothing(
    train: Train, base_arguments: list[str], tmp_path: Path, spoil: Any
) -> None:
    """Nothing is saved when the run gives up, nor when it ends before that."""
    spoil(range(100))
    for steps in ("50", "3"):
        done = train([*base_arguments, "--max_train_steps", steps])
        assert done.status == 1 and "Nothing is saved" in done.stderr
    assert files(tmp_path) == []


def test_nan_weights_are_never_saved(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    """An extreme learning rate makes the weights infinite in one step; the earlier file is kept."""
    train([*base_arguments, "--max_train_steps", "1"])
    before = (tmp_path / "out" / "mine.safetensors").read_bytes()
    huge = ["--optimizer_type", "SGD", "--learning_rate", "1e38", "--max_grad_norm", "0", "--loss_type", "l2"]
    done = train([*base_arguments, *huge, "--optimizer_args", "momentum=0.9", "--max_train_steps", "50"])
    assert done.status == 1 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "mine.safetensors").read_bytes() == before
    for path in (tmp_path / "out").iterdir():
        assert all(weight.isfinite().all() for weight in load_file(path).values())


def test_gradient_overflow_while_the_loss_scale_adapts_is_not_an_error(
    train: Train, base_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of about 64 overflow float32 at a scale of 2^127 but not at 2^115, so some steps are skipped."""
    scaler, honest = torch.amp.GradScaler("cpu", init_scale=2.0**127), loop.loss_of
    monkeypatch.setattr(optimization, "gradient_scaler", lambda options, device: scaler)
    monkeypatch.setattr(loop, "loss_of", lambda run, batch, number: 64 * honest(run, batch, number))
    done = train([*base_arguments, "--max_train_steps", "14", "--on_nonfinite", "stop"]).ok()
    assert 2.0**115 < scaler.get_scale() < 2.0**127
    assert "loss scale is halved" in done.stderr and "were skipped" not in done.stderr


def test_a_nan_loss_with_loss_scaling_is_an_error(
    train: Train, base_arguments: list[str], tmp_path: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "gradient_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=8.0))
    spoil([2])
    done = train([*base_arguments, "--save_every_n_steps", "1"]).ok()
    before, skipped, after = (load_saved(tmp_path, f"mine-step0000000{step}") for step in (2, 3, 4))
    assert are_equal(before, skipped) and not are_equal(skipped, after)
    assert "step 3: loss nan" in done.stderr


@pytest.mark.parametrize("options", [[], ["--gradient_checkpointing"]], ids=["plain", "checkpointing"])
def test_the_module_that_produces_nan_is_named(
    train: Train, base_arguments: list[str], tiny_sd_folder: Path, tmp_path: Path, options: list[str]
) -> None:
    """One base model weight is infinite; the first layer that uses it is named, and none before it."""
    broken = shutil.copytree(tiny_sd_folder, tmp_path / "broken")
    (path,) = (broken / "unet").glob("*.safetensors")
    weights = load_file(path)
    name = next(n for n in weights if n.startswith("mid_block.") and n.endswith("attn1.to_v.weight"))
    weights[name][0, 0] = float("inf")
    save_file(weights, path, {"format": "pt"})
    done = train([*base_arguments, *options, "--pretrained_model_name_or_path", str(broken), "--trace_nonfinite"])
    assert done.status == 1
    module = name.removesuffix(".weight")
    assert f"the output of denoiser.{module} is the first that is not finite, its input is finite" in done.stderr
    assert done.stderr.count("is the first that is not finite") == 1


def test_a_vae_that_returns_nan_ends_the_run_and_names_an_image(
    train: Train, base_arguments: list[str], tiny_sd_folder: Path, tmp_path: Path
) -> None:
    """Without cached latents, the loss of the step is the first to be NaN."""
    broken = shutil.copytree(tiny_sd_folder, tmp_path / "broken")
    (path,) = (broken / "vae").glob("*.safetensors")
    weights = load_file(path)
    weights["encoder.conv_in.bias"][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    done = train([*base_arguments, "--pretrained_model_name_or_path", str(broken)])
    assert done.status == 1 and "Traceback" not in done.stderr
    assert re.search(r"the VAE gives NaN for \S+\.png, \S+\.png; add --no_half_vae", done.stderr)


def test_a_nan_gradient_after_a_finite_loss_is_traced(
    train: Train, base_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient becomes NaN in one layer's backward pass; the trace names the layer below it."""

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            return gradient * float("nan")

    honest = training.prepare

    def prepare(*arguments: Any) -> Any:
        prepared = honest(*arguments)
        block = prepared.run.context.models.denoiser.up_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda module, inputs: (Poisoned.apply(inputs[0]), *inputs[1:]))
        return prepared

    monkeypatch.setattr(training, "prepare", prepare)
    done = train([*base_arguments, "--trace_nonfinite", "--on_nonfinite", "stop", "--network_train_unet_only"])
    assert done.status == 1
    assert "with a finite loss" in done.stderr
    assert "the gradient is first not finite at the output of denoiser.mid_block" in done.stderr, done.stderr
    assert "still finite at denoiser.up_blocks.0" in done.stderr, done.stderr

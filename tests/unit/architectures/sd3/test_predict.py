"""Inputs of Stable Diffusion 3's denoiser and the conversion of its output."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd3.assembly import build_objective, sampling_sigmas
from library.architectures.sd3.options import Sd3Options
from library.architectures.sd3.predict import join_context, locate_corner, predict

BATCH: Any = None  # the denoiser does not read the batch


class Recorder(nn.Module):
    """A denoiser that records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(context_width=12, patch=2, positions_side=24)

    def table_side(self, h: int, w: int) -> int:
        return 24

    def forward(self, *inputs: Any) -> Tensor:
        self.inputs = inputs
        output: Tensor = inputs[0] * 0.5 + 0.1
        return output


def features(with_t5: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    clip_features = {"lg_out": torch.randn(3, 77, 8, generator=g), "lg_pooled": torch.randn(3, 6, generator=g)}
    return {**clip_features, "t5_out": torch.randn(3, 5, 12, generator=g)} if with_t5 else clip_features


def noised(seed: int = 5) -> Any:
    objective = build_objective(Sd3Options())
    return objective.corrupt(torch.randn(3, 16, 8, 6), torch.Generator().manual_seed(seed))


def test_the_context_is_both_clips_padded_with_zeros_followed_by_t5() -> None:
    inputs = features()
    context = join_context(inputs, 12)
    assert context.shape == (3, 82, 12)
    assert torch.equal(context[:, :77, :8], inputs["lg_out"]) and context[:, :77, 8:].eq(0).all()
    assert torch.equal(context[:, 77:], inputs["t5_out"])


def test_without_t5_its_77_tokens_are_zero() -> None:
    context = join_context(features(with_t5=False), 12)
    assert context.shape == (3, 154, 12) and context[:, 77:].eq(0).all()


def test_the_denoiser_gets_whole_timesteps_out_of_1000() -> None:
    model, state = Recorder(), noised()
    predict(model, state, features(), BATCH)
    latents, timesteps, _, pooled, corner = model.inputs
    assert torch.equal(latents, state.latents_BCHW) and torch.equal(pooled, features()["lg_pooled"])
    assert torch.equal(timesteps, timesteps.round()) and torch.allclose(timesteps, 1000 * state.sigmas_B)
    assert corner is None


def test_the_output_is_converted_to_an_estimate_of_the_clean_latent() -> None:
    objective, state = build_objective(Sd3Options()), noised()
    estimate = objective.estimate(predict(Recorder(), state, features(), BATCH), state)
    x = state.latents_BCHW.double()
    expected = x - state.sigmas_B.double().view(-1, 1, 1, 1) * (x * 0.5 + 0.1)
    torch.testing.assert_close(estimate.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(objective.target(state), state.clean_BCHW)


@pytest.mark.parametrize(
    ("share", "corner"), [((0.0, 0.0), (0, 0)), ((0.999, 0.999), (20, 21)), ((0.5, 0.25), (10, 5))]
)
def test_the_crop_can_be_anywhere_in_the_position_table(share: tuple[float, float], corner: tuple[int, int]) -> None:
    assert locate_corner(torch.tensor([share]), 4, 3, side=24) == corner


def test_the_drawn_crop_position_reaches_the_denoiser() -> None:
    model = Recorder()
    predict(model, noised(), {**features(), "position": torch.tensor([[0.5, 0.25]] * 3)}, BATCH)
    assert model.inputs[-1] == (10, 5)


@pytest.mark.parametrize("num_steps", [1, 7, 30])
@pytest.mark.parametrize("shift", [3.0, 1.0])
def test_preview_sigmas_match_diffusers(num_steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(sampling_sigmas(num_steps, shift).float(), scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)

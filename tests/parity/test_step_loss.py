"""The loss of a batch against a literal float64 recomputation from the denoiser's inputs and outputs."""

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd.assembly import build
from library.options.train import TrainOptions
from library.training.step.conditioning import CaptionMemo
from library.training.step.context import Models, StepContext
from library.training.step.losses import add_noise_to, loss_of
from library.types import Batch, Noised
from networks.core.protocol import AdoptedNetwork


def options_for(folder: Path, **noise_or_loss: Any) -> TrainOptions:
    parser = argparse.ArgumentParser()
    TrainOptions.add_to(parser)
    args = parser.parse_args(["--pretrained_model_name_or_path", str(folder)])
    for name, value in noise_or_loss.items():
        setattr(args, name, value)
    return TrainOptions.from_args(args)


class Multiplier(nn.Module):
    """A network stub that records its multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def set_multiplier(self, value: float) -> None:
        self.values.append(value)


def context_of(options: TrainOptions, seen: list[tuple[Noised, Tensor]]) -> StepContext:
    arch = build(options)
    encoders = arch.load.text_encoders()
    network = Multiplier()

    def predict(denoiser: Any, noised: Noised, conditioning: Any, batch: Batch) -> Tensor:
        prediction_BCHW = arch.predict(denoiser, noised, conditioning, batch)
        if network.values and network.values[-1] == 0.0:
            prediction_BCHW = prediction_BCHW + 0.5  # the prediction of a model without its adapter
        else:
            seen.append((noised, prediction_BCHW))
        return prediction_BCHW

    models = Models(arch.load.denoiser(), encoders, arch.load.vae(), ([], nn.Module()))
    return StepContext(
        arch=replace(arch, predict=predict),
        models=models,
        network=AdoptedNetwork(network),
        seed=3,
        device=torch.device("cpu"),
        autocast=nullcontext,
        trains_text_encoder=False,
        captions=CaptionMemo(lambda captions: arch.text.encode(encoders, arch.text.tokenize(captions))),
        vae_batch_size=options.caching.vae_batch_size,
    )


def batch_of(seed: int, masks: bool = False, **fields: Any) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch = Batch(
        keys=["a.png", "b.png"],
        captions=["a cat", "two dogs"],
        pixels_BCHW=None,
        latents_BCHW=torch.randn(2, 4, 8, 8, generator=generator) * 5,
        conditioning=None,
        loss_weights_B=torch.tensor([1.0, 0.3]),
        masks_B1HW=torch.rand(2, 1, 64, 64, generator=generator) if masks else None,
        sizes_B6=torch.zeros(2, 6),
        attributes=[{}, {}],
    )
    return replace(batch, **fields)


def abar(timesteps_B: Tensor) -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)[timesteps_B].view(-1, 1, 1, 1)


@pytest.mark.parametrize("velocity", [False, True])
def test_noisy_input_target_masks_and_weights_match_the_recomputation(tiny_sd_folder: Path, velocity: bool) -> None:
    calls: list[tuple[Noised, Tensor]] = []
    run = context_of(options_for(tiny_sd_folder, v_parameterization=velocity), calls)
    batch = batch_of(seed=21, masks=True)
    batch.masks_B1HW[1, :, 16:] = 0  # type: ignore[index]
    loss = loss_of(run, batch, batch_number=4)

    noised, prediction_BCHW = calls[0]
    clean_BCHW = batch.latents_BCHW.double() * 0.18215  # type: ignore[union-attr]
    noise_BCHW, a_B111 = noised.noise_BCHW.double(), abar(noised.timesteps_B)
    torch.testing.assert_close(
        noised.latents_BCHW.double(),
        a_B111.sqrt() * clean_BCHW + (1 - a_B111).sqrt() * noise_BCHW,
        rtol=1e-6,
        atol=1e-6,
    )
    target_BCHW = a_B111.sqrt() * noise_BCHW - (1 - a_B111).sqrt() * clean_BCHW if velocity else noise_BCHW
    masks_B1HW = batch.masks_B1HW.double().view(2, 1, 8, 8, 8, 8).mean((3, 5))  # type: ignore[union-attr]
    error_BCHW = (prediction_BCHW.double() - target_BCHW) ** 2 * masks_B1HW
    expected = (error_BCHW.mean((1, 2, 3)) * torch.tensor([1.0, 0.3], dtype=torch.float64)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)  # float32 sums of 512 squares


def test_pixels_are_encoded_when_latents_are_not_cached(tiny_sd_folder: Path) -> None:
    """Latents are samples of the posterior, mean + std * noise, so their average is the posterior's mean."""
    calls: list[tuple[Noised, Tensor]] = []
    run = context_of(options_for(tiny_sd_folder), calls)
    pixels_BCHW = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    batch = batch_of(seed=22, latents_BCHW=None, pixels_BCHW=pixels_BCHW)
    for number in range(40):
        loss_of(run, batch, number)
    drawn = torch.stack([noised.clean_BCHW for noised, _ in calls])
    posterior = run.models.vae.encode(pixels_BCHW).latent_dist
    standard_error = posterior.std.mean() * 0.18215 / 40**0.5
    assert ((drawn.mean(0) - posterior.mean * 0.18215).abs().mean() < 2 * standard_error).item()
    assert not torch.equal(drawn[0], drawn[1])


def test_random_draws_depend_only_on_the_batch_number(tiny_sd_folder: Path) -> None:
    run = context_of(options_for(tiny_sd_folder, noise_offset=0.1, multires_noise_iterations=2), [])
    batch = batch_of(seed=23)
    first, other = loss_of(run, batch, 7), loss_of(run, batch, 8)
    torch.manual_seed(99)
    assert loss_of(run, batch, 7).item() == first.item() != other.item()


def test_marked_samples_are_trained_toward_the_base_models_output(tiny_sd_folder: Path) -> None:
    calls: list[tuple[Noised, Tensor]] = []
    run = context_of(options_for(tiny_sd_folder), calls)
    attributes = [{"diff_output_preservation": True}, {}]
    loss = loss_of(run, batch_of(seed=24, attributes=attributes), 0)
    noised, prediction_BCHW = calls[0]
    prior_loss = 0.5**2  # the base model predicts 0.5 more everywhere
    learned = ((prediction_BCHW[1] - noised.noise_BCHW[1]) ** 2).mean() * 0.3
    torch.testing.assert_close(loss, (prior_loss + learned) / 2, rtol=1e-5, atol=0.0)
    assert run.network.module.values == [0.0, 1.0]


def test_preserved_samples_have_a_weight_and_the_noise_levels_of_few_steps(tiny_sd_folder: Path) -> None:
    """Four DDIM steps call the denoiser at 751, 501, 251 and 1; samples without `num_steps` keep their draws."""
    calls: list[tuple[Noised, Tensor]] = []
    run = context_of(options_for(tiny_sd_folder), calls)
    attributes = [{"diff_output_preservation": {"weight": 0.25, "num_steps": 4}}, {}]
    batch, plain = batch_of(seed=24, attributes=attributes), batch_of(seed=24)
    levels = []
    for number in range(40):
        loss = loss_of(run, batch, number)
        noised, prediction_BCHW = calls[-1]
        learned = ((prediction_BCHW[1] - noised.noise_BCHW[1]) ** 2).mean() * 0.3
        torch.testing.assert_close(loss, (0.25 * 0.5**2 + learned) / 2, rtol=1e-5, atol=0.0)
        a = abar(noised.timesteps_B)[0]
        expected = a.sqrt() * noised.clean_BCHW[0].double() + (1 - a).sqrt() * noised.noise_BCHW[0].double()
        torch.testing.assert_close(noised.latents_BCHW[0].double(), expected, rtol=1e-5, atol=1e-5)
        levels.append(int(noised.timesteps_B[0]))
        unmarked = add_noise_to(run, plain, number)
        assert torch.equal(unmarked.latents_BCHW[1], noised.latents_BCHW[1])
    assert set(levels) == {1, 251, 501, 751}


def test_what_masks_leave_out_is_preserved_by_its_share(tiny_sd_folder: Path) -> None:
    """Recomputed in float64; the first sample has a mask of each value, the second none."""
    calls: list[tuple[Noised, Tensor]] = []
    run = context_of(options_for(tiny_sd_folder), calls)
    attributes = [{"diff_output_preservation": {"outside_mask": True, "weight": 0.3}}, {}]
    masks_B1HW = torch.ones(2, 1, 64, 64)
    masks_B1HW[0] = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(3))
    batch = batch_of(seed=24, attributes=attributes, masks_B1HW=masks_B1HW)
    loss = loss_of(run, batch, 0)
    noised, prediction_BCHW = calls[0]
    error_BCHW = (prediction_BCHW.double() - noised.noise_BCHW.double()) ** 2
    cells = 64 // error_BCHW.shape[-1]
    mask_1HW = masks_B1HW[0].double().unfold(1, cells, cells).unfold(2, cells, cells).mean((-1, -2))
    first = (mask_1HW * error_BCHW[0]).mean() + 0.3 * ((1 - mask_1HW) * 0.5**2).expand_as(error_BCHW[0]).mean()
    expected = (first + 0.3 * error_BCHW[1].mean()) / 2  # 0.3 is the second subset's weight
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)


def test_nan_latents_raise_an_error_that_names_the_image(tiny_sd_folder: Path) -> None:
    run = context_of(options_for(tiny_sd_folder), [])
    pixels_BCHW = torch.zeros(2, 3, 64, 64)
    pixels_BCHW[1, 0, 0, 0] = torch.nan
    batch = batch_of(seed=25, latents_BCHW=None, pixels_BCHW=pixels_BCHW)
    assert loss_of(run, batch, 0).isnan(), "the step goes on, and its loss tells"
    with pytest.raises(ValueError, match=r"NaN for b\.png; add --no_half_vae"):
        add_noise_to(run, batch, 0)

"""Preference and slider losses against a float64 recomputation with merged adapter weights, for noise prediction,
v-prediction and every flow model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.diffusion.dpo import invert_losses
from library.options.training.pairs import PairOptions
from library.protocols import Architecture
from library.training.evaluation.validation_loss import batch_losses
from library.training.step.conditioning import CaptionMemo
from library.training.step.context import StepContext
from library.training.step.losses import add_noise_to, loss_of
from library.training.step.pairs import split_pairs, split_passes
from library.types import Batch, Noised
from tests.parity.test_concepts import context_of, merge_into
from tests.parity.test_concepts_flow import FLOWS, arch_of
from tests.parity.tiny_models import opened_with
from tests.tiny.bases import BASES

pytestmark = pytest.mark.usefixtures("fresh_process")  # reading options configures logging

BETA, STRENGTH, NUMBER = 500.0, 0.7, 17
VELOCITY = "sd2 with --v_parameterization"
FAST = ("sd", VELOCITY, "flux")
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.nightly) for name in (*BASES, VELOCITY)]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def open_tiny(name: str, folder: Path) -> Architecture:
    if name in FLOWS:
        return arch_of(name, folder)
    base_name = name.split()[0]
    return opened_with(base_name, [*BASES[base_name].build(folder), *name.split()[2:]])[1]


def context_for(arch: Architecture, pairs: PairOptions) -> StepContext:
    encoders = arch.load.text_encoders()
    padding = {} if arch.text_cache is None else arch.text_cache.padding
    memo = CaptionMemo(lambda captions: arch.text.encode(encoders, arch.text.tokenize(captions)), padding)
    return replace(context_of(arch), captions=memo, pairs=pairs)


def pairs_of(context: StepContext) -> Batch:
    """Return two pairs of 64 x 64 pixels with masks."""
    spec, captions = context.arch.codec.spec, ["a red cat", "a dog"]
    side = 64 // spec.downscale
    images, partners = torch.randn(2, 2, spec.channels, side, side, generator=torch.Generator().manual_seed(3))
    masks = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(4))
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    return Batch(
        keys=["a", "b"], captions=captions, pixels_BCHW=None, latents_BCHW=images,
        conditioning=context.captions(captions), loss_weights_B=torch.ones(2), masks_B1HW=masks, sizes_B6=sizes,
        attributes=[{}, {}], reference_latents=(partners,), are_pairs=True,
    )  # fmt: skip


class Recomputed:
    """The errors of a denoiser in float64, for one side of the pairs at a time."""

    def __init__(self, name: str, context: StepContext, batch: Batch) -> None:
        self.name, self.context, self.batch = name, context, batch
        self.denoiser: nn.Module = context.arch.load.denoiser().double()

    def at(self, strength: float) -> "Recomputed":
        """Add the adapter's change to the weights, once."""
        merge_into(self.denoiser, self.context, strength)
        self.context.network.set_multiplier(1.0)
        return self

    @torch.no_grad()
    def errors(self, noised: Noised) -> Tensor:
        features = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in self.context.captions(self.batch.captions).items()
        }
        wide = Noised(*(tensor.double() for tensor in vars(noised).values()))
        prediction = self.context.arch.predict(self.denoiser, wide, features, self.batch)
        assert self.batch.masks_B1HW is not None
        side = prediction.shape[-1]
        masks = self.batch.masks_B1HW.double().unfold(2, 64 // side, 64 // side).unfold(3, 64 // side, 64 // side)
        errors_B = ((prediction - self.target(wide)).square() * masks.mean((4, 5))).flatten(1).mean(1)
        # SD3's error is that of the latent.
        return errors_B * wide.sigmas_B.square() if self.name == "sd3" else errors_B

    def target(self, noised: Noised) -> Tensor:
        """Return the noise, the DDPM velocity, or the flow velocity, which points to the image in NextDiT."""
        if self.name == VELOCITY:
            signal = 1 / (1 + noised.sigmas_B.square()).sqrt().view(-1, 1, 1, 1)
            return signal * noised.noise_BCHW - (1 - signal**2).sqrt() * noised.clean_BCHW
        if self.name not in FLOWS:
            return noised.noise_BCHW
        velocity = noised.noise_BCHW - noised.clean_BCHW
        return -velocity if BASES[self.name].is_velocity_reversed else velocity


@pytest.mark.parametrize("name", NAMES)
def test_the_preference_loss_matches_a_float64_recomputation(name: str, tmp_path: Path) -> None:
    arch = open_tiny(name, tmp_path)
    context = context_for(arch, PairOptions("dpo", BETA))
    batch = pairs_of(context)
    preferred, rejected = (add_noise_to(context, side, NUMBER) for side in split_pairs(batch))
    assert torch.equal(preferred.noise_BCHW, rejected.noise_BCHW)
    assert torch.equal(preferred.timesteps_B, rejected.timesteps_B)
    assert not torch.equal(preferred.clean_BCHW, rejected.clean_BCHW)
    loss = loss_of(context, batch, NUMBER)
    loss.backward()

    base = Recomputed(name, context, batch)
    reference = [base.errors(noised) for noised in (preferred, rejected)]
    base.at(1.0)
    gains = [before - base.errors(noised) for before, noised in zip(reference, (preferred, rejected), strict=True)]
    margins = BETA / 2 * (gains[0] - gains[1])
    assert margins.abs().min() > 1e-3
    torch.testing.assert_close(loss.double(), torch.log1p(torch.exp(-margins)).mean(), **CLOSE)
    parameters = [p for p in context.network.module.parameters() if p.grad is not None]
    assert any(float(p.grad.abs().max()) > 0 for p in parameters if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_a_slider_trains_at_positive_strength_on_images_and_negative_on_partners(name: str, tmp_path: Path) -> None:
    arch = open_tiny(name, tmp_path)
    context = context_for(arch, PairOptions(pair_slider=STRENGTH))
    batch = pairs_of(context)
    losses = [loss_of(context, side, NUMBER).double().detach() for side in split_passes(context, batch)]
    assert len(losses) == 2
    for loss, side, strength in zip(losses, split_pairs(batch), (STRENGTH, -STRENGTH), strict=True):
        noised = add_noise_to(context, side, NUMBER)
        expected = Recomputed(name, context, batch).at(strength).errors(noised).mean() / 2
        torch.testing.assert_close(loss, expected, **CLOSE)


def test_held_out_pairs_use_the_same_noise_for_both_images(tmp_path: Path) -> None:
    """At each noise level the loss matches the margin computed by hand; a slider's is the mean of both sides."""
    arch = open_tiny("sd", tmp_path)
    context = context_for(arch, PairOptions("dpo", BETA))
    batch = pairs_of(context)
    names = [("a",), ("b",)]
    with torch.no_grad():
        losses = batch_losses(context, batch, names, [300, 700], 5)
        plain = replace(context, pairs=PairOptions())
        images, partners = split_pairs(batch)

        def errors() -> Tensor:
            return torch.stack([batch_losses(plain, side, names, [300, 700], 5) for side in (images, partners)])

        context.network.set_multiplier(0.0)
        before = errors()
        context.network.set_multiplier(1.0)
        gains = before - errors()
        margins = BETA / 2 * (gains[0] - gains[1])
        torch.testing.assert_close(losses, torch.log1p(torch.exp(-margins)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(invert_losses(losses), margins, rtol=1e-3, atol=1e-3)

        slider = batch_losses(replace(context, pairs=PairOptions(pair_slider=STRENGTH)), batch, names, [300], 5)
        sides = []
        for side, strength in ((images, STRENGTH), (partners, -STRENGTH)):
            context.network.set_multiplier(strength)
            sides.append(batch_losses(plain, side, names, [300], 5))
        torch.testing.assert_close(slider, torch.stack(sides).mean(0))

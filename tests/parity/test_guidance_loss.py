"""Guidance, preference and slider losses against a literal float64 recomputation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.diffusion.dpo import invert_losses
from library.memory.planner.gpus import TYPICAL
from library.memory.planner.prediction import MemoryMode, predict
from library.options.train import TrainOptions
from library.options.training.pairs import PairOptions
from library.protocols import Architecture
from library.training.evaluation.validation_loss import batch_losses
from library.training.models.base_model import LoadedModels
from library.training.models.compute import Compute
from library.training.models.network import create
from library.training.models.step_context import step_context
from library.training.planning.meta_run import BatchShape
from library.training.step.conditioning import CaptionMemo
from library.training.step.context import Models, StepContext
from library.training.step.losses import add_noise_to, loss_of
from library.training.step.pairs import split_pairs, split_passes
from library.training.step.text_features import build_conditioning
from library.types import Batch, Noised
from networks.core.protocol import adopt, open_network_module
from tests.parity.test_concepts import FLOWS, arch_of, context_of, merge_into
from tests.parity.test_counting import CPU, count_options, open_tiny
from tests.parity.tiny_models import opened_with
from tests.tiny.bases import BASES
from tests.tiny.init import fixed_init

pytestmark = pytest.mark.usefixtures("fresh_process")  # reading options configures logging

SCALE = 3.0
FAMILIES = {
    "epsilon": ("sd", []),
    "v": ("sd", ["--v_parameterization"]),
    "flow": ("flux", ["--model_prediction_type", "raw"]),
    "negated flow": ("zimage", []),
}
CAPTIONS = ["a red cat", "two dogs", ""]


def open_step(options: TrainOptions, arch: Architecture) -> StepContext:
    """Return the step of a run whose adapter has some effect."""
    encoders, denoiser = arch.load.text_encoders(), arch.load.denoiser(None)
    models = Models(denoiser, encoders, None, arch.view(encoders, denoiser))
    network = adopt(create(options.network, open_network_module("networks.lora"), models))
    network.apply_to(*models.network_view, False, True)
    network.module.load_state_dict(fixed_init(network.module, 5))
    compute, loaded = Compute.build(options.precision, CPU), LoadedModels(models, None, None)
    context = step_context(False, 1, arch, 7, loaded, network, compute, options.pairs, options.guidance)
    return context


def batch_of(arch: Architecture, captions: list[str] = CAPTIONS, **fields: Any) -> Batch:
    spec, count = arch.codec.spec, len(captions)
    generator = torch.Generator().manual_seed(4)
    batch = Batch(
        keys=[f"{i}.png" for i in range(count)],
        captions=captions,
        pixels_BCHW=None,
        latents_BCHW=torch.randn(count, spec.channels, 64 // spec.downscale, 64 // spec.downscale, generator=generator),
        conditioning=None,
        loss_weights_B=torch.linspace(1.0, 0.5, count),
        masks_B1HW=torch.rand(count, 1, 64, 64, generator=generator),
        sizes_B6=torch.full((count, 6), 64.0),
        attributes=[{}] * count,
    )
    return replace(batch, **fields)


def to_double(values: Noised) -> Noised:
    return Noised(**{name: t.double() if t.is_floating_point() else t for name, t in vars(values).items()})


def recompute_loss(context: StepContext, batch: Batch, scales: list[float], velocity: bool) -> Tensor:
    """Return the loss in float64, with two passes of the whole batch and a scale for each sample."""
    noised = to_double(add_noise_to(context, batch, 0))
    context.models.denoiser.double()
    context.network.module.double()
    outputs = []
    for captions in (batch.captions, [""] * len(batch.keys)):
        features = build_conditioning(context, replace(batch, captions=captions), {})
        features = {name: t.double() if t.is_floating_point() else t for name, t in features.items()}
        outputs.append(context.arch.predict(context.models.denoiser, noised, features, batch))
    c, u, s = outputs[0], outputs[1].detach(), torch.tensor(scales, dtype=torch.float64).view(-1, 1, 1, 1)
    x, e = noised.clean_BCHW, noised.noise_BCHW
    if context.arch.name == "sd":
        a = 1 / (1 + noised.sigmas_B.view(-1, 1, 1, 1) ** 2)
        target = a.sqrt() * e - (1 - a).sqrt() * x if velocity else e
    else:
        target = x - e if context.arch.name == "zimage" else e - x
    side = target.shape[-1]
    assert batch.masks_B1HW is not None
    masks = batch.masks_B1HW.double().view(len(s), 1, side, 64 // side, side, 64 // side).mean((3, 5))
    losses_B = (((c + (s - 1) * u) / s - target) ** 2 * masks).mean((1, 2, 3))
    return (losses_B * batch.loss_weights_B.double()).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_match_the_recomputation(tmp_path: Path, family: str) -> None:
    """Of two guided samples and a dropped caption, which keeps the plain loss."""
    name, more = FAMILIES[family]
    options, arch = open_tiny(name, tmp_path, "--guidance_loss", str(SCALE), *more)
    context, batch = open_step(options, arch), batch_of(arch)
    loss = loss_of(context, batch, 0)
    loss.backward()
    found = torch.cat([p.grad.flatten().double() for p in context.network.trainable_parameters()])
    context.network.module.zero_grad()
    expected_loss = recompute_loss(context, batch, [SCALE, SCALE, 1.0], family == "v")
    expected_loss.backward()
    expected = torch.cat([p.grad.flatten() for p in context.network.trainable_parameters()])
    assert abs(loss.item() / expected_loss.item() - 1) < 1e-5
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("captions", "attributes", "num_passes"),
    [
        (["a red cat", "two dogs"], [{}, {}], 2),
        (["", ""], [{}, {}], 1),
        (["a red cat", ""], [{"diff_output_preservation": True}, {}], 2),  # the second is of the base model alone
    ],
    ids=["guided", "dropped", "preserved"],
)
def test_samples_that_need_no_guidance_cost_no_pass(
    tmp_path: Path, captions: list[str], attributes: list[dict[str, Any]], num_passes: int
) -> None:
    """Their loss is the plain one, bit by bit."""
    losses = {}
    for scale in ("1", "3"):
        options, arch = open_tiny("sd", tmp_path / scale, "--guidance_loss", scale)
        calls: list[Noised] = []

        def count(*args: Any, predict: Any = arch.predict, calls: list[Noised] = calls) -> Tensor:
            calls.append(args[1])
            return predict(*args)

        context = replace(open_step(options, arch), arch=replace(arch, predict=count))
        losses[scale] = loss_of(context, batch_of(arch, captions, attributes=attributes), 0).item()
    assert len(calls) == num_passes
    assert (losses["1"] == losses["3"]) == (captions != ["a red cat", "two dogs"])


def test_the_pass_is_counted(tmp_path: Path) -> None:
    """A step takes at most 1.5 times as long, 1.34 times with recomputed blocks."""
    seconds = {}
    for scale in ("1", "3"):
        options, arch = open_tiny("flux", tmp_path / scale, "--guidance_loss", scale)
        step = count_options(options, arch, BatchShape(8, 512, 512)).step
        for mode in (MemoryMode(), MemoryMode(recompute_every=1)):
            seconds[scale, mode] = predict(step, mode, TYPICAL[0]).seconds
    for mode, most in ((MemoryMode(), 1.5), (MemoryMode(recompute_every=1), 1.34)):
        assert 1.2 < seconds["3", mode] / seconds["1", mode] <= most


# Preference and slider losses against a float64 recomputation with merged adapter weights, for noise prediction,
# v-prediction and every flow model.

BETA, STRENGTH, NUMBER = 500.0, 0.7, 17
VELOCITY = "sd2 with --v_parameterization"
FAST = ("sd", VELOCITY, "flux")
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.nightly) for name in (*BASES, VELOCITY)]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def open_for_pairs(name: str, folder: Path) -> Architecture:
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
    arch = open_for_pairs(name, tmp_path)
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
    arch = open_for_pairs(name, tmp_path)
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
    arch = open_for_pairs("sd", tmp_path)
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

"""--guidance_loss against a literal float64 recomputation: (v_cond + (s - 1) v_uncond) / s is fitted to the target."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.memory.planner.gpus import TYPICAL
from library.memory.planner.prediction import MemoryMode, predict
from library.options.train import TrainOptions
from library.protocols import Architecture
from library.training.models.base_model import LoadedModels
from library.training.models.compute import Compute
from library.training.models.network import create
from library.training.models.step_context import step_context
from library.training.planning.meta_run import BatchShape
from library.training.step.context import Models, StepContext
from library.training.step.losses import add_noise_to, loss_of
from library.training.step.text_features import build_conditioning
from library.types import Batch, Noised
from networks.core.protocol import adopt, open_network_module
from tests.parity.test_counting import CPU, count_options, open_tiny
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

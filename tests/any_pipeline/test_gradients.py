"""Gradients of an adapter against a float64 step on the arguments with which the pipeline itself calls its denoiser."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from library.architectures.any_pipeline.convention import Convention
from library.architectures.any_pipeline.maps import SizeMaps
from library.architectures.any_pipeline.trees import join_values, move
from library.architectures.any_pipeline.watch import Answers, Trace, Watched
from library.types import Noised
from tests.any_pipeline.test_convention import SIZE, measured
from tests.any_pipeline.test_files import attach_adapter
from tests.any_pipeline.test_parity import BATCH, CAPTION, parts_of
from tests.tiers import first_is_fast
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline
from tests.tolerances import SUMS_OF_A_PASS


@pytest.mark.parametrize("name", first_is_fast(sorted(PIPELINES)))
def test_the_gradient_is_that_of_the_pipelines_own_call_in_float64(name: str) -> None:
    compare_with_float64(lambda: build_tiny_pipeline(name), *measured(name))


def compare_with_float64(
    build: Callable[[], Any], watched: Watched, c: Convention, maps: SizeMaps, steps: int = 3
) -> None:
    """Compare loss and gradients of an adapter at the middle of `steps` steps. `build` gives the pipeline anew."""
    middle = steps // 2
    clean, noise = torch.randn(2, *maps.sample_shape, generator=torch.Generator().manual_seed(4))

    def draw(samples: Any = None) -> Trace:
        return watched.draw(CAPTION, SIZE, Answers(samples=samples), steps=steps, **c.extra)

    trace = draw()
    level, (signal, share) = mix_of(c, trace, watched.own_scheduler, middle)
    own = draw(lambda old: signal * clean + share * noise)
    theirs, adapter = adapted(build(), c.denoiser)
    for layer in theirs.modules():  # Kandinsky 5 computes times in float32, whatever its type
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda layer, given: (given[0].to(layer.weight.dtype), *given[1:]))
    output = theirs.double()(**move(own.calls[middle].kwargs, torch.device("cpu"), torch.float64))
    prediction = maps.out(join_values(output)[None]).reshape(clean.shape)
    expected_loss, expected = backward(prediction, target_of(c, clean, noise, signal, share), adapter)

    predict, _, conditioning = parts_of(watched, c, maps)
    raw = [draw(lambda old, sample=sample: sample).decoded[0] for sample in (clean, noise)]
    clean, noise = (c.latents_of(r.reshape(1, c.latent_shape[1], *r.shape[-2:])) for r in raw)
    noised = Noised(signal * clean + share * noise, clean, noise, torch.tensor([level]), torch.tensor([level]))
    ours, adapter = adapted(build(), c.denoiser)
    prediction = predict(ours, noised, conditioning, BATCH)
    loss, actual = backward(prediction, target_of(c, clean, noise, signal, share), adapter)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (actual - expected).norm() < SUMS_OF_A_PASS * expected.norm() and expected.norm() > 0


def adapted(pipe: Any, component: str) -> tuple[Any, Any]:
    """Return a fresh denoiser, and the adapter attached to it."""
    denoiser = getattr(pipe, component)
    return denoiser, attach_adapter(denoiser, component)


def backward(prediction: Tensor, target: Tensor, adapter: Any) -> tuple[float, Tensor]:
    loss = mse_loss(prediction, target.to(prediction))
    gradients = torch.autograd.grad(loss, list(adapter.parameters()), materialize_grads=True)
    return loss.item(), torch.cat([gradient.flatten().double() for gradient in gradients])


def mix_of(convention: Convention, trace: Trace, own: Any, step: int) -> tuple[float, tuple[float, float]]:
    """Return the noise level of a step, and the weights of image and noise there, by the pipeline's own scheduler."""
    if convention.mix == "flow":
        sigma = float(trace.scheduler.sigmas[step])
        level = 1 - sigma if own.config.get("invert_sigmas") else sigma
        return level, (1 - level, level)
    level = int(trace.steps[step].timestep)
    abar = float(own.alphas_cumprod[level])
    return level, (math.sqrt(abar), math.sqrt(1 - abar))


def target_of(convention: Convention, clean: Tensor, noise: Tensor, signal: float, share: float) -> Tensor:
    velocity = signal * noise - share * clean
    known = {"noise - latent": noise - clean, "latent - noise": clean - noise, "noise": noise, "velocity": velocity}
    return known[convention.target]

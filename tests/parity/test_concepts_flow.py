"""One LECO step on every flow model against a float64 recomputation with the adapter merged."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.specs import recognise_base_model
from library.base.randomness import generator_for
from library.data.concepts.prompt_pairs import resolve_guidance
from library.options.leco import leco_options
from library.options.training.concepts import ConceptOptions
from library.protocols import Architecture
from library.training.step.concepts import build_prompt, draw_partly
from library.training.step.conditioning import CaptionMemo
from library.training.step.context import StepContext
from library.training.step.losses import loss_of
from library.types import Batch, Noised
from tests.parity.test_concepts import (
    CAPTION,
    CONCEPT,
    NEUTRAL,
    NUMBER,
    POSITIVE,
    SEED,
    STEPS,
    UNCONDITIONAL,
    batch_of,
    context_of,
    merge_into,
)
from tests.tiny.bases import BASES
from tests.tolerances import FLOAT32_SAMPLED

FLOWS = [name for name, base in BASES.items() if base.is_flow]


def arch_of(name: str, folder: Path) -> Architecture:
    """Assemble a tiny model with the options of train_leco.py."""
    words = BASES[name].build(folder)
    spec = recognise_base_model("--model", words[words.index("--pretrained_model_name_or_path") + 1])
    parser = importlib.import_module(spec.script.removesuffix(".py")).setup_parser()
    values = vars(parser.parse_args([*spec.script_flag.split(), *words]))
    kind = leco_options(spec.options)
    arch: Architecture = spec.build(kind().with_values({**values, "model_prediction_type": "raw"}))
    return arch


@dataclass
class Recomputed:
    """The denoiser in float64; its velocity points from latent to noise regardless of the base model's sign."""

    context: StepContext
    denoiser: nn.Module
    batch: Batch

    @torch.no_grad()
    def velocity(self, text: str, latents: Tensor, sigma: float) -> Tensor:
        arch = self.context.arch
        features = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in self.context.captions([text] * len(latents)).items()
        }
        sigmas = torch.full((len(latents),), sigma, dtype=torch.float64)
        noised = Noised(latents, latents * torch.nan, latents * torch.nan, sigmas, 1000 * sigmas)
        prediction = arch.predict(self.denoiser, noised, features, self.batch)
        points_to_image = getattr(arch.objective, "target_kind", "") == "latent - noise"
        return -prediction if points_to_image else prediction

    def drawn(self, noise: Tensor, guidance: float) -> tuple[Tensor, float]:
        """Take Euler steps along the model's noise levels; return the latents after five of eight and their level.

        Like the base model, guide only part of the steps, with a limited norm, where it does.
        """
        prompt = replace(
            build_prompt(self.context, self.batch, CONCEPT.unconditional, CONCEPT.num_steps, guidance), scale=guidance
        )
        sigmas = [level.sigma for level in self.context.arch.preview.sampler(prompt).levels]
        latents = noise
        for n in range(5):
            caption = self.velocity(CAPTION, latents, sigmas[n])
            velocity = caption
            if guidance != 1 and (prompt.cfg_trunc_ratio is None or (n + 1) / STEPS <= prompt.cfg_trunc_ratio):
                other = self.velocity(UNCONDITIONAL, latents, sigmas[n])
                velocity = other + guidance * (caption - other)
                if prompt.renorm_cfg:
                    norms = [v.flatten(1).norm(dim=1) for v in (caption, velocity)]
                    velocity = velocity * (prompt.renorm_cfg * norms[0] / norms[1]).clamp(max=1).view(-1, 1, 1, 1)
            latents = latents + (sigmas[n + 1] - sigmas[n]) * velocity
        return latents, sigmas[5]


@pytest.fixture(scope="module", params=FLOWS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def make(name: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[StepContext, nn.Module]]:
    """Return a builder of a context with a random adapter and a float64 copy of the denoiser."""
    arch = arch_of(name, tmp_path_factory.mktemp("model"))

    def build() -> tuple[StepContext, nn.Module]:
        context = context_of(arch)
        padding = {} if arch.text_cache is None else arch.text_cache.padding
        encoders = arch.load.text_encoders()
        memo = CaptionMemo(lambda captions: arch.text.encode(encoders, arch.text.tokenize(captions)), padding)
        return replace(context, captions=memo), arch.load.denoiser().double()

    return build


def test_latents_target_and_loss_match_a_float64_recomputation(
    make: Callable[[], tuple[StepContext, nn.Module]], name: str
) -> None:
    context, denoiser = make()
    guidance = resolve_guidance(ConceptOptions(), context.arch.preview.defaults)
    assert guidance == (1.0 if BASES[name].draws_without_guidance else 3.0)
    batch = batch_of(replace(CONCEPT, guidance=guidance))
    base = Recomputed(context, denoiser, batch)
    assert batch.concept is not None
    noised = draw_partly(context, batch, batch.concept, NUMBER)
    loss = loss_of(context, batch, NUMBER)

    at = noised.latents_BCHW.double()
    sigma = noised.sigmas_B[0].item()
    neutral, positive, unconditional = (base.velocity(text, at, sigma) for text in (NEUTRAL, POSITIVE, UNCONDITIONAL))
    target = neutral - 1.5 * (positive - unconditional)
    merge_into(denoiser, context, CONCEPT.multiplier)
    generator = generator_for(SEED, "concept", NUMBER)
    noise = context.arch.objective.draw_noise(torch.zeros_like(noised.latents_BCHW), generator).double()
    expected, level = base.drawn(noise, guidance)
    torch.testing.assert_close(noised.latents_BCHW.double(), expected, **FLOAT32_SAMPLED)
    assert level == pytest.approx(sigma, rel=1e-6) and 0 < level < 1

    by_hand = (base.velocity(CAPTION, at, sigma) - target).square().mean() * 0.3
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-4, atol=0.0)
    assert by_hand > 1e-4
    context.network.set_multiplier(0.0)
    away: Any = noised.latents_BCHW.double() - noise
    assert away.abs().max() > 0.1, "the latents are partly drawn"

"""One LECO step against diffusers' pipelines and a float64 recomputation with the adapter merged."""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sdxl.options import SdxlOptions
from library.architectures.specs import recognise_base_model
from library.base.randomness import generator_for
from library.data.concepts.prompt_pairs import resolve_guidance
from library.options.leco import leco_options
from library.options.train import TrainOptions
from library.options.training.concepts import ConceptOptions
from library.protocols import Architecture
from library.training.step.concepts import build_prompt, draw_partly
from library.training.step.conditioning import CaptionMemo
from library.training.step.context import Models, StepContext
from library.training.step.denoising import add_noise_at
from library.training.step.losses import loss_of
from library.types import Batch, Concept, Noised
from networks import lora
from networks.core.protocol import AdoptedNetwork
from tests.tiny.bases import BASES
from tests.tolerances import FLOAT32_SAMPLED

SEED, NUMBER, STEPS = 3, 17, 8
CAPTION, POSITIVE, UNCONDITIONAL, NEUTRAL = "a red cat", "a dog", "red", "and"
CONCEPT = Concept(
    positive=POSITIVE, unconditional=UNCONDITIONAL, neutral=NEUTRAL, push=-1.5, multiplier=-0.7, num_steps=STEPS,
    num_denoised=5, guidance=2.5,
)  # fmt: skip


def batch_of(concept: Concept = CONCEPT, sizes: tuple[float, ...] = (96, 64, 0, 0, 96, 64)) -> Batch:
    """Return a batch of two samples of 96 x 64 (height x width)."""
    return Batch(
        keys=["one", "other"], captions=[CAPTION] * 2, pixels_BCHW=None, latents_BCHW=None, conditioning=None,
        loss_weights_B=torch.full((2,), 0.3), masks_B1HW=None, sizes_B6=torch.tensor([sizes] * 2), attributes=[{}, {}],
        concept=concept,
    )  # fmt: skip


def options_for(kind: type[TrainOptions], folder: Path, **values: Any) -> Any:
    return kind().with_values({"pretrained_model_name_or_path": str(folder), **values})


def context_of(arch: Architecture) -> StepContext:
    """Return a context with a random adapter on the tiny model, after text encoding and without text encoders."""
    encoders, denoiser = arch.load.text_encoders(), arch.load.denoiser()
    view = arch.view([], denoiser)
    torch.manual_seed(5)
    module = lora.create_network(1.0, 4, 4.0, None, view[0], view[1], conv_dim="2", conv_alpha="2")
    network = AdoptedNetwork(module)
    network.apply_to(*view, False, True)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_up" in name:
                parameter.normal_(0, 0.1)
    return StepContext(
        arch=arch,
        models=Models(denoiser, [], None, view),
        network=network,
        seed=SEED,
        device=torch.device("cpu"),
        autocast=nullcontext,
        trains_text_encoder=False,
        captions=CaptionMemo(lambda captions: arch.text.encode(encoders, arch.text.tokenize(captions))),
    )


def sd_context(folder: Path, **values: Any) -> StepContext:
    from library.architectures.sd.assembly import build

    return context_of(build(options_for(TrainOptions, folder, **values)))


def sdxl_context(folder: Path) -> StepContext:
    from library.architectures.sdxl.assembly import build

    return context_of(build(options_for(SdxlOptions, folder)))


@torch.no_grad()
def merge_into(unet: Any, context: StepContext, multiplier: float) -> Any:
    """Merge the adapter's changes into a diffusers U-Net, matching layers by path."""
    module: Any = context.network.module
    paths = {id(layer): path for path, layer in context.models.denoiser.named_modules()}
    for adapter in module.adapters.values():
        adapter.multiplier = multiplier
        layer = unet.get_submodule(paths[id(adapter.target.module)])
        for name, value in adapter.merged().items():
            getattr(layer, name).copy_(value)
    return unet


def pipeline_of(kind: str, folder: Path, **settings: Any) -> Any:
    import diffusers

    pipeline_options = {} if kind.endswith("XLPipeline") else {"safety_checker": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, kind).from_pretrained(str(folder), local_files_only=True, **pipeline_options)
    pipeline.scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **settings
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of_pipeline(pipeline: Any, **more: Any) -> Tensor:
    """Return the latents of two images after five of eight steps."""
    captured: list[Tensor] = []

    def look(_: Any, index: int, timestep: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        captured.append(values["latents"].clone())
        return values

    pipeline(
        CAPTION, negative_prompt=UNCONDITIONAL, height=96, width=64, num_inference_steps=STEPS, guidance_scale=2.5,
        num_images_per_prompt=2, generator=generator_for(SEED, "concept", NUMBER), output_type="latent",
        callback_on_step_end=look, **more,
    )  # fmt: skip
    return captured[4]


@pytest.mark.parametrize("velocity", [False, True])
def test_the_latents_match_the_pipeline_with_the_adapter_merged(tiny_sd_folder: Path, velocity: bool) -> None:
    context = sd_context(tiny_sd_folder, v_parameterization=velocity)
    pipeline = pipeline_of(
        "StableDiffusionPipeline", tiny_sd_folder, prediction_type="v_prediction" if velocity else "epsilon"
    )
    merge_into(pipeline.unet, context, CONCEPT.multiplier)
    noised = draw_partly(context, batch_of(), CONCEPT, NUMBER)
    torch.testing.assert_close(noised.latents_BCHW, latents_of_pipeline(pipeline), **FLOAT32_SAMPLED)
    assert noised.timesteps_B.tolist() == [pipeline.scheduler.timesteps[5].item()] * 2 == [250.0] * 2


def test_sdxl_receives_the_generated_sizes(tiny_sdxl_folder: Path) -> None:
    context = sdxl_context(tiny_sdxl_folder)
    pipeline = pipeline_of("StableDiffusionXLPipeline", tiny_sdxl_folder)
    merge_into(pipeline.unet, context, CONCEPT.multiplier)
    sizes = {"original_size": (150, 140), "crops_coords_top_left": (31, 7), "target_size": (96, 64)}
    expected = latents_of_pipeline(pipeline, **{**sizes, **{f"negative_{name}": size for name, size in sizes.items()}})
    noised = draw_partly(context, batch_of(sizes=(150, 140, 31, 7, 96, 64)), CONCEPT, NUMBER)
    torch.testing.assert_close(noised.latents_BCHW, expected, **FLOAT32_SAMPLED)
    other = draw_partly(context, batch_of(), CONCEPT, NUMBER)
    assert (other.latents_BCHW - expected).abs().max() > 0.01, "sizes count"


def test_only_prompts_that_affect_the_target_are_predicted(tiny_sd_folder: Path) -> None:
    context = sd_context(tiny_sd_folder)
    predicted: list[int] = []

    def predict(denoiser: Any, noised: Noised, conditioning: Any, batch: Batch) -> Tensor:
        predicted.append(len(noised.latents_BCHW))
        return context.arch.predict(denoiser, noised, conditioning, batch)

    counting = replace(context, arch=replace(context.arch, predict=predict))
    loss_of(counting, batch_of(replace(CONCEPT, guidance=1.0)), NUMBER)
    assert predicted == [2] * 5 + [6] + [2], "the way, the base model about three prompts, the adapted model"
    predicted.clear()
    loss_of(counting, batch_of(replace(CONCEPT, neutral=UNCONDITIONAL)), NUMBER)
    assert predicted == [4] * 5 + [4] + [2], "equal prompts are asked once"
    predicted.clear()
    loss_of(counting, batch_of(replace(CONCEPT, push=0.0)), NUMBER)
    assert predicted == [4] * 5 + [2] + [2], "nothing is pushed: the target is the neutral prediction"


@torch.no_grad()
def predict_in_float64(unet: Any, context: StepContext, text: str, noised: Noised) -> Tensor:
    """Return the prediction of a U-Net in float64."""
    features = context.captions([text] * 2)["hidden_state"].double()
    prediction: Tensor = unet(noised.latents_BCHW.double(), noised.timesteps_B, encoder_hidden_states=features).sample
    return prediction


def snr(timestep: int) -> float:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[timestep].item()
    return abar / (1 - abar)


@pytest.mark.parametrize(("velocity", "gamma"), [(False, None), (False, 5.0), (True, 5.0)])
def test_target_and_loss_match_a_float64_recomputation(
    tiny_sd_folder: Path, velocity: bool, gamma: float | None
) -> None:
    context = sd_context(tiny_sd_folder, v_parameterization=velocity, min_snr_gamma=gamma)
    noised = draw_partly(context, batch_of(), CONCEPT, NUMBER)
    loss = loss_of(context, batch_of(), NUMBER)

    base = pipeline_of("StableDiffusionPipeline", tiny_sd_folder).unet.double()
    target = predict_in_float64(base, context, NEUTRAL, noised) - 1.5 * (
        predict_in_float64(base, context, POSITIVE, noised) - predict_in_float64(base, context, UNCONDITIONAL, noised)
    )
    adapted = merge_into(base, context, CONCEPT.multiplier)
    ratio = snr(250)
    weight = 1.0 if gamma is None else min(gamma, ratio) / (ratio + 1 if velocity else ratio)
    expected = (predict_in_float64(adapted, context, CAPTION, noised) - target).square().mean() * 0.3 * weight
    # Both float32 U-Nets have relative errors of about 1e-6; the loss uses the difference of their predictions.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0.0)
    assert expected > 1e-3


def test_the_gradient_flows_only_through_the_last_prediction(tiny_sd_folder: Path) -> None:
    """No gradient flows through latents or target, and the adapter keeps its strength in the backward pass."""
    context = sd_context(tiny_sd_folder)
    batch = batch_of()
    loss_of(context, batch, NUMBER).backward()
    module: Any = context.network.module
    actual = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert actual and all(adapter.multiplier == CONCEPT.multiplier for adapter in module.adapters.values())
    module.zero_grad()

    noised = draw_partly(context, batch, CONCEPT, NUMBER)
    assert not noised.latents_BCHW.requires_grad
    at_rest = add_noise_at(type("Level", (), {"timestep": 250.0, "sigma": 1.0})(), noised.latents_BCHW.detach())
    prediction = context.models.denoiser(
        at_rest.latents_BCHW, 250, encoder_hidden_states=context.captions([CAPTION] * 2)["hidden_state"]
    ).sample
    base = pipeline_of("StableDiffusionPipeline", tiny_sd_folder).unet.double()
    parts = [predict_in_float64(base, context, text, noised).float() for text in (NEUTRAL, POSITIVE, UNCONDITIONAL)]
    ((prediction - (parts[0] - 1.5 * (parts[1] - parts[2]))).square().mean() * 0.3).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_random_draws_depend_only_on_the_batch_number(tiny_sd_folder: Path) -> None:
    context = sd_context(tiny_sd_folder, noise_offset=0.1)
    first, other = loss_of(context, batch_of(), 7), loss_of(context, batch_of(), 8)
    torch.manual_seed(99)
    assert loss_of(context, batch_of(), 7).item() == first.item() != other.item()


def test_the_noise_offset_shifts_whole_channels_of_the_initial_noise(tiny_sd_folder: Path) -> None:
    plain, shifted = sd_context(tiny_sd_folder), sd_context(tiny_sd_folder, noise_offset=0.5)
    blank = torch.zeros(2, 4, 12, 8)
    noise, other = (c.arch.objective.draw_noise(blank, generator_for(1, "x")) for c in (plain, shifted))
    difference = other - noise
    assert difference.flatten(2).std(2).max() < 1e-6 < difference.abs().min()


# One LECO step on every flow model against a float64 recomputation with the adapter merged.

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

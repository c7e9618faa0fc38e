"""The flow matching objective: a straight flow between latent and noise (rectified flow, Liu et al. 2022).

The noisy latent is x = (1 - sigma) * latent + sigma * noise, and its velocity toward noise is noise - latent. Letters:
B samples, C channels, H height, W width.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from library.base.errors import about
from library.diffusion.noise import draw_normal, perturb_input
from library.diffusion.timesteps import (
    NUM_TIMESTEPS,
    PATCH,
    LevelDraws,
    LevelSampler,
    build_level_sampler,
    resolve_timestep_range,
    scheme_weights,
    takes_offset,
)
from library.diffusion.weighting import check_huber, huber_threshold, pointwise_error
from library.memory.devices import send
from library.options.training.flow import FlowPredictionOptions, FlowSamplingOptions, FlowWeightingOptions
from library.options.training.loss import LossOptions
from library.options.training.noise import NoiseOptions
from library.types import Noised

logger = logging.getLogger(__name__)

MOST_REDRAWS = 1000

Target = Literal["noise - latent", "latent - noise", "latent"]

IGNORES: Mapping[str, str] = dict.fromkeys(  # options without effect on a flow model
    (
        "noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations",
        "zero_terminal_snr", "min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss",
        "debiased_estimation_loss",
    ),
    "it is for DDPM models",
)  # fmt: skip
SCHEME_RECORDS = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")
RECORDS = (  # options recorded in saved files as ss_<option>
    *SCHEME_RECORDS, "timestep_sampling", "sigmoid_scale", "model_prediction_type", "discrete_flow_shift",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class FlowMatching:
    """The objective of predicting the flow at a noise level between 0 and 1.

    `corrupt` draws from its generator in this order, skipping what is disabled: noise; strength and values of the extra
    input noise; noise levels. The strength is one number for the batch. The drawn levels are rescaled to the range
    between the lowest and the highest timestep, unless `keeps_shape`.
    """

    noise: NoiseOptions
    weighting: LossOptions
    draw_levels: LevelSampler
    target_kind: Target
    prediction_type: str  # a value of `model_prediction_type`
    loss_scheme: str  # the `weighting_scheme` that weights the loss; "none" for no weights
    has_whole_timesteps: bool = False  # levels are thousandths, 0 to 999
    tells_whole_timesteps: bool = False  # the denoiser gets its timestep rounded down to a whole number
    takes_offset: bool = False  # levels are computed from normal values, to which an offset can be added
    num_strata: int = 1  # equal parts of the distribution of levels, each drawn equally often
    keeps_shape: bool = False  # levels outside of the range are drawn again, instead of rescaling all to the range
    timestep: int | None = None  # of every sample, if fixed for validation

    def __post_init__(self) -> None:
        """Raise UserError for timesteps outside 0..1000 and for invalid Huber thresholds."""
        resolve_timestep_range(self.noise, NUM_TIMESTEPS)
        check_huber(self.weighting)

    def corrupt(
        self,
        clean_BCHW: Tensor,
        generator: torch.Generator,
        offsets_B: Tensor | None = None,
        uniforms_B: Tensor | None = None,
    ) -> Noised:
        """Add noise at a level drawn for each sample. Tensors keep the latents' dtype and device; the arithmetic is
        float32.

        `timesteps_B` is 1000 times the level, float32, rounded down if `tells_whole_timesteps`. Offsets are added to
        the normal values from which the levels are computed, if there are any (`takes_offset`). `uniforms_B` are the
        draws from `stratify` that the levels are computed from.
        """
        clean = clean_BCHW.float()
        noise_BCHW = self.draw_noise(clean, generator)
        input_noise_BCHW = perturb_input(noise_BCHW, self.noise, generator)
        B, _, H, W = clean.shape
        # Timesteps stay in float32: those of bfloat16 are 4 apart between 512 and 1000.
        timesteps_B = send(self.draw_timesteps(LevelDraws(B, H, W, generator, offsets_B, uniforms_B)), clean.device)
        sigmas_B = timesteps_B / NUM_TIMESTEPS
        sigmas_B111 = sigmas_B.view(-1, 1, 1, 1)
        return Noised(
            latents_BCHW=((1 - sigmas_B111) * clean + sigmas_B111 * input_noise_BCHW).to(clean_BCHW.dtype),
            clean_BCHW=clean_BCHW,
            noise_BCHW=noise_BCHW.to(clean_BCHW.dtype),
            sigmas_B=sigmas_B,
            timesteps_B=timesteps_B.floor() if self.tells_whole_timesteps else timesteps_B,
        )

    def draw_noise(self, clean_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Draw white noise in the shape of the latents, float32."""
        return draw_normal(clean_BCHW.shape, generator, clean_BCHW.device)

    def draw_timesteps(self, draws: LevelDraws) -> Tensor:
        """Draw timesteps, 1000 times the noise level, float32, on the CPU. If the range is empty, every sample gets
        its upper limit. Raises UserError if `keeps_shape` and the levels hardly ever lie in the range."""
        lowest, highest = resolve_timestep_range(self.noise, NUM_TIMESTEPS)
        if self.timestep is not None or lowest >= highest:
            return torch.full((draws.num_samples,), float(highest if self.timestep is None else self.timestep))
        if self.keeps_shape:
            timesteps_B = self.draw_inside(lowest, highest, draws)
        else:
            timesteps_B = self.draw_levels(draws) * (highest - lowest) + lowest
        # A drawn level of 1 would be `highest` itself, which is outside of the range.
        return timesteps_B.floor().clamp(max=highest - 1) if self.has_whole_timesteps else timesteps_B

    def draw_inside(self, lowest: int, highest: int, draws: LevelDraws) -> Tensor:
        """Draw timesteps of the whole distribution until each lies in the range."""
        timesteps_B = NUM_TIMESTEPS * self.draw_levels(draws)
        for _ in range(MOST_REDRAWS):
            is_inside_B = (timesteps_B >= lowest) & (timesteps_B <= highest)
            if is_inside_B.all():
                return timesteps_B
            redrawn_B = NUM_TIMESTEPS * self.draw_levels(replace(draws, uniforms_B=None))
            timesteps_B = torch.where(is_inside_B, timesteps_B, redrawn_B)
        raise about("--preserve_distribution_shape")(
            f": in {MOST_REDRAWS} draws no noise level lay between --min_timestep {lowest} and --max_timestep "
            f"{highest}",
            "widen the range, choose another --timestep_sampling, or leave the option out",
        )

    def noise_levels(self, noised: Noised) -> Tensor:
        """Return the share of noise in the latents, float32, shape B."""
        return noised.sigmas_B.float()

    def estimate(self, output_BCHW: Tensor, noised: Noised) -> Tensor:
        """Convert the denoiser's output p to the quantity that `target` returns, float32. With the noisy latent x,
        `raw` is p, `additive` is p + x, and `sigma_scaled` is x - sigma p."""
        output_BCHW, x_BCHW = output_BCHW.float(), noised.latents_BCHW.float()
        if self.prediction_type == "additive":
            return output_BCHW + x_BCHW
        if self.prediction_type == "sigma_scaled":
            return x_BCHW - noised.sigmas_B.view(-1, 1, 1, 1) * output_BCHW
        return output_BCHW

    def target(self, noised: Noised) -> Tensor:
        """Return the training target of `estimate`, float32."""
        clean_BCHW, noise_BCHW = noised.clean_BCHW.float(), noised.noise_BCHW.float()
        if self.target_kind == "latent":
            return clean_BCHW
        return noise_BCHW - clean_BCHW if self.target_kind == "noise - latent" else clean_BCHW - noise_BCHW

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor, noised: Noised) -> Tensor:
        """Return the error of every latent value times the weight of its noise level, float32, shape BCHW."""
        threshold_B = None
        if self.weighting.loss_type in ("huber", "smooth_l1"):
            # Infinite for pure noise, where the "snr" schedule gives huber_c as it should.
            noise_per_signal_B = noised.sigmas_B / (1 - noised.sigmas_B)
            threshold_B = huber_threshold(self.weighting, noise_per_signal_B, noised.timesteps_B, NUM_TIMESTEPS)
        error_BCHW = pointwise_error(prediction_BCHW, target_BCHW, self.weighting.loss_type, threshold_B)
        return error_BCHW * scheme_weights(self.loss_scheme, noised.sigmas_B).view(-1, 1, 1, 1)

    def on(self, device: torch.device) -> "FlowMatching":
        """Return self: there are no tables to move."""
        return self

    def at_timestep(self, timestep: int) -> "FlowMatching":
        """Return this objective at one fixed timestep, for validation."""
        return replace(self, timestep=timestep)


class SampledFlowOptions(Protocol):
    """The options of a model whose timestep sampling is an option."""

    @property
    def noise(self) -> NoiseOptions: ...
    @property
    def loss(self) -> LossOptions: ...
    @property
    def flow_sampling(self) -> FlowSamplingOptions: ...
    @property
    def flow_weighting(self) -> FlowWeightingOptions: ...


def build_sampled_flow(
    options: SampledFlowOptions,
    prediction_type: str = "raw",
    *,
    target_kind: Target = "noise - latent",
    always_weights_loss: bool = False,
    tells_whole_timesteps: bool = False,
    patch: int = PATCH,
) -> FlowMatching:
    """Build the objective of the models whose timestep sampling is an option; a token of theirs covers `patch` x
    `patch` latents.

    The weighting scheme weights the loss if `always_weights_loss`, or if the prediction is an estimate of the latent
    (sigma_scaled). Raises UserError for invalid timesteps or Huber thresholds; warns about settings without effect.
    """
    sampling, weighting = options.flow_sampling, options.flow_weighting
    weights_loss = always_weights_loss or prediction_type == "sigma_scaled"
    for line in (
        *find_unused_settings(sampling, weighting, weights_loss),
        *find_target_mismatch(prediction_type, target_kind),
    ):
        logger.warning("%s", line)
    return FlowMatching(
        options.noise,
        options.loss,
        build_level_sampler(sampling, weighting, patch),
        target_kind,
        prediction_type,
        weighting.weighting_scheme if weights_loss else "none",
        tells_whole_timesteps=tells_whole_timesteps,
        takes_offset=takes_offset(weighting, sampling),
        num_strata=sampling.num_timestep_buckets or 1,
        keeps_shape=sampling.preserve_distribution_shape,
    )


class PredictedFlowOptions(SampledFlowOptions, Protocol):
    """The options of a model whose interpretation is an option too."""

    @property
    def flow_prediction(self) -> FlowPredictionOptions: ...


def build_predicted_flow(options: PredictedFlowOptions, **settings: Any) -> FlowMatching:
    """Build the objective by `build_sampled_flow`, with the prediction type that the options name."""
    return build_sampled_flow(options, options.flow_prediction.model_prediction_type, **settings)


def find_unused_settings(
    sampling: FlowSamplingOptions, weighting: FlowWeightingOptions, weights_loss: bool
) -> Iterator[str]:
    """Yield a warning for every setting that has no effect in combination with the others."""
    kind, scheme = sampling.timestep_sampling, weighting.weighting_scheme
    if scheme in ("logit_normal", "mode") and kind != "sigma":
        yield (
            f"--weighting_scheme {scheme} has no effect with --timestep_sampling {kind}; it shapes the draws of "
            "--timestep_sampling sigma"
        )
    if scheme in ("sigma_sqrt", "cosmap") and not weights_loss:
        yield f"--weighting_scheme {scheme} has no effect: it requires --model_prediction_type sigma_scaled"


def find_target_mismatch(prediction_type: str, target_kind: Target) -> Iterator[str]:
    """Yield a warning if the prediction type does not match the target."""
    if prediction_type != "raw" and target_kind != "latent":
        yield (
            f"--model_prediction_type {prediction_type} converts the output to something other than the target "
            f"({target_kind}), so the model unlearns what it knows. This is supported because sd-scripts supports it; "
            "use --model_prediction_type raw to train as the model was trained"
        )

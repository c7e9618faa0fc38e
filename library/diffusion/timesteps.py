"""Sampling of noise levels for training: whole timesteps for DDPM; for flow matching shares of noise between 0 (latent)
and 1 (pure noise).

Letters: B samples, z standard normal, s a shift, m its logarithm. Everything is drawn on the CPU from the given
generator; shares are float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.base.errors import about
from library.base.randomness import generator_for, random_for
from library.options.training.flow import FlowSamplingOptions, FlowWeightingOptions
from library.options.training.noise import NoiseOptions

NUM_TIMESTEPS = 1000  # discrete noise levels of the DDPM models, and the scale of flow timesteps
PATCH = 2  # side, in latents, of the patch that most transformers read as one token
Ends = tuple[tuple[int, float], tuple[int, float]]
# As in diffusers' `calculate_shift`, where m is called mu.
FLUX_SHIFT_ENDS: Ends = ((256, 0.5), (4096, 1.15))  # (tokens, m) at both ends of FLUX.1's training sizes
QWEN_SHIFT_ENDS: Ends = ((256, 0.5), (8192, 0.9))
KREA2_SHIFT_ENDS: Ends = ((256, 0.5), (6400, 1.15))
ENDS = {"qwen": QWEN_SHIFT_ENDS, "krea2": KREA2_SHIFT_ENDS}  # by a part of the name of a timestep sampling
# Names of musubi-tuner: cumulative shares of shifted draws, and of draws by the option's log-SNR. The rest has
# DETAIL_LOGSNR.
HYBRID_SHARES = {"qinglong_flux": (0.79, 0.9), "qinglong_qwen": (0.95, 0.95)}
DETAIL_LOGSNR = (5.36, 1.0)  # mean and standard deviation
SMALLEST_DRAW = 1e-7  # minimum of NextDiT's draws
FINEST_LEVEL = 1 / NUM_TIMESTEPS  # lower levels get the weight of this one, because sigma ** -2 is infinite at 0


def shift_sigmas(sigmas_B: Tensor, shift: float) -> Tensor:
    """Shift noise levels toward pure noise; 1 leaves them unchanged, SD3 uses 3 (Esser et al. 2024, eq. 23)."""
    return shift * sigmas_B / (1 + (shift - 1) * sigmas_B)


def resolution_shift(latent_height: int, latent_width: int, ends: Ends = FLUX_SHIFT_ENDS, patch: int = PATCH) -> float:
    """Return a shift e^m, m linear in the number of tokens, so that larger images get more noise. Default: FLUX's."""
    (min_tokens, low), (max_tokens, high) = ends
    num_tokens = (latent_height // patch) * (latent_width // patch)
    return math.exp(low + (high - low) * (num_tokens - min_tokens) / (max_tokens - min_tokens))


def stratify(num_strata: int, seed: int, first: int, num_samples: int) -> Tensor:
    """Return uniform values in 0..1, float32, shape B, for the draws `first`, `first` + 1, ... of a run.

    Of each `num_strata` successive draws one lies in each of as many equal parts of 0..1, in random order. A value
    depends only on the seed and the number of its draw.
    """

    def value(draw: int) -> float:
        group, place = divmod(draw, num_strata)
        # Each group of draws has its own permutation of the strata.
        stratum = int(torch.randperm(num_strata, generator=generator_for(seed, "strata", group))[place])
        return (stratum + random_for(seed, "level", draw).random()) / num_strata

    return torch.tensor([value(draw) for draw in range(first, first + num_samples)])


@dataclass(frozen=True)
class LevelDraws:
    """The random values from which the noise levels of samples of one latent size are computed.

    Offsets, if levels are computed from normal values, add to these. `uniforms_B`, in 0..1, replaces the draws that a
    level is computed from; a normal value is then their quantile.
    """

    num_samples: int
    latent_height: int
    latent_width: int
    generator: torch.Generator
    offsets_B: Tensor | None = None
    uniforms_B: Tensor | None = None

    def uniform(self) -> Tensor:
        """Draw uniform values in 0..1, unless they are given."""
        given_B = self.uniforms_B
        return torch.rand(self.num_samples, generator=self.generator) if given_B is None else given_B

    def normal(self, direction: int = 1) -> Tensor:
        """Draw standard normal values, or take the quantiles of given uniform ones, and add each sample's offset, or
        subtract it if `direction` is -1."""
        if self.uniforms_B is None:
            z_B = torch.randn(self.num_samples, generator=self.generator)
        else:
            # 0 and 1, to which float32 rounds, have no finite quantile.
            z_B = torch.special.ndtri(self.uniforms_B.clamp(SMALLEST_DRAW, 1 - SMALLEST_DRAW))
        return z_B if self.offsets_B is None else z_B + direction * self.offsets_B


LevelSampler = Callable[[LevelDraws], Tensor]
"""Draws shares of noise, shape B."""


def takes_offset(weighting: FlowWeightingOptions, sampling: FlowSamplingOptions | None = None) -> bool:
    """Return True if levels are computed from a normal value, to which an offset can be added. SD3 has no
    `timestep_sampling`."""
    if sampling is not None and sampling.timestep_sampling != "sigma":
        return sampling.timestep_sampling not in ("uniform", "nextdit_shift", *HYBRID_SHARES)
    return weighting.weighting_scheme == "logit_normal"


def draw_scheme(options: FlowWeightingOptions, draws: LevelDraws, direction: int = 1) -> Tensor:
    """Draw values in 0..1 from the density of the weighting scheme; uniform for schemes that only weight the loss.

    logit_normal is the sigmoid of a normal value, which offsets move in `direction`. mode is
    1 - u - c (cos(pi u / 2)^2 - 1 + u) with scale c (Esser et al. 2024, section 3.1).
    """
    if options.weighting_scheme == "logit_normal":
        return torch.sigmoid(options.logit_mean + options.logit_std * draws.normal(direction))
    u_B = draws.uniform()
    if options.weighting_scheme == "mode":
        c = options.mode_scale
        # Rounding, and large scales, lead outside of 0..1.
        return (1 - u_B - c * ((math.pi / 2 * u_B).cos().square() - 1 + u_B)).clamp(0, 1)
    return u_B


def scheme_weights(scheme: str, sigmas_B: Tensor) -> Tensor:
    """Return the loss weight of each level, float32: sigma^-2 (sigma_sqrt), 2 / (pi (1 - 2 sigma + 2 sigma^2))
    (cosmap), or 1."""
    sigmas_B = sigmas_B.float()
    if scheme == "sigma_sqrt":
        return sigmas_B.clamp(min=FINEST_LEVEL) ** -2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas_B + 2 * sigmas_B.square()))
    return torch.ones_like(sigmas_B)


def build_shifted_scheme(options: FlowWeightingOptions, shift: float) -> LevelSampler:
    """Build SD3's level sampler: draws from the weighting scheme, shifted."""
    return lambda draws: shift_sigmas(draw_scheme(options, draws), shift)


def draw_logsnr(mean: float, deviation: float, draws: LevelDraws) -> Tensor:
    """Draw levels with a normally distributed log-SNR, 2 log((1 - sigma) / sigma) (Choi et al. 2024,
    arXiv:2411.14793). Positive offsets move a level toward noise."""
    return torch.sigmoid(-(mean + deviation * draws.normal(-1)) / 2)


def build_level_sampler(
    sampling: FlowSamplingOptions, weighting: FlowWeightingOptions, patch: int = PATCH
) -> LevelSampler:
    """Build the level sampler that the options name, for a denoiser whose tokens are `patch` latents a side.

    With u uniform, z normal and k = `sigmoid_scale`, the values of `timestep_sampling` are:
    - `sigma`: entry int(1000 u) of a shifted table that descends from pure noise; u is drawn by the weighting scheme.
    - `uniform`: u. `sigmoid`: q = sigmoid(k (z + offset)).
    - `shift`: q with a fixed shift. `flux_shift`, `flux2_shift`, `qwen_shift`, `krea2_shift`: q with a shift that grows
    with the image. `nextdit_shift`: u with such a shift.
    - `logsnr`: a normal log-SNR.
    - the hybrids: a mixture of a shift and two log-SNR distributions.
    """
    kind, k, shift = sampling.timestep_sampling, sampling.sigmoid_scale, sampling.discrete_flow_shift
    style = weighting.logit_mean, weighting.logit_std
    ends = next((ends for name, ends in ENDS.items() if name in kind), FLUX_SHIFT_ENDS)

    def draw(draws: LevelDraws) -> Tensor:
        if kind in HYBRID_SHARES:
            draws = replace(draws, offsets_B=None)  # not all of their levels come from a normal value of the logit
        if kind == "sigma":
            u_B = draw_scheme(weighting, draws, -1)  # the table descends, so a draw near 1 means little noise
            # A draw of exactly 1 has no entry.
            indices_B = (u_B * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)
            return shift_sigmas((NUM_TIMESTEPS - indices_B) / NUM_TIMESTEPS, shift)
        if kind == "logsnr":
            return draw_logsnr(*style, draws)
        if kind in ("uniform", "nextdit_shift"):
            q_B = draws.uniform()
        else:
            q_B = torch.sigmoid(k * draws.normal())
        if kind in ("uniform", "sigmoid"):
            return q_B
        if kind == "shift":
            return shift_sigmas(q_B, shift)
        if kind == "nextdit_shift":
            q_B = q_B.clamp(min=SMALLEST_DRAW)
        q_B = shift_sigmas(q_B, resolution_shift(draws.latent_height, draws.latent_width, ends, patch))
        if kind not in HYBRID_SHARES:
            return q_B
        first, second = HYBRID_SHARES[kind]
        fresh = replace(draws, uniforms_B=None)
        u_B = fresh.uniform()
        style_B, detail_B = (draw_logsnr(*logsnr, fresh) for logsnr in (style, DETAIL_LOGSNR))
        return torch.where(u_B < first, q_B, torch.where(u_B < second, style_B, detail_B))

    return draw


def draw_timesteps(
    num_samples: int, min_timestep: int, max_timestep: int, generator: torch.Generator, *, num_timesteps: int
) -> Tensor:
    """Draw a whole timestep for each sample, uniform in [min_timestep, max_timestep); int64, shape B, on the CPU.

    If min_timestep is not below max_timestep, every sample gets max_timestep and nothing is drawn. Validation uses this
    to fix a level. Raises UserError for limits outside the schedule.
    """
    check_timestep_range(min_timestep, max_timestep, num_timesteps)
    if min_timestep >= max_timestep:
        return torch.full((num_samples,), max_timestep, dtype=torch.int64)
    return torch.randint(min_timestep, max_timestep, (num_samples,), generator=generator)


def resolve_timestep_range(noise: NoiseOptions, num_timesteps: int) -> tuple[int, int]:
    """Return (lowest, highest) timestep of a run. Raises UserError for limits outside the schedule."""
    min_timestep = 0 if noise.min_timestep is None else noise.min_timestep
    max_timestep = num_timesteps if noise.max_timestep is None else noise.max_timestep
    check_timestep_range(min_timestep, max_timestep, num_timesteps)
    return min_timestep, max_timestep


def check_timestep_range(min_timestep: int, max_timestep: int, num_timesteps: int) -> None:
    """Raise UserError for limits outside the schedule."""
    if not 0 <= min_timestep < num_timesteps:
        raise about("--min_timestep")(f"is {min_timestep}; it must lie in 0..{num_timesteps - 1}")
    # From an empty range every sample gets `max_timestep` itself, so it must be in the schedule.
    highest = num_timesteps if min_timestep < max_timestep else num_timesteps - 1
    if not 0 <= max_timestep <= highest:
        raise about("--max_timestep")(
            f"is {max_timestep}; timesteps are drawn below it, so it must lie in 1..{num_timesteps}"
        )

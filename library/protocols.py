"""Protocols and values that describe a base model: the parts that the trainer calls."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.checkpoints.base_model_spec import BaseModelSpec
from library.diffusion.samplers import Sampler
from library.memory.blocks import BlockRunner, Stacks, chains_of, run_blocks_with, stacks_of
from library.memory.codecs.codec import RequestedFormat
from library.options.caching import TextCachingOptions
from library.options.training.noise import NoiseOptions
from library.types import Batch, Conditioning, Noised, Prompt, Tokens

POSTERIOR_MEAN = "posterior mean"


@dataclass(frozen=True)
class LatentSpec:
    """The latent space of a base model."""

    channels: int
    downscale: int  # pixels per latent along each side
    bucket_step: int  # bucket sides are multiples of this many pixels
    cache_suffix: str  # "_sd.npz"
    had_keys_without_size: bool  # older cache files have keys without the image size
    max_references: int = 0  # reference images that the denoiser accepts, for edit models
    needs_references: bool = False  # a data set without any is refused
    has_alpha: bool = False  # images are encoded as RGBA, opaque ones included
    patch: int = 1  # latents along each side of one of the denoiser's tokens
    computed_as: str = ""  # in caches and states; changes with the way in which latents are computed

    @property
    def vae_suffix(self) -> str:
        """The end of the VAE's name in cache entries."""
        return f" {self.computed_as}" if self.computed_as else ""

    def fits(self, width: int, height: int) -> bool:
        """Return True if images of this size can be encoded and divided into tokens. Bucket sides always fit."""
        # Convolutions of 8 pixels per latent leave out the rest; VAEs that merge latents cannot divide it.
        sides = [side // 8 * 8 for side in (width, height)] if self.downscale == 8 else [width, height]
        return min(sides) > 0 and not any(side % (self.downscale * self.patch) for side in sides)


class Loader(Protocol):
    """A loader of a base model's frozen models. Each call loads one of them in the training dtype, on the CPU."""

    def text_encoders(self) -> list[nn.Module]: ...
    def vae(self) -> nn.Module: ...
    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        """Load the denoiser. With `weight_format`, the weights of its blocks are converted as they are read."""
        ...


class TextPipeline(Protocol):
    """Conversion of captions to the denoiser's conditioning."""

    @property
    def max_tokens(self) -> int:
        """The number of tokens of a caption that reach the model; longer captions are truncated."""
        ...

    def count_tokens(self, caption: str) -> int:
        """Count the tokens of a caption without begin, end and padding."""
        ...

    def tokenize(self, captions: Sequence[str]) -> Tokens: ...
    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning: ...


@dataclass(frozen=True)
class LiveText:
    """The text encoders that stay loaded for training while the outputs of the others are cached."""

    load: Callable[[], list[nn.Module]]  # loads the first of `Loader.text_encoders`, in its order
    keys: tuple[str, ...]  # the features they compute, which replace the cached ones
    encode: Callable[[Sequence[nn.Module], Tokens], Conditioning]  # computes exactly `keys`, with gradients
    num_encoders: int  # number of encoders that `load` returns
    excluded_by: str | None = None  # a network argument that trains an encoder whose outputs would be cached


@dataclass(frozen=True)
class TextCacheSpec:
    """The settings for caching a base model's text features; `keys` name them in `Conditioning` and in files."""

    options: TextCachingOptions
    suffix: str  # "_te_outputs.npz"
    keys: tuple[str, ...]
    encoders: Callable[[], str]
    """Returns a digest of the encoders' weights (`weights.fingerprint`), without loading them. Raises NotThere if
    their files are missing."""
    settings: str  # everything else that affects the values: dtype, token limits, masks
    tokenizers: tuple[Any, ...]  # transformers tokenizers; another one yields different features for the same caption
    constants: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # entries of sd-scripts' files that are the same for all captions
    padding: Mapping[str, float] = field(default_factory=dict)
    """Keys whose length along the second axis (the first without B) differs between captions, with the padding
    value."""
    # Keys whose values the denoiser reads on the host; they stay there so that it does not wait for the GPU.
    on_host: tuple[str, ...] = ()
    live: LiveText | None = None  # None if the encoders are trained only without caching, or not at all
    can_train: bool = True  # whether the encoders support adapters
    bytes_of: Callable[[str], int] | None = None  # the size of a caption's features, if large enough to be logged
    keeps_bits: bool = False  # files store bfloat16 as raw bits; else the first caption is float32, as in sd-scripts
    sees_images: bool = False  # the encoders see reference images; captions are then `CaptionWithImages`
    places_key: str | None = None  # the key with the position of each of those images, if they are among the text


class LatentCodec(Protocol):
    """The latent encoding of a base model: `encode` returns the cached values, `normalize` the denoiser's input."""

    @property
    def spec(self) -> LatentSpec: ...

    def encode(self, vae: nn.Module, pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Sample the posterior of each image with its own generator (CPU); without generators return its mode."""
        ...

    def normalize(self, latents_BCHW: Tensor) -> Tensor: ...
    def decode(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor: ...


class Objective(Protocol):
    """The training objective: the noise that is added and the target of the prediction."""

    @property
    def takes_offset(self) -> bool:
        """True if a sample's offset shifts the noise level that is drawn for it."""
        ...

    @property
    def noise(self) -> NoiseOptions:
        """The options of the noise, with the range of timesteps that is trained."""
        ...

    @property
    def num_strata(self) -> int:
        """The number of equal parts of the distribution of noise levels that are drawn equally often; 1 for one."""
        ...

    def corrupt(
        self,
        clean_BCHW: Tensor,
        generator: torch.Generator,
        offsets_B: Tensor | None = None,
        uniforms_B: Tensor | None = None,
    ) -> Noised: ...
    def draw_noise(self, clean_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the noise that `corrupt` adds, float32."""
        ...

    def noise_levels(self, noised: Noised) -> Tensor:
        """Return each sample's position between the clean latent, 0, and pure noise, 1; float32, shape B."""
        ...

    def estimate(self, output_BCHW: Tensor, noised: Noised) -> Tensor:
        """Convert the denoiser's output to the quantity that `target` returns."""
        ...

    def target(self, noised: Noised) -> Tensor:
        """Return the training target of `estimate`, float32."""
        ...

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor, noised: Noised) -> Tensor:
        """Return the weighted error of every latent value, float32, shape BCHW."""
        ...

    def on(self, device: torch.device) -> "Objective":
        """Return this objective with its look-up tables on the device."""
        ...

    def at_timestep(self, timestep: int) -> "Objective":
        """Return this objective at one fixed noise level (thousandths of noise, 0..999), for validation."""
        ...


class Predict(Protocol):
    """One call of the denoiser, in training, validation and previews alike; returns its raw output."""

    def __call__(self, denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class PromptDefaults:
    """Default settings of a preview prompt; None if the base model has no such setting."""

    num_steps: int
    width: int
    height: int
    scale: float  # of classifier-free guidance; 1 disables it
    size_step: int  # sides are rounded down to multiples of this many pixels
    sampler: str | None = None
    guidance_scale: float | None = None
    cfg_trunc_ratio: float | None = None
    renorm_cfg: float | None = None
    flow_shift: float | None = None


@dataclass(frozen=True)
class Preview:
    """Image generation while a base model is trained.

    `predict(prompt)` returns the call of the denoiser with the prompt's guidance settings. That call receives `Noised`
    with latents, sigmas and the sampler's timesteps (clean latents and noise are NaN), the conditioning of one prompt,
    and a `Batch` with one caption and its size.

    `sampler(prompt)` returns a new sampler: `build_ddpm_sampler`, or `FlowSampler`.
    """

    defaults: PromptDefaults
    text: TextPipeline  # the architecture's own if prompts are encoded like captions
    predict: Callable[[Prompt], Predict]
    sampler: Callable[[Prompt], Sampler]
    format_prompt: Callable[[str], str] = str  # template of a prompt; negative prompts are used unchanged
    draw: Callable[[nn.Module, Prompt, torch.Generator, Callable[[], bool]], Tensor | None] | None = None
    """Draws in a way of the base model's own, instead of `predict` and `sampler`. Called with (denoiser,
    prompt, generator, goes_on); returns latents for `LatentCodec.decode`, or None once `goes_on()` is False."""
    predict_negative: Callable[[Prompt], Predict] | None = None  # for the negative prompt; `predict` if None
    load_denoiser: Callable[[RequestedFormat | None], nn.Module] | None = None
    """Loads, on the CPU, the denoiser that generates the images, if it is not the trained one."""


Vary = Callable[[Conditioning, torch.Generator], Conditioning]
"""A random change of a batch's conditioning in each training step. Not applied in validation and previews."""

AdapterView = Callable[[Sequence[nn.Module], nn.Module], tuple[nn.Module | list[nn.Module], nn.Module]]
"""(text encoders, denoiser) as network modules see them: paths are the names in files, leaves are the actual layers.

The first value is a single module if the base model has one text encoder, else a list, because LyCORIS chooses its
prefixes by that. The second has the attribute `adapter_targets` (networks.core.targets.targets.AdapterTargets).
"""


def expect_any_sizes(sizes: Iterable[tuple[int, int]]) -> None:
    """Do nothing with the sizes of a run."""


def leave_sizes(denoiser: nn.Module, sizes: Sequence[tuple[int, int]]) -> None:
    """Do nothing, for a denoiser that does not depend on the resolutions of the dataset."""


def keep_whole(denoiser: nn.Module, file: Path) -> nn.Module:
    """Return the denoiser, for files whose adapters act on all of it."""
    return denoiser


@dataclass(frozen=True)
class Architecture:
    """A base model, as the parts that the trainer calls."""

    name: str
    load: Loader
    text: TextPipeline
    codec: LatentCodec
    objective: Objective
    predict: Predict
    view: AdapterView
    preview: Preview
    metadata: Mapping[str, str]  # ss_v2, ss_base_model_version and the model's modelspec keys
    ignores: Mapping[str, str] = field(default_factory=dict)  # option without effect -> reason
    specs: Sequence[BaseModelSpec] = ()  # of all base models; used to list the programs that can read a saved file
    text_cache: TextCacheSpec | None = None  # None if text encoder outputs cannot be cached
    vary: Vary | None = None  # None if conditioning is used unchanged
    run_blocks_with: Callable[[nn.Module, BlockRunner], None] = run_blocks_with  # sets the runner of the blocks
    stacks: Callable[[nn.Module], Stacks] = stacks_of  # the blocks that the runner executes
    chains: Callable[[nn.Module], list[nn.ModuleList]] = chains_of  # block lists; the planner counts equal blocks once
    inpaints: bool = False  # the denoiser takes a mask, see `library.diffusion.inpainting`
    fit_to_sizes: Callable[[nn.Module, Sequence[tuple[int, int]]], None] = leave_sizes
    """Passes the resolutions (width, height) of the dataset to the denoiser."""
    expect_sizes: Callable[[Iterable[tuple[int, int]]], None] = expect_any_sizes
    """Hears the sizes (width, height) of the run's images, as far as they are known, before the first step."""
    vae_overflows_in_fp16: bool = False  # the base model's VAE gives NaN in fp16
    tells_sizes: bool = False  # the denoiser is conditioned on original sizes and crops
    part_of: Callable[[nn.Module, Path], nn.Module] = keep_whole
    """Maps the denoiser and an adapter file to the part of the denoiser that the file's adapter acts on."""

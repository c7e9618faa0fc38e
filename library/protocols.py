"""Protocols and values of a base model: the parts that the trainer calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.checkpoints.base_model_spec import BaseModelSpec
from library.diffusion.samplers import Sampler
from library.memory.blocks import BlockRunner, Stacks, chains_of, run_blocks_with, stacks_of
from library.memory.codecs.codec import RequestedFormat
from library.options.caching import TextCachingOptions
from library.types import Batch, Conditioning, Noised, Prompt, Tokens


@dataclass(frozen=True)
class LatentSpec:
    """The latent space of one base model."""

    channels: int
    downscale: int  # pixels per latent in each direction
    bucket_step: int  # bucket sides are multiples of this many pixels
    cache_suffix: str  # "_sd.npz"
    had_keys_without_size: bool  # older cache files have keys without the image size
    max_references: int = 0  # reference images that the denoiser accepts, for edit models
    has_alpha: bool = False  # images are encoded with their alpha channel, opaque ones included


class Loader(Protocol):
    """Loader of the frozen models of a base model, each only when needed, in the training dtype, on the CPU."""

    def text_encoders(self) -> list[nn.Module]: ...
    def vae(self) -> nn.Module: ...
    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        """Load the denoiser; with a `weight_format` the weights inside its blocks are stored in it as they are read."""
        ...


class TextPipeline(Protocol):
    """Conversion of captions to the denoiser's conditioning."""

    @property
    def max_tokens(self) -> int:
        """The number of tokens of a caption that reach the model; longer captions are cut."""
        ...

    def count_tokens(self, caption: str) -> int:
        """Count the tokens of a caption without begin, end and padding."""
        ...

    def tokenize(self, captions: Sequence[str]) -> Tokens: ...
    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning: ...


@dataclass(frozen=True)
class LiveText:
    """The text encoders that stay in memory for training while the outputs of the others are cached."""

    load: Callable[[], list[nn.Module]]  # loads the first of `Loader.text_encoders`, in its order
    keys: tuple[str, ...]  # the features they compute, which replace the cached ones
    encode: Callable[[Sequence[nn.Module], Tokens], Conditioning]  # computes exactly `keys`, with gradients
    num_encoders: int  # number of encoders that `load` returns
    excluded_by: str | None = None  # a network argument that trains an encoder whose outputs would be cached


@dataclass(frozen=True)
class TextCacheSpec:
    """Caching of a base model's text features; `keys` are names of its `Conditioning` and of entries in the files."""

    options: TextCachingOptions
    suffix: str  # "_te_outputs.npz"
    keys: tuple[str, ...]
    encoders: Callable[[], str]
    """Returns a digest of the encoders' weights (`weights.fingerprint`); called before any is loaded. Raises NotThere
    if their files are missing."""
    settings: str  # everything else that affects the values: dtype, token limits, masks
    tokenizers: tuple[Any, ...]  # transformers tokenizers; another one gives other features for the same caption
    constants: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # entries of sd-scripts' files that are the same for all captions
    padding: Mapping[str, float] = field(default_factory=dict)
    """Keys whose second axis (the first without B) differs between captions, with the value that pads shorter ones."""
    # Keys whose values the denoiser reads on the host; they stay there so that it does not wait for the GPU.
    on_host: tuple[str, ...] = ()
    live: LiveText | None = None  # None if the encoders are trained with nothing cached, or not at all
    can_train: bool = True  # whether the encoders can have adapters
    bytes_of: Callable[[str], int] | None = None  # the size of a caption's features, where it is worth a log line
    keeps_bits: bool = False  # files hold bfloat16 as its bits; else the first caption as float32, as in sd-scripts
    places_key: str | None = None
    """The key with the place of each reference image, if the encoders see these: captions are `CaptionWithImages`."""


class LatentCodec(Protocol):
    """The latent encoding of a base model: `encode` returns what is cached, `normalize` what the denoiser gets."""

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
        """True if an offset of a sample moves the noise level drawn for it."""
        ...

    def corrupt(self, clean_BCHW: Tensor, generator: torch.Generator, offsets_B: Tensor | None = None) -> Noised: ...
    def draw_noise(self, clean_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the noise that `corrupt` adds, float32."""
        ...

    def noise_levels(self, noised: Noised) -> Tensor:
        """Return each sample's position between the clean latent, 0, and pure noise, 1; float32, shape B."""
        ...

    def estimate(self, output_BCHW: Tensor, noised: Noised) -> Tensor:
        """Convert the denoiser's output to the terms of the target."""
        ...

    def target(self, noised: Noised) -> Tensor:
        """Return the value that `estimate` is trained to give, float32."""
        ...

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor, noised: Noised) -> Tensor:
        """Return the weighted error of every latent value, float32, shape BCHW."""
        ...

    def on(self, device: torch.device) -> "Objective":
        """Return this objective with its look-up tables on the device."""
        ...

    def at_timestep(self, timestep: int) -> "Objective":
        """Return this objective at one noise level (0..999, the share of noise in thousandths), for validation."""
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
    """Image generation while a base model trains.

    `predict(prompt)` returns the call of the denoiser for a prompt with its guidance settings. That call gets `Noised`
    with latents, sigmas and the sampler's timesteps (clean latents and noise are NaN), the conditioning of one prompt,
    and a `Batch` with one caption and its size.

    `sampler(prompt)` returns a fresh sampler: `build_ddpm_sampler`, or `FlowSampler`.
    """

    defaults: PromptDefaults
    text: TextPipeline  # the architecture's own if prompts are read like captions
    predict: Callable[[Prompt], Predict]
    sampler: Callable[[Prompt], Sampler]
    worded: Callable[[str], str] = str  # template of a prompt; negative prompts are used unchanged
    load_denoiser: Callable[[RequestedFormat | None], nn.Module] | None = None
    """Loads the denoiser whose weights images are drawn with, on the CPU, where it is not the one that is trained."""


Vary = Callable[[Conditioning, torch.Generator], Conditioning]
"""A random change of a batch's conditioning in each training step; not applied in validation and previews."""

AdapterView = Callable[[Sequence[nn.Module], nn.Module], tuple[nn.Module | list[nn.Module], nn.Module]]
"""(text encoders, denoiser) as network modules see them: paths are the names in files, leaves are the real layers.

The first value is a single module if the base model has one text encoder, else a list: LyCORIS chooses its prefixes by
that. The second has the attribute `adapter_targets` (networks.core.targets.targets.AdapterTargets).
"""


def leave_sizes(denoiser: nn.Module, sizes: Sequence[tuple[int, int]]) -> None:
    """Do nothing: the denoiser does not depend on the data set's resolutions."""


@dataclass(frozen=True)
class Architecture:
    """One base model, as the parts that the trainer calls."""

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
    specs: Sequence[BaseModelSpec] = ()  # of all base models, to find the programs that read saved files
    text_cache: TextCacheSpec | None = None  # None if text encoder outputs cannot be cached
    vary: Vary | None = None  # None if conditioning is used unchanged
    run_blocks_with: Callable[[nn.Module, BlockRunner], None] = run_blocks_with  # sets the denoiser's runner
    stacks: Callable[[nn.Module], Stacks] = stacks_of  # the denoiser's blocks that go through the runner
    chains: Callable[[nn.Module], list[nn.ModuleList]] = chains_of  # block lists; the planner counts equal blocks once
    inpaints: bool = False  # the denoiser takes a mask, see `library.diffusion.inpainting`
    fit_to_sizes: Callable[[nn.Module, Sequence[tuple[int, int]]], None] = leave_sizes
    """Tells the denoiser the resolutions (width, height) of the data set."""
    vae_overflows_in_fp16: bool = False  # the base model's VAE gives NaN in fp16
    tells_sizes: bool = False  # the denoiser is conditioned on original sizes and crops

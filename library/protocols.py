"""What a base model must offer: the parts that the trainer calls."""

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
    downscale: int  # pixels per latent, each way
    bucket_step: int  # bucket sides are multiples of this many pixels
    cache_suffix: str  # "_sd.npz"
    had_keys_without_size: bool  # whether older cache files of this base model have one entry, whatever its size


class Loader(Protocol):
    """Gives each model only when it is needed, frozen, in the training dtype, on the CPU."""

    def text_encoders(self) -> list[nn.Module]: ...
    def vae(self) -> nn.Module: ...
    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        """With a `weight_format` the weights inside its blocks are stored in it, each as it is read."""
        ...


class TextPipeline(Protocol):
    """Captions to what the denoiser is conditioned on."""

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption that reach the model; what is longer is cut."""
        ...

    def count_tokens(self, caption: str) -> int:
        """Tokens of the caption without begin, end and padding."""
        ...

    def tokenize(self, captions: Sequence[str]) -> Tokens: ...
    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning: ...


@dataclass(frozen=True)
class LiveText:
    """The text encoders that stay in memory to be trained while the outputs of the others are cached."""

    load: Callable[[], list[nn.Module]]  # the first of those that `Loader.text_encoders` gives, in its order
    keys: tuple[str, ...]  # the features that they give; these take the place of the cached ones
    encode: Callable[[Sequence[nn.Module], Tokens], Conditioning]  # gives exactly `keys`; gradients flow
    num_encoders: int  # that `load` gives
    excluded_by: str | None = None  # a network argument that trains an encoder whose outputs would be cached


@dataclass(frozen=True)
class TextCacheSpec:
    """How a base model's text features are kept; `keys` are names of its `Conditioning` and of entries in the files."""

    options: TextCachingOptions
    suffix: str  # "_te_outputs.npz"
    keys: tuple[str, ...]
    encoders: Callable[[], str]
    """A digest of the encoders' weights (`weights.fingerprint`). It is asked for before any is loaded; raises NotThere
    where their files are not there."""
    settings: str  # what else decides the values besides the caption: dtype, token limits, masks
    tokenizers: tuple[Any, ...]  # of transformers; another one makes other features of the same caption
    constants: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # entries of sd-scripts' files that no caption changes
    padding: Mapping[str, float] = field(default_factory=dict)
    """Keys whose second axis (the first without B) differs between captions, and what fills shorter ones in a batch."""
    on_host: tuple[str, ...] = ()  # keys whose values the denoiser asks for: where these stay, it waits for no card
    live: LiveText | None = None  # None where the encoders are trained with nothing cached, or not at all
    can_train: bool = True  # whether the encoders can have adapters


class LatentCodec(Protocol):
    """`encode` gives what the cache keeps, `normalize` what the denoiser sees."""

    @property
    def spec(self) -> LatentSpec: ...

    def encode(self, vae: nn.Module, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Sample the posterior of each picture with its own generator (CPU)."""
        ...

    def normalize(self, latents_BCHW: Tensor) -> Tensor: ...
    def decode(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor: ...


class Objective(Protocol):
    """What the denoiser learns: which noise it sees and what it must say."""

    @property
    def takes_offset(self) -> bool:
        """Whether an offset of a sample moves the noise levels that are drawn for it."""
        ...

    def corrupt(self, clean_BCHW: Tensor, generator: torch.Generator, offsets_B: Tensor | None = None) -> Noised: ...
    def draw_noise(self, clean_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """The noise that `corrupt` adds, float32."""
        ...

    def noise_levels(self, noised: Noised) -> Tensor:
        """How far each sample is on the way from the clean latent, 0, to pure noise, 1; float32, shape B."""
        ...

    def estimate(self, output_BCHW: Tensor, noised: Noised) -> Tensor:
        """What the denoiser said, in the terms of the target."""
        ...

    def target(self, noised: Noised) -> Tensor:
        """What `estimate` should give, float32."""
        ...

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor, noised: Noised) -> Tensor:
        """The weighted error of every latent value, float32, shape BCHW."""
        ...

    def on(self, device: torch.device) -> "Objective":
        """The same objective with whatever it looks up on the device."""
        ...

    def at_timestep(self, timestep: int) -> "Objective":
        """The same objective at one noise level (0..999, the share of noise in thousandths), for validation."""
        ...


class Predict(Protocol):
    """One call of the denoiser, in training, validation and previews alike: its output as it is."""

    def __call__(self, denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class PromptDefaults:
    """What a prompt that says nothing gets; None where the base model has no such setting."""

    num_steps: int
    width: int
    height: int
    scale: float  # of classifier-free guidance; 1 is without
    size_step: int  # sides are rounded down to multiples of this many pixels
    sampler: str | None = None
    guidance_scale: float | None = None
    cfg_trunc_ratio: float | None = None
    renorm_cfg: float | None = None
    flow_shift: float | None = None


@dataclass(frozen=True)
class Preview:
    """How pictures are drawn while a base model trains.

    `predict(prompt)` gives the call of the denoiser for a prompt, with what the prompt says about its guidance. It
    gets `Noised` with latents, sigmas and the sampler's timesteps (clean latents and noise are NaN), conditioning of
    one prompt, and a `Batch` with one caption and its size.
    `sampler(prompt)` gives a fresh way from noise to latents: `build_ddpm_sampler`, or `FlowSampler`.
    """

    defaults: PromptDefaults
    text: TextPipeline  # where prompts are read as captions are, the architecture's own
    predict: Callable[[Prompt], Predict]
    sampler: Callable[[Prompt], Sampler]
    worded: Callable[[str], str] = str  # what `text` reads for a prompt; a negative prompt is read as it is


Vary = Callable[[Conditioning, torch.Generator], Conditioning]
"""What changes in the conditioning of a batch from one training step to the next; not in validation and previews."""

AdapterView = Callable[[Sequence[nn.Module], nn.Module], tuple[nn.Module | list[nn.Module], nn.Module]]
"""(text encoders, denoiser) as network modules see them: paths are the names in files, leaves are the real layers.

The first value is a single module where the base model has one text encoder, a list otherwise: LyCORIS picks its
prefixes by that. The second carries `adapter_targets` (networks.core.targets.targets.AdapterTargets) as an attribute.
"""


def leave_sizes(denoiser: nn.Module, sizes: Sequence[tuple[int, int]]) -> None:
    """Nothing in the denoiser depends on the resolutions of the data set."""


@dataclass(frozen=True)
class Architecture:
    """One base model, as the parts the trainer calls."""

    name: str
    load: Loader
    text: TextPipeline
    codec: LatentCodec
    objective: Objective
    predict: Predict
    view: AdapterView
    preview: Preview
    metadata: Mapping[str, str]  # ss_v2, ss_base_model_version and the modelspec keys that are the model's own
    ignores: Mapping[str, str] = field(default_factory=dict)  # option that does nothing here -> why
    specs: Sequence[BaseModelSpec] = ()  # of all base models: by them it is told which programs read what is saved
    text_cache: TextCacheSpec | None = None  # None where text encoder outputs cannot be cached
    vary: Vary | None = None  # None where conditioning is used as it is
    run_blocks_with: Callable[[nn.Module, BlockRunner], None] = run_blocks_with  # gives the denoiser its runner
    stacks: Callable[[nn.Module], Stacks] = stacks_of  # the denoiser's blocks that go through the runner
    chains: Callable[[nn.Module], list[nn.ModuleList]] = chains_of  # lists of blocks in which those alike can be missed
    inpaints: bool = False  # whether the denoiser is told of areas to paint anew, see `library.diffusion.inpainting`
    fit_to_sizes: Callable[[nn.Module, Sequence[tuple[int, int]]], None] = leave_sizes
    """Tells the denoiser the resolutions (width, height) of the data set."""
    vae_overflows_in_fp16: bool = False  # whether the VAE that comes with it gives NaN in fp16
    tells_sizes: bool = False  # whether the denoiser is told how large pictures were and where they were cut

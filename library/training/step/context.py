"""Everything that a batch's loss depends on, apart from the batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.memory.offload.sharded import ShardedModel
from library.options.training.guidance import NO_GUIDANCE, GuidanceOptions
from library.options.training.pairs import NO_PAIRS, PairOptions
from library.protocols import Architecture, LiveText
from library.training.step.conditioning import CaptionMemo
from networks.core.protocol import AdoptedNetwork

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class TrainingAdapter:
    """A frozen adapter beside the trained one, which previews leave out."""

    network: AdoptedNetwork
    file: Path
    strength: float


@dataclass(frozen=True)
class Models:
    """The base model; each part has the dtype and the device on which it runs."""

    denoiser: nn.Module
    text_encoders: list[nn.Module]
    vae: nn.Module | None  # None once every latent is cached
    network_view: tuple[nn.Module | list[nn.Module], nn.Module]  # (text encoders, denoiser), as network modules expect
    sharded: ShardedModel | None = None  # set if the denoiser's weights are sharded over processes
    training_adapter: TrainingAdapter | None = None


@dataclass(frozen=True)
class StepContext:
    """The models and settings that a training, validation or preview step computes with; independent of plans and
    files."""

    arch: Architecture
    models: Models
    network: AdoptedNetwork
    seed: int
    device: torch.device
    autocast: Autocast
    trains_text_encoder: bool
    captions: CaptionMemo
    live_text: LiveText | None = None  # the text encoders that still run while the outputs of the others are cached
    vae_batch_size: int = 1
    preserves_in_step: bool = False  # run the base model in every batch, because a batch of another rank may need it
    pairs: PairOptions = NO_PAIRS
    guidance: GuidanceOptions = NO_GUIDANCE

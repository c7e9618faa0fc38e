"""The context of a step: all that a batch's loss depends on besides the batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.memory.offload.sharded import ShardedModel
from library.options.training.pairs import NO_PAIRS, PairOptions
from library.protocols import Architecture, LiveText
from library.training.step.conditioning import CaptionMemo
from networks.core.protocol import AdoptedNetwork

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Models:
    """The frozen base model, each part in the dtype and on the device it trains on."""

    denoiser: nn.Module
    text_encoders: list[nn.Module]
    vae: nn.Module | None  # None once every latent is cached
    network_view: tuple[nn.Module | list[nn.Module], nn.Module]  # (text encoders, denoiser) as network modules see them
    sharded: ShardedModel | None = None  # the denoiser's weights, where they lie spread over processes


@dataclass(frozen=True)
class StepContext:
    """All that a step of training, validation or a preview computes with. Nothing in it knows of plans or files."""

    arch: Architecture
    models: Models
    network: AdoptedNetwork
    seed: int
    device: torch.device
    autocast: Autocast
    trains_text_encoder: bool
    captions: CaptionMemo
    live_text: LiveText | None = None  # the text encoders in memory where the outputs of others are cached
    vae_batch_size: int = 1
    preserves_in_step: bool = False  # whether each batch asks the base model too, since those of others may have to
    pairs: PairOptions = NO_PAIRS
    alone: Callable[[], AbstractContextManager[None]] = nullcontext
    """In the block the models run with this network alone, where others act on the same layers in a sweep."""

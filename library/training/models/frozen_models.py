"""Loads the frozen models: the denoiser is read last, with adapters merged into it."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from library.checkpoints.weights import to_meta_device
from library.memory.codecs.codec import AsRead
from library.memory.codecs.weight_format import WeightFormat
from library.memory.offload.sharded import ShardedModel
from library.options.training.network import NetworkOptions
from library.protocols import Architecture
from library.training.models.compute import Compute
from library.training.models.weight_formats import format_while_reading
from library.training.reporting.console_lines import announce
from library.training.step.context import Models
from networks.core.protocol import NetworkModule, adopt

Change = Callable[[Tensor], Tensor]
"""Returns a parameter's value with an adapter merged into it."""


def load_frozen(
    options: NetworkOptions,
    weight_format: WeightFormat | None,
    arch: Architecture,
    text_encoders: list[nn.Module],
    vae: nn.Module | None,
    compute: Compute,
    reader: NetworkModule,
    sharded: ShardedModel | None = None,
) -> Models:
    """Read the denoiser in its weight format, and merge adapters into it, the text encoders and the VAE.

    Our own networks are merged weight by weight while these are read, before they are converted to a weight format or
    sharded, so that at most one weight exists in full precision. A third-party `reader` needs all weights at once,
    which sharding excludes (`sharding_values`). Raises UserError for a file that does not fit.
    """
    merges = bool(options.base_weights)
    assert reader.is_ours or sharded is None or not merges
    changes = merge_while_reading(options, arch, text_encoders, compute, reader) if reader.is_ours else {}
    codec = format_while_reading(weight_format, merges, merges_afterwards=not reader.is_ours)
    if changes or sharded is not None:
        denoiser = arch.load.denoiser(AsRead(codec, changes, None if sharded is None else sharded.keep_shard))
    else:
        denoiser = arch.load.denoiser(codec)
    models = Models(denoiser, text_encoders, vae, arch.view(text_encoders, denoiser), sharded)
    if not reader.is_ours:
        merge_into_whole(options, models, compute, reader)
    for file, multiplier in iterate_base_weights(options):
        announce(f"merged {file} into the base model with multiplier {multiplier}")
    return models


def iterate_base_weights(options: NetworkOptions) -> Iterator[tuple[str, float]]:
    """Yield the adapter files to merge with their multipliers (1 if missing)."""
    multipliers = options.base_weights_multiplier or []
    for index, file in enumerate(options.base_weights or ()):
        yield file, multipliers[index] if index < len(multipliers) else 1.0


def merge_while_reading(
    options: NetworkOptions, arch: Architecture, text_encoders: list[nn.Module], compute: Compute, reader: NetworkModule
) -> Mapping[str, Change]:
    """Merge adapters into the text encoders, and return the changes that merge them into the denoiser, by parameter."""
    if not options.base_weights:
        return {}
    meta = to_meta_device(arch.load).denoiser()
    names = {layer: name for name, layer in meta.named_modules()}
    text_encoder, denoiser = arch.view(text_encoders, meta)
    changes_by_name: dict[str, list[Change]] = defaultdict(list)
    for file, multiplier in iterate_base_weights(options):
        network, weights = reader.create_network_from_weights(
            multiplier, file, None, text_encoder, denoiser, for_inference=True
        )
        for part in adopt(network).merging(weights, compute.device):
            if part.layer in names:
                changes_by_name[f"{names[part.layer]}.{part.parameter}"].append(part.merged)
            else:
                parameter = getattr(part.layer, part.parameter)
                parameter.data.copy_(apply_changes([part.merged], parameter.data))
    return {name: partial(apply_changes, changes) for name, changes in changes_by_name.items()}


@torch.no_grad()
def apply_changes(changes: Sequence[Change], value: Tensor) -> Tensor:
    """Apply changes to a parameter, keeping its dtype and layout. Each change rounds, as if merged alone."""
    for change in changes:
        value = torch.empty_like(value).copy_(change(value))
    return value


def merge_into_whole(options: NetworkOptions, models: Models, compute: Compute, reader: NetworkModule) -> None:
    """Let a third-party network module merge adapters into models that are completely loaded."""
    text_encoder, denoiser = models.network_view
    for file, multiplier in iterate_base_weights(options):
        network, weights = reader.create_network_from_weights(
            multiplier, file, models.vae, text_encoder, denoiser, for_inference=True
        )
        adopt(network).merge_to(text_encoder, denoiser, weights, compute.dtype, compute.device)

"""Additive changes: a delta with the wrappers that the network arguments or a file require."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from networks.core.changes.alpha import ScaledDelta, alpha_in
from networks.core.changes.change import Change, Delta, MakeDelta, ModuleTensors, fill, get_weight, stand_in
from networks.core.changes.dora import Decompose, DoRA, DoraArguments, are_per_output
from networks.core.changes.ggpo import GgpoArguments, Perturbed
from networks.core.changes.parameter_keys import DORA_SCALE
from networks.core.changes.request import ChangeRequest
from networks.core.changes.tlora import NoiseMask, TLoraArguments


def wrap(request: ChangeRequest, delta: Delta, alpha: float | None = None) -> Change:
    """Wrap a delta in alpha, dropout and T-LoRA, then in DoRA or GGPO, as requested.

    `alpha` defaults to that of the request.
    """
    layer, drops, has_scalar = request.layer, request.drops, request.has_scalar
    alpha = request.alpha if alpha is None else alpha
    if request.is_decomposed:
        has_constant_norm = request.arguments.of(DoraArguments).dora_constant_norm
        decomposition = Decompose(get_weight(layer), has_constant_norm, request.is_per_output)
        return DoRA(layer, delta, alpha, decomposition, drops, has_scalar)
    tlora, ggpo = request.arguments.of(TLoraArguments), request.arguments.of(GgpoArguments)
    is_masked = tlora.tlora and request.is_denoiser
    # Captions are encoded once for all noise levels, so the mask acts in the denoiser only.
    mask = NoiseMask(tlora.tlora_min_rank, tlora.tlora_power, request.noise) if is_masked else None
    if ggpo.is_on:
        return Perturbed(layer, delta, alpha, ggpo, drops, has_scalar, mask)
    return ScaledDelta(layer, delta, alpha, drops, has_scalar, mask)


def read_delta(delta: Delta, tensors: ModuleTensors, layer: nn.Module | None) -> Change:
    """Load a file's tensors into a delta on the meta device, and return its frozen change, for merging."""
    assert isinstance(delta, nn.Module)
    fill(delta, tensors)
    alpha = alpha_in(tensors, delta)
    if (magnitudes := tensors.get(DORA_SCALE)) is None:
        change = ScaledDelta(layer, delta, alpha)
    else:
        weight = None if layer is None else get_weight(layer)
        decomposition = Decompose(weight, is_per_output=are_per_output(magnitudes.shape))
        change = DoRA(layer, delta, alpha, decomposition, magnitudes=magnitudes)
    change.alpha_value = alpha  # an alpha of 0 in a file means 0, not the rank
    return change


def read_with(
    make_delta: MakeDelta,
    rank_of: Callable[[ModuleTensors], int],
    shape_of: Callable[[str, ModuleTensors], tuple[int, ...]],
    make_core: MakeDelta | None = None,
    core: Sequence[str] = (),
) -> Callable[[ModuleTensors, nn.Module | None], Change]:
    """Return a `KeyLayout.read` function for a kind whose structure follows from its rank.

    Modules that have a key of `core` are built with `make_core`, others with `make_delta`.
    """

    def read(tensors: ModuleTensors, layer: nn.Module | None) -> Change:
        make = make_core if make_core is not None and any(key in tensors for key in core) else make_delta
        # On the meta device no initial values are drawn. The file's tensors replace them anyway.
        with torch.device("meta"):
            delta = make(layer or stand_in(shape_of("", tensors)), rank_of(tensors))
        return read_delta(delta, tensors, layer)

    return read

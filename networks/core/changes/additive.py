"""Additive changes as networks have them: a delta in the wrappers that the network arguments or a file ask for."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from networks.core.changes.alpha import ScaledDelta, alpha_in
from networks.core.changes.change import Change, Delta, MakeDelta, ModuleTensors, fill, stand_in
from networks.core.changes.dora import DoRA, decomposed
from networks.core.changes.ggpo import GgpoArguments, Perturbed
from networks.core.changes.parameter_keys import DORA_SCALE
from networks.core.changes.request import ChangeRequest
from networks.core.changes.tlora import NoiseMask, TLoraArguments


def wrap(request: ChangeRequest, delta: Delta, alpha: float | None = None) -> Change:
    """Make a change of a delta: alpha, dropout and T-LoRA, then DoRA or GGPO around it.

    `alpha` is as asked for, if unset.
    """
    tlora = request.arguments.of(TLoraArguments)
    mask = NoiseMask(tlora.tlora_min_rank, tlora.tlora_power, request.noise)
    change = ScaledDelta(
        request.layer, delta, request.alpha if alpha is None else alpha, request.drops, request.has_scalar,
        mask if tlora.tlora and request.is_denoiser else None,
    )  # fmt: skip
    if request.is_decomposed:
        return decomposed(change, request.arguments, request.is_per_output)
    ggpo = request.arguments.of(GgpoArguments)
    return Perturbed(change, ggpo) if ggpo.is_on else change


def read_delta(delta: Delta, tensors: ModuleTensors, layer: nn.Module | None) -> Change:
    """Make the change of a module in a file, to be merged, of a delta on the meta device."""
    assert isinstance(delta, nn.Module)
    fill(delta, tensors)
    alpha = alpha_in(tensors, delta)
    change = ScaledDelta(layer, delta, alpha)
    change.alpha_value = alpha  # 0 in a file is 0
    return DoRA.of_file(change, tensors[DORA_SCALE]) if DORA_SCALE in tensors else change


def read_with(
    make_delta: MakeDelta,
    rank_of: Callable[[ModuleTensors], int],
    shape_of: Callable[[str, ModuleTensors], tuple[int, ...]],
    make_core: MakeDelta | None = None,
    core: Sequence[str] = (),
) -> Callable[[ModuleTensors, nn.Module | None], Change]:
    """Return a `KeyLayout.read` for a kind whose rank tells its form; `make_core` where a file has keys of a core."""

    def read(tensors: ModuleTensors, layer: nn.Module | None) -> Change:
        make = make_core if make_core is not None and any(key in tensors for key in core) else make_delta
        with torch.device("meta"):
            delta = make(layer or stand_in(shape_of("", tensors)), rank_of(tensors))
        return read_delta(delta, tensors, layer)

    return read

"""Weights that previews are drawn with: those of a distilled version, and none of the training adapter."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import psutil
from torch import nn

from library.base.errors import UserError
from library.base.formatting import format_bytes
from library.memory.codecs.codec import AS_IN_FILE
from library.memory.codecs.weight_format import load_format
from library.memory.devices import bytes_of
from library.memory.exchange import exchange_weights
from library.options.machine.memory import PrecisionOptions
from library.protocols import Preview
from library.training.step.context import TrainingAdapter

logger = logging.getLogger(__name__)


def with_preview_weights(
    preview: Preview, precision: PrecisionOptions, denoiser: nn.Module
) -> AbstractContextManager[None]:
    """Return a context in which the denoiser has the preview weights, which are read from their file each time.

    They are swapped weight by weight with the denoiser's own, which move to main memory, so that the GPU holds no more
    than in training. Raises UserError if main memory is too small.
    """
    if preview.load_denoiser is None:
        return nullcontext()
    needed, free = bytes_of(denoiser), psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"the weights that previews are drawn with take {format_bytes(needed)} of main memory, and "
            f"{format_bytes(free)} are free"
        )
    logger.info("reading the weights that previews are drawn with (%s)", format_bytes(needed))
    name = precision.denoiser_format
    return exchange_weights(denoiser, preview.load_denoiser(AS_IN_FILE if name is None else load_format(name).codec))


@contextmanager
def without_training_adapter(adapter: TrainingAdapter | None) -> Iterator[None]:
    """Disable the training adapter inside the block, so that layers give the bits that they give without it."""
    if adapter is None:
        yield
        return
    adapter.network.set_multiplier(0.0)
    try:
        yield
    finally:
        adapter.network.set_multiplier(adapter.strength)

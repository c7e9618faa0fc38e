"""Adapter files on one base model, which is loaded once for all of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from library.memory.blocks import plain
from library.options.machine.memory import PrecisionOptions
from library.processes import ALONE
from library.protocols import Architecture
from library.training.models.compute import Compute
from library.training.models.frozen_base import resolve_base
from library.training.step.context import Models
from networks.core.protocol import AdoptedNetwork, adopt, open_network_module

logger = logging.getLogger(__name__)

READER = "networks.lora"  # its inference networks take every kind of adapter, by the keys of the file

Row = Path | None
"""An adapter file; None is the base model alone."""


def resolve_models(
    precision: PrecisionOptions, num_offloaded: int, arch: Architecture, models: Models, compute: Compute
) -> None:
    """Store the models as in a training with these options; nothing of them trains."""
    resolve_base(precision, num_offloaded, arch, models, compute, replace(ALONE, device=compute.device))
    for model in (models.denoiser, *models.text_encoders):
        model.eval().requires_grad_(False)
    arch.run_blocks_with(models.denoiser, plain)


@contextmanager
def installed(row: Row, models: Models, compute: Compute) -> Iterator[AdoptedNetwork]:
    """The adapter of a file on the models, which lose it afterwards. Raises UserError for one that does not fit."""
    if row is None:
        yield AdoptedNetwork(nn.Module())  # without modules
        return
    text_encoders, denoiser = models.network_view
    network, _ = open_network_module(READER).create_network_from_weights(
        1.0, str(row), models.vae, text_encoders, denoiser, for_inference=True
    )
    network.apply_to(text_encoders, denoiser)
    try:
        logger.info("%s", network.load_weights(str(row)))
        network.to(compute.device).eval()
        network.on_noise_levels(None)
        yield adopt(network)
    finally:
        network.remove()

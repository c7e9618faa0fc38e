"""Adapter files on one base model, which is loaded once for all of them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from library.memory.blocks import plain
from library.options.machine.memory import MemoryOptions, PrecisionOptions
from library.processes.process_group import ALONE
from library.protocols import Architecture
from library.training.models.compute import Compute
from library.training.models.frozen_adapters import create_frozen_adapter, load_frozen_adapter
from library.training.models.frozen_base import resolve_base
from library.training.models.weight_formats import BaseFormats
from library.training.step.context import Models
from networks.core.protocol import AdoptedNetwork, adopt

Row = Path | None
"""An adapter file; None is the base model alone."""


def resolve_models(
    precision: PrecisionOptions,
    formats: BaseFormats,
    memory: MemoryOptions,
    arch: Architecture,
    models: Models,
    compute: Compute,
) -> None:
    """Store the models as in a training with these options, for inference only."""
    resolve_base(precision, formats, memory, arch, models, compute, replace(ALONE, device=compute.device))
    for model in (models.denoiser, *models.text_encoders):
        model.eval().requires_grad_(False)
    # Nothing is differentiated, so nothing has to be recomputed.
    arch.run_blocks_with(models.denoiser, plain)


Stack = Sequence[tuple[Path, float]]
"""Adapter files that act together, each with its strength; an empty stack is the base model alone."""


class NoAdapter(nn.Module):
    """The network of the base model alone."""

    def set_multiplier(self, multiplier: float) -> None:
        """Do nothing: there is no adapter."""


@contextmanager
def install_adapters(files: Stack, models: Models, compute: Compute, arch: Architecture) -> Iterator[AdoptedNetwork]:
    """Attach the adapters of files to the models inside the block. Raises UserError for a file that does not fit.

    Yields the last adapter: notifications during drawing or measuring have no effect on the others.
    """
    network: Any = NoAdapter()
    with ExitStack() as applied:
        for file, strength in files:
            part = arch.part_of(models.denoiser, file)
            is_whole = part is models.denoiser
            view = models.network_view if is_whole else arch.view(models.text_encoders, part)
            network, _ = create_frozen_adapter(file, strength, replace(models, network_view=view))
            network.apply_to(*view)
            # Registered before the weights are loaded, so that a file that does not fit leaves no adapter behind.
            applied.callback(network.remove)
            load_frozen_adapter(network, file, compute.device)
        yield adopt(network) if files else AdoptedNetwork(network)

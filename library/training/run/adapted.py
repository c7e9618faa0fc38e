"""The base model with the adapter on its layers: second and third stage of the set-up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from library.data.training_data import TrainingData
from library.processes.process_group import Processes
from library.training.models.arithmetic import check_arithmetic
from library.training.models.base_model import LoadedModels, load_models
from library.training.models.block_running import choose_block_runner
from library.training.models.compute import Compute
from library.training.models.frozen_adapters import attach_training_adapter
from library.training.models.frozen_base import check_base, resolve_base
from library.training.models.network import open_network
from library.training.models.preflight import preflight
from library.training.models.requests import RequestedRun
from library.training.saving.state import network_shapes
from networks.core.protocol import AdoptedNetwork


@dataclass(frozen=True)
class AdaptedModels:
    """The models that a run trains on, in their formats and places, and its adapter."""

    loaded: LoadedModels
    network: AdoptedNetwork


def check_models(requested: RequestedRun, compute: Compute, max_train_steps: int) -> None:
    """Check what needs no weights before they are read and images are encoded, which takes minutes.

    Raises UserError for what could not be trained.
    """
    options, formats = requested.options, requested.formats
    check_base(options.precision, options.memory, requested.arch)
    if options.precision.multiplies_codes:
        check_arithmetic(formats.denoiser, requested.module, requested.arch, compute)
    preflight(requested, max_train_steps)


def load_adapted(
    requested: RequestedRun, data: TrainingData, compute: Compute, prompts: Sequence[str], processes: Processes
) -> AdaptedModels:
    """Encode images, captions and `prompts` if they are cached, load what trains, and attach the adapter."""
    options, arch, formats, state = requested.options, requested.arch, requested.formats, requested.state
    loaded = load_models(
        options, formats, requested.text, arch, requested.seed, data, compute, prompts, processes, requested.module
    )
    resolve_base(options.precision, formats, options.memory, arch, loaded.models, compute, processes)
    # After the base model has its weight formats and devices: a network module may read the weights that it adapts.
    models = attach_training_adapter(options.network, arch, loaded.models, compute.device)
    network = open_network(requested, models, compute)
    if state is not None:
        network.prepare_for(network_shapes(state), str(state.path))
    # After the adapter is attached, because blocks are compiled with it.
    choose_block_runner(options.memory, options.compiling, options.trains_text_encoders, arch, models, network)
    return AdaptedModels(replace(loaded, models=models), network)

"""Adapters of files that act on the models and are not trained, such as the training adapter of a distilled model."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from library.base.errors import UserError, about, naming
from library.checkpoints.files import file_in_folder
from library.checkpoints.headers import read_metadata
from library.checkpoints.recognition import base_in_metadata, recognise_adapter
from library.checkpoints.weights import open_weights
from library.options.training.network import NetworkOptions
from library.protocols import Architecture
from library.training.step.context import Models, TrainingAdapter
from networks.core.protocol import adopt, open_network_module

logger = logging.getLogger(__name__)

READER = "networks.lora"  # its inference networks accept every kind of adapter, by the file's keys
TRAINING_ADAPTER = "--training_adapter"


def parse_adapter(text: str, flag: str) -> tuple[Path, float]:
    """Parse FILE[:STRENGTH]; the default strength is 1. Raises UserError naming `flag` if the file does not exist or
    the strength is not finite."""
    # A colon may belong to the path instead, as in C:\adapter.safetensors.
    name, _, strength = text.rpartition(":")
    try:
        path, factor = (Path(name), float(strength)) if name else (Path(text), 1.0)
    except ValueError:
        path, factor = Path(text), 1.0
    if not path.exists():
        raise about(flag, path, cause="missing")("does not exist")
    if not math.isfinite(factor):
        raise about(flag)(f"{text}: the strength is {factor}", "use a number, such as 0.8")
    return file_in_folder(path, f"{flag} {path}"), factor


def create_frozen_adapter(file: Path, strength: float, models: Models) -> tuple[Any, dict[str, torch.Tensor]]:
    """Create the network of a file, not installed, without its weights, and return the file's tensors by our names.

    Raises UserError for a file that does not fit.
    """
    text_encoders, denoiser = models.network_view
    return open_network_module(READER).create_network_from_weights(
        strength, str(file), models.vae, text_encoders, denoiser, for_inference=True
    )


def load_frozen_adapter(network: Any, file: Path, device: torch.device) -> None:
    """Load the weights of an installed network, and prepare it to act without being trained."""
    logger.info("%s", network.load_weights(str(file)))
    network.to(device).eval().requires_grad_(False)
    network.on_noise_levels(None)


def create_training_adapter(options: NetworkOptions, arch: Architecture, models: Models) -> TrainingAdapter | None:
    """Create the training adapter, not installed and without its weights; None if the options name none.

    Raises UserError for a file that does not fit, with the base model that it was made for.
    """
    if not options.training_adapter:
        return None
    file, strength = parse_adapter(options.training_adapter, TRAINING_ADAPTER)
    try:
        with naming(TRAINING_ADAPTER, file):
            network, tensors = create_frozen_adapter(file, strength, models)
    except UserError:
        require_same_base(file, arch)
        raise
    if any(key.partition(".")[0] not in network.adapters for key in tensors):
        require_same_base(file, arch)
    return TrainingAdapter(adopt(network), file, strength)


def require_same_base(file: Path, arch: Architecture) -> None:
    """Raise UserError for a training adapter that is recognised as one for another base model."""
    own = base_in_metadata(arch.specs, arch.metadata)
    made_for = recognise_adapter(arch.specs, open_weights(file).shapes, read_metadata(file))
    if own is not None and made_for is not None and made_for is not own:
        raise about(TRAINING_ADAPTER)(
            f"{file} is an adapter for {made_for.title}, and the base model is {own.title}",
            "use a training adapter that was made for this base model",
        )


def attach_training_adapter(
    options: NetworkOptions, arch: Architecture, models: Models, device: torch.device
) -> Models:
    """Install the training adapter, if there is one, and return the models with it.

    Call when the models have their weight formats, and before the trained adapter is attached, so that this one acts
    on its output.
    """
    adapter = create_training_adapter(options, arch, models)
    if adapter is None:
        return models
    adapter.network.apply_to(*models.network_view, True, True)
    load_frozen_adapter(adapter.network.module, adapter.file, device)
    logger.info("training beside %s at strength %g, which is not saved", adapter.file, adapter.strength)
    return replace(models, training_adapter=adapter)

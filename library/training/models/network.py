"""Opens the network module and attaches its adapter to the models."""

from typing import Any

import torch

from library.errors import UserError
from library.options.machine.memory import PrecisionOptions
from library.options.training.network import NetworkOptions
from library.randomness import stream_seed
from library.training.models.compute import Compute
from library.training.reporting.console_lines import announce
from library.training.step.context import Models
from networks.core.protocol import AdoptedNetwork, NetworkModule, adopt, open_network_module, parse_network_args


def network_keywords(options: NetworkOptions) -> dict[str, Any]:
    """Return the keyword arguments for the module: strings, and `dropout` from its own option if not among them."""
    return {"dropout": options.network_dropout, **parse_network_args(options.network_args)}


def open_network(
    wanted: NetworkOptions, precision: PrecisionOptions, seed: int, models: Models, compute: Compute
) -> AdoptedNetwork:
    """Install the adapter on the models' layers, with its starting weights.

    After the models, since it takes the forward of their layers; before the optimizer, which needs its parameters.
    What the adapter draws when it is made depends on the seed alone, not on what was loaded, cached or merged before.
    Raises UserError where the module cannot be imported, an argument is wrong, or a file does not fit.
    """
    torch.manual_seed(stream_seed(seed, "adapter"))
    announce(f"import network module: {wanted.network_module}")
    assert wanted.network_module is not None
    network = adopt(create(wanted, open_network_module(wanted.network_module), models))
    network.apply_to(
        *models.network_view,
        not wanted.network_train_unet_only,
        not wanted.network_train_text_encoder_only,
    )
    if wanted.network_weights:
        network.load_weights(wanted.network_weights)
    network.module.to(compute.device, compute.dtype if precision.full_fp16 or precision.full_bf16 else None)
    return network


def create(wanted: NetworkOptions, module: NetworkModule, models: Models) -> Any:
    """Create a new network, with the rank and alpha of the options or with the shapes of a file."""
    text_encoder, denoiser = models.network_view
    keywords = network_keywords(wanted)
    if wanted.dim_from_weights:
        assert wanted.network_weights is not None
        network, _ = module.create_network_from_weights(
            1.0, wanted.network_weights, models.vae, text_encoder, denoiser, **keywords
        )
    else:
        network = module.create_network(
            1.0,
            wanted.network_dim,
            wanted.network_alpha,
            models.vae,
            text_encoder,
            denoiser,
            neuron_dropout=wanted.network_dropout,
            **keywords,
        )
    if network is None:
        raise UserError(f"--network_module {wanted.network_module} made no network; see its own messages above")
    return network

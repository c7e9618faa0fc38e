"""Attaches the adapter of a network module to the models."""

from typing import Any

import torch

from library.base.errors import about, naming
from library.base.randomness import stream_seed
from library.options.network_args import parse_network_args
from library.options.training.network import NetworkOptions
from library.training.models.compute import Compute
from library.training.models.requests import RequestedRun
from library.training.reporting.console_lines import announce
from library.training.step.context import Models
from networks.core.protocol import AdoptedNetwork, NetworkModule, adopt


def network_keywords(options: NetworkOptions) -> dict[str, Any]:
    """Return the keyword arguments for the module: strings, and `dropout` from its own option if not among them."""
    # LyCORIS reads `dropout`, where the modules of sd-scripts take the parameter `neuron_dropout`.
    return {"dropout": options.network_dropout, **parse_network_args(options.network_args)}


def open_network(request: RequestedRun, models: Models, compute: Compute) -> AdoptedNetwork:
    """Attach a new adapter with its initial weights to the models' layers.

    Call after the models are loaded, because it replaces the forward of their layers, and before the optimizer is
    built, which needs its parameters. Raises UserError if an argument is wrong or a file does not fit.
    """
    options, precision = request.options.network, request.options.precision
    # The initial weights depend on the seed alone, not on what was loaded, cached or merged before.
    torch.manual_seed(stream_seed(request.seed, "adapter"))
    announce(f"import network module: {request.module.name}")
    network = adopt(create(options, request.module, models))
    network.apply_to(
        *models.network_view, not options.network_train_unet_only, not options.network_train_text_encoder_only
    )
    if options.network_weights:
        with naming("--network_weights", options.network_weights):
            network.load_weights(options.network_weights)
    network.module.to(compute.device, compute.dtype if precision.full_fp16 or precision.full_bf16 else None)
    return network


def create_on_meta_device(options: NetworkOptions, module: NetworkModule, models: Models) -> Any:
    """Create a network of one of our own modules as `create` does, without values. It changes no model."""
    with torch.device("meta"):
        return create(options, module, models)


def create(options: NetworkOptions, module: NetworkModule, models: Models) -> Any:
    """Create a new network, with the rank and alpha of the options or with the shapes of a file."""
    text_encoder, denoiser = models.network_view
    keywords = network_keywords(options)
    if options.dim_from_weights:
        assert options.network_weights is not None
        with naming("--network_weights", options.network_weights):
            network, _ = module.create_network_from_weights(
                1.0, options.network_weights, models.vae, text_encoder, denoiser, **keywords
            )
    else:
        network = module.create_network(
            1.0,
            options.network_dim,
            options.network_alpha,
            models.vae,
            text_encoder,
            denoiser,
            **({"neuron_dropout": options.network_dropout} | keywords),  # an argument may have the parameter's name
        )
    if network is None:
        raise about("--network_module")(f"{module.name} made no network", "see its own messages above")
    return network

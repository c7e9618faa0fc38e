"""The architecture of the base model and the network module, opened before any file of the model is read."""

import logging
from collections.abc import Callable
from typing import TypeVar

from library.base.collector import freeze_imports
from library.base.errors import error_in
from library.environment.hidden_libraries import BITSANDBYTES, hide_library, import_diffusers_hiding_libraries
from library.options.train import TrainOptions
from library.protocols import Architecture
from library.training.command_line.checks import report_unused, warn_of_fp16_vae
from library.training.run.dry_run import DRY_RUN_VALUES
from library.training.run.shard_base_checks import resolve_launched_values
from networks.core.protocol import NetworkModule, open_network_module

logger = logging.getLogger(__name__)

OptionsT = TypeVar("OptionsT", bound=TrainOptions)


def open_base(
    options: OptionsT, build: Callable[[OptionsT], Architecture]
) -> tuple[OptionsT, NetworkModule | None, Architecture]:
    """Apply what the launcher sets, import the network module, build the architecture and check the options against it.

    The network module is imported first, so that a misspelt one is reported before files are read. A look at the data
    may name none.
    """
    declared = type(options).declarations()["shard_base"]
    refusal = None if options.concepts is None else declared.refused_by_leco
    values = resolve_launched_values(options.distributed.shard_base, refusal)
    options = options.with_values(values | DRY_RUN_VALUES if options.diagnostics.dry_run else values)
    with freeze_imports("tokenizers"):
        import_diffusers_hiding_libraries()
        with hide_library(BITSANDBYTES):
            name = options.network.network_module
            module = open_network_module(name) if name else None
        arch = build(options)
    report_unused(options, arch.ignores)
    if options.dataset.train_inpainting and not arch.inpaints:
        raise error_in("--train_inpainting")("--train_inpainting: this base model takes no masks", "leave it out")
    if options.guidance.guidance_scale_of_loss is not None and arch.preview.defaults.scale > 1:
        warn_of_undistilled(arch.name, arch.preview.defaults.scale)
    if arch.vae_overflows_in_fp16:
        warn_of_fp16_vae(options.model, options.precision.mixed_precision)
    return options, module, arch


def warn_of_undistilled(name: str, scale: float) -> None:
    """Warn of --guidance_loss for a base model that is drawn with classifier-free guidance of this scale."""
    logger.warning(
        "--guidance_loss keeps the guidance of a distilled model, but %s is drawn with classifier-free guidance (%g): "
        "an adapter trained so would be guided twice. Leave it out unless this base is distilled",
        name,
        scale,
    )

"""Loading of Knots checkpoints, single files with all parts."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.knots.model import ByteEncoder, Knots, KnotsConfig, read_config
from library.architectures.knots.options import KnotsOptions
from library.architectures.specs import list_specs
from library.base.errors import UserError
from library.checkpoints.base_files import require_base_name
from library.checkpoints.model_lookup import existing
from library.checkpoints.weights import Weights, configure, with_prefix
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.identify import open_single_file, refuse_other_model
from library.models.loading import Component, build_on_meta_device, materialise
from library.models.vae.vae import load_vae, resolve_vae_dtype, vae_of_checkpoint
from library.options.model import BASE_FLAG

DENOISER_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "bytes_encoder."


@dataclass(frozen=True)
class KnotsLoader:
    """A loader of the three models, each frozen, on the CPU and loaded on request."""

    config: KnotsConfig
    denoiser_weights: Weights
    text_weights: Weights
    vae_component: Component
    dtype: torch.dtype
    vae_dtype: torch.dtype

    def text_encoders(self) -> list[nn.Module]:
        return [materialise(build_on_meta_device(ByteEncoder, self.config.width), self.text_weights, self.dtype)]

    def vae(self) -> nn.Module:
        return load_vae(self.vae_component, self.vae_dtype)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        return materialise(build_on_meta_device(Knots, self.config), self.denoiser_weights, self.dtype, weight_format)


def open_denoiser(flag: str, path: Path) -> tuple[Weights, Weights]:
    """Return (the whole file, its denoiser). Raises UserError naming `flag` and the model for another base model."""
    checkpoint = open_single_file(list_specs(), flag, path, "knots", "Knots is one file")
    refuse_other_model(list_specs(), flag, str(path), checkpoint.shapes, "knots")
    denoiser = with_prefix(checkpoint, DENOISER_PREFIX)
    if not denoiser.shapes:
        raise UserError(f"{flag} {path}: nothing in it begins with {DENOISER_PREFIX!r}, so it is no Knots model")
    return checkpoint, denoiser


def open_loader(options: KnotsOptions) -> KnotsLoader:
    """Open the checkpoint that the options name; only its header is read. Raises UserError naming the flag."""
    name = require_base_name(options.model.pretrained_model_name_or_path, "the file of Knots")
    checkpoint, denoiser = open_denoiser(BASE_FLAG, existing(BASE_FLAG, name))
    return KnotsLoader(
        config=configure(denoiser, read_config),
        denoiser_weights=denoiser,
        text_weights=with_prefix(checkpoint, TEXT_PREFIX),
        vae_component=vae_of_checkpoint(BASE_FLAG, checkpoint),
        dtype=DTYPES[options.precision.mixed_precision],
        vae_dtype=resolve_vae_dtype(options.model, options.precision.mixed_precision),
    )

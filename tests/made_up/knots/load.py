"""A checkpoint of Knots, one file of all parts, to modules."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.knots.model import ByteEncoder, Knots, KnotsConfig, read_config
from library.architectures.knots.options import KnotsOptions
from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.weights import Weights, configure, with_prefix
from library.errors import UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.identify import refuse_other_folder, refuse_other_model
from library.models.loading import Component, materialise
from library.models.vae.vae import empty_vae, vae_of_checkpoint
from library.options.model import BASE_FLAG

DENOISER_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "bytes_encoder."


@dataclass(frozen=True)
class KnotsLoader:
    """The three models, each loaded when it is asked for; frozen, on the CPU."""

    config: KnotsConfig
    denoiser_weights: Weights
    text_weights: Weights
    vae_component: Component
    dtype: torch.dtype

    def text_encoders(self) -> list[nn.Module]:
        with torch.device("meta"):
            encoder = ByteEncoder(self.config.width)
        return [materialise(encoder, self.text_weights, self.dtype)]

    def vae(self) -> nn.Module:
        return materialise(empty_vae(self.vae_component.config), self.vae_component.weights, torch.float32)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        return materialise(empty_knots(self.config), self.denoiser_weights, self.dtype, weight_format)


def empty_knots(config: KnotsConfig) -> Knots:
    """The denoiser on the meta device."""
    with torch.device("meta"):
        return Knots(config)


def open_denoiser(flag: str, path: Path) -> tuple[Weights, Weights]:
    """(the whole file, the denoiser in it). Raises UserError naming `flag` for another model, saying which."""
    if path.is_dir():
        refuse_other_folder(list_specs(), flag, path, "knots")
        raise UserError(f"{flag} {path} is a folder; Knots is one file")
    whole = model_lookup.open_file(flag, path)
    refuse_other_model(list_specs(), flag, str(path), whole.shapes, "knots")
    denoiser = with_prefix(whole, DENOISER_PREFIX)
    if not denoiser.shapes:
        raise UserError(f"{flag} {path}: nothing in it begins with {DENOISER_PREFIX!r}, so it is no Knots model")
    return whole, denoiser


def open_loader(options: KnotsOptions) -> KnotsLoader:
    """Open the checkpoint that the options name; only its header is read. Raises UserError naming the flag."""
    name = options.model.pretrained_model_name_or_path
    if not name:
        raise UserError(f"{BASE_FLAG} is missing: give the file of Knots")
    whole, denoiser = open_denoiser(BASE_FLAG, model_lookup.find_model(BASE_FLAG, name, ()))
    return KnotsLoader(
        config=configure(denoiser, read_config),
        denoiser_weights=denoiser,
        text_weights=with_prefix(whole, TEXT_PREFIX),
        vae_component=vae_of_checkpoint(BASE_FLAG, whole),
        dtype=DTYPES[options.precision.mixed_precision],
    )

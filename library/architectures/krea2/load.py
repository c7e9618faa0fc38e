"""Loading of Krea 2 checkpoints: three files, one file with everything, or a diffusers folder."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.krea2.checkpoint_keys import DIFFUSERS_MARK, MARK, from_diffusers
from library.architectures.krea2.model import PATCH, Krea2Config, SingleStreamDiT, read_config
from library.architectures.krea2.options import Krea2Options
from library.architectures.krea2.text import LAYERS
from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles, open_files
from library.checkpoints.model_lookup import find_model, read_json
from library.checkpoints.weights import Weights, configure
from library.errors import UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.dit import open_dit, open_without_dit, text_dtype_of
from library.models.identify import open_denoiser
from library.models.language_models import WORDS, store_in_8_bits, with_first_layers
from library.models.loading import (
    Component,
    MaybeComponent,
    check_text_width,
    first_side,
    materialise,
    on_meta_device,
    open_if_there,
)
from library.models.qwen3 import FOLDER, Qwen3Release
from library.models.qwen3_vl import load_qwen3_vl, qwen3_vl_component
from library.models.vae.qwen_image import CHANNELS, empty_vae, open_vae
from library.models.vae.qwen_image_2d import replace_layers_for_images
from library.models.vae.vae import vae_dtype_of
from library.options.model import BASE_FLAG

MODEL = "Krea 2"
TURBO_FLAG = "--turbo_dit"
QWEN3_VL = Qwen3Release("--text_encoder", "Qwen/Qwen3-VL-4B-Instruct", "text_encoders.qwen3vl_4b.transformer.model.")


@dataclass(frozen=True)
class Krea2Loader:
    """The three models, each loaded on request; frozen, on the CPU."""

    path: Path  # the folder or file of the denoiser
    config: Krea2Config | None  # None without a denoiser, for the caching commands
    denoiser_weights: Weights
    turbo_weights: Weights | None  # of the denoiser that previews are drawn with, if it is another one
    qwen3_vl: MaybeComponent
    vae_component: MaybeComponent
    dtype: torch.dtype
    text_dtype: torch.dtype
    vae_dtype: torch.dtype
    shrinks_text: bool  # the text encoder is kept in 8 bits

    @property
    def num_words(self) -> int | None:
        """The size of Qwen3-VL's vocabulary, or None if its files are missing."""
        return first_side(self.qwen3_vl, WORDS)

    def text_encoders(self) -> list[nn.Module]:
        encoder = load_qwen3_vl(self.qwen3_vl, self.text_dtype)
        if self.shrinks_text:
            store_in_8_bits(encoder, "Qwen3-VL")
        return [encoder]

    def vae(self) -> nn.Module:
        component = self.vae_component
        vae: nn.Module = replace_layers_for_images(
            materialise(empty_vae(component.config), component.weights, self.vae_dtype)
        )
        return vae

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        return self.read(self.denoiser_weights, weight_format)

    def turbo(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        """Load the denoiser that previews are drawn with."""
        assert self.turbo_weights is not None
        return self.read(self.turbo_weights, weight_format)

    def read(self, weights: Weights, weight_format: RequestedFormat | None) -> nn.Module:
        assert self.config is not None
        return materialise(on_meta_device(SingleStreamDiT, self.config), weights, self.dtype, weight_format)


def open_loader(options: Krea2Options) -> Krea2Loader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(options, MODEL)
    weights = denoiser_of(base)
    config = configure(weights, read_config)
    loader = loader_of(options, base, config, weights)
    check_fit(loader, config)
    return loader


def open_encoder(options: Krea2Options, flag: str) -> Krea2Loader:
    """Open what encodes images or captions, which `flag` names if the base model is not named. Raises UserError as
    `open_loader` does, and without either."""
    if options.model.pretrained_model_name_or_path:
        return open_loader(options)
    base, nothing = open_without_dit(options, flag)
    return loader_of(options, base, None, nothing)


def loader_of(options: Krea2Options, base: BaseFiles, config: Krea2Config | None, weights: Weights) -> Krea2Loader:
    encoder, vae = options.parts.text_encoder, options.model.vae
    texts_are_cached = config is None or options.text_caching.cache_text_encoder_outputs_to_disk
    latents_are_cached = config is None or options.caching.cache_latents_to_disk
    dtype = DTYPES[options.precision.mixed_precision]
    return Krea2Loader(
        path=base.path,
        config=config,
        denoiser_weights=weights,
        turbo_weights=None if config is None else open_turbo(options, weights),
        qwen3_vl=open_if_there(texts_are_cached, lambda: open_qwen3_vl(encoder, base)),
        vae_component=open_if_there(latents_are_cached, lambda: open_vae(MODEL, vae, base)),
        dtype=dtype,
        text_dtype=text_dtype_of(options),
        vae_dtype=vae_dtype_of(options.model, options.precision.mixed_precision),
        shrinks_text=options.parts.fp8_text_encoder,
    )


def denoiser_of(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    return open_denoiser(list_specs(), base, "krea2", MARK, DIFFUSERS_MARK, from_diffusers)


def open_turbo(options: Krea2Options, base: Weights) -> Weights | None:
    """Open the denoiser of --turbo_dit. Raises UserError if it cannot stand in for the base, or for this adapter."""
    name = options.parts.turbo_dit
    if name is None:
        return None
    weights = denoiser_of(open_files(TURBO_FLAG, find_model(TURBO_FLAG, name, (("transformer",),))))
    if configure(weights, read_config) != configure(base, read_config):
        raise UserError(f"{TURBO_FLAG} {name} has other sizes than the base {base.origin}")
    if {k: q.kind for k, q in weights.quantised.items()} != {k: q.kind for k, q in base.quantised.items()}:
        raise UserError(
            f"{TURBO_FLAG} {name} is stored differently from the base {base.origin}: one has weights in 8 bits that "
            "the other has not; use two files of one precision"
        )
    if any(argument.startswith("dora_wd") for argument in options.network.network_args or ()):
        raise UserError(
            f"{TURBO_FLAG} does not work with dora_wd, which keeps the norms of the weights that are trained"
        )
    return weights


def open_qwen3_vl(name: str | None, base: BaseFiles) -> Component:
    """Open Qwen3-VL from --text_encoder or from the base model, without the layers that are not used."""
    config, weights = base.open_text_encoder(QWEN3_VL.flag, name, FOLDER, QWEN3_VL.prefix)
    return with_first_layers(qwen3_vl_component(weights, config, QWEN3_VL), LAYERS[-1], QWEN3_VL.flag)


def check_fit(loader: Krea2Loader, config: Krea2Config) -> None:
    """Raise UserError if the parts do not fit together."""
    if config.in_features != CHANNELS * PATCH**2:
        raise UserError(
            f"{BASE_FLAG} {loader.path}: the transformer takes {config.in_features} values per patch, but only "
            f"{CHANNELS * PATCH**2} are supported; use a checkpoint of {MODEL}"
        )
    if config.num_states != len(LAYERS):
        raise UserError(
            f"{BASE_FLAG} {loader.path}: the transformer takes {config.num_states} states of the text encoder for each "
            f"token, but only {len(LAYERS)} are supported; use a checkpoint of {MODEL}"
        )
    check_text_width(QWEN3_VL.flag, loader.qwen3_vl, WORDS, config.fusion.width, QWEN3_VL.hub_name)


def is_turbo(variant: str | None, given: str, path: Path) -> bool:
    """Return True for a distilled checkpoint.

    Turbo and Raw have the same names and shapes, so --dit_variant says which it is, or else the folder's
    `is_distilled`, or else the word "turbo" in the name that was `given` or that of its folder.
    """
    if variant is not None:
        return variant == "turbo"
    recorded = read_json(path / "model_index.json").get("is_distilled") if path.is_dir() else None
    if recorded is not None:
        return bool(recorded)
    full = Path(given).expanduser().absolute()
    return re.search(r"(?<![a-z])turbo", f"{full.parent.name}/{full.name}".lower()) is not None

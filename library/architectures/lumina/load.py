"""Checkpoints of Lumina Image 2.0 to modules: three files, one file of all, or a diffusers folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.lumina.checkpoint_keys import DIFFUSERS_MARK, from_diffusers
from library.architectures.lumina.gemma import gemma_component, gemma_of_folder, load_gemma
from library.architectures.lumina.model import PATCH, LuminaConfig, NextDiT, read_config
from library.architectures.lumina.options import LuminaOptions
from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.weights import Weights, configure, selected, with_prefix
from library.errors import NotThere, UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.identify import refuse_other_folder, refuse_other_model
from library.models.loading import Absent, Component, MaybeComponent, first_side, materialise, open_if_there
from library.models.shapes import shape_of
from library.models.vae.flux import CHANNELS, open_ae
from library.models.vae.vae import empty_vae
from library.options.model import BASE_FLAG

MODEL = "Lumina Image 2.0"
GEMMA_FLAG = "--gemma2"
DENOISER_PREFIXES = ("model.diffusion_model.", "")
GEMMA_MARK = "text_encoders.gemma2_2b."
MARK = "layers.0.attention.qkv.weight"
UNUSED = "norm_final.weight"  # checkpoints have it, the model has no use for it
FOLDERS = {"denoiser": "transformer", "gemma2": "text_encoder", "ae": "vae"}


@dataclass(frozen=True)
class LuminaLoader:
    """The three models, each loaded when it is asked for; frozen, on the CPU."""

    path: Path  # the folder or file of the denoiser
    config: LuminaConfig
    denoiser_weights: Weights
    gemma: MaybeComponent
    ae: MaybeComponent
    dtype: torch.dtype
    vae_dtype: torch.dtype

    @property
    def num_words(self) -> int | None:
        """None where the encoder is not there."""
        return first_side(self.gemma, "embed_tokens.weight")

    def text_encoders(self) -> list[nn.Module]:
        return [load_gemma(self.gemma, self.dtype)]

    def vae(self) -> nn.Module:
        return materialise(empty_vae(self.ae.config), self.ae.weights, self.vae_dtype)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        return materialise(empty_lumina(self.config), self.denoiser_weights, self.dtype, weight_format)


def open_loader(options: LuminaOptions) -> LuminaLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag when a file is missing, broken, incomplete or of another model.
    """
    name = options.model.pretrained_model_name_or_path
    if not name:
        raise UserError(f"{BASE_FLAG} is missing: give the file of Lumina's transformer, or a diffusers folder")
    wanted = {"gemma2": options.lumina.gemma2, "ae": options.lumina.ae}
    needed = [FOLDERS[part] for part in FOLDERS if wanted.get(part) is None]
    path = model_lookup.find_model(BASE_FLAG, name, [(folder,) for folder in needed])
    whole = None if path.is_dir() else model_lookup.open_file(BASE_FLAG, path)
    weights = denoiser_of(path, whole)
    dtype = DTYPES[options.precision.mixed_precision]
    loader = LuminaLoader(
        path=path,
        config=configure(weights, read_config),
        denoiser_weights=weights,
        gemma=open_if_there(
            options.text_caching.cache_text_encoder_outputs_to_disk, lambda: open_gemma(wanted["gemma2"], path, whole)
        ),
        ae=open_if_there(
            options.caching.cache_latents_to_disk, lambda: open_ae(MODEL, BASE_FLAG, wanted["ae"], path, whole)
        ),
        dtype=dtype,
        vae_dtype=torch.float32 if options.model.no_half_vae else dtype,
    )
    check_fit(loader)
    return loader


def empty_lumina(config: LuminaConfig) -> NextDiT:
    """The denoiser on the meta device."""
    with torch.device("meta"):
        return NextDiT(config)


def denoiser_of(path: Path, whole: Weights | None) -> Weights:
    """The denoiser's weights under our names. Raises UserError saying which model it is where it is another."""
    if whole is None:
        refuse_other_folder(list_specs(), BASE_FLAG, path, "lumina")
        _, weights = model_lookup.open_part(BASE_FLAG, path / FOLDERS["denoiser"], FOLDERS["denoiser"])
    else:
        prefix = next(p for p in DENOISER_PREFIXES if any(key.startswith(p) for key in whole.shapes))
        weights = with_prefix(whole, prefix)
    if DIFFUSERS_MARK in weights.shapes:
        weights = from_diffusers(weights)
    if MARK not in weights.shapes:
        names = list(whole.shapes if whole else weights.shapes)
        refuse_other_model(list_specs(), BASE_FLAG, str(path), (whole or weights).shapes, "lumina")
        raise UserError(
            f"{BASE_FLAG} {path}: nothing in it is called {MARK}, so it is no Lumina Image 2.0 transformer (first "
            f"names: {', '.join(names[:3]) or 'none'})"
        )
    return selected(weights, {key: key for key in weights.shapes if key != UNUSED})


def open_gemma(name: str | None, base: Path, whole: Weights | None) -> Component:
    """Gemma 2 from --gemma2, or from the base model."""
    folder = FOLDERS["gemma2"]
    if name is None and whole is None:
        return gemma_of_folder(*model_lookup.open_part(BASE_FLAG, base / folder, folder))
    if name is None:
        assert whole is not None
        if not any(key.startswith(GEMMA_MARK) for key in whole.shapes):
            raise NotThere(f"{GEMMA_FLAG} is missing: {base} has no such text encoder in it")
        return gemma_component(whole)
    config, weights = model_lookup.open_model(GEMMA_FLAG, name, folder)
    try:
        return gemma_component(weights) if config is None else gemma_of_folder(config, weights)
    except ValueError as error:
        raise UserError(f"{GEMMA_FLAG} {error}") from error


def check_fit(loader: LuminaLoader) -> None:
    """Raise UserError where the parts do not fit together."""
    config = loader.config
    if config.in_features != CHANNELS * PATCH**2:
        raise UserError(
            f"{BASE_FLAG} {loader.path}: the transformer takes {config.in_features} values a patch, training feeds "
            f"{CHANNELS * PATCH**2}; use a checkpoint of Lumina Image 2.0"
        )
    if isinstance(loader.gemma, Absent):
        return
    found = shape_of(loader.gemma.weights.shapes, "embed_tokens.weight")[1]
    if found != config.text_width:
        raise UserError(
            f"{GEMMA_FLAG} {loader.gemma.weights.origin} is {found} wide, the transformer listens to "
            f"{config.text_width}; it is another encoder than Lumina's, which is Gemma 2 2B"
        )

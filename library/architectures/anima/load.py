"""Loading of Anima checkpoints: the three files of its release (transformer with text adapter, Qwen3, VAE)."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.anima.checkpoint_keys import ADAPTER
from library.architectures.anima.model import Anima, AnimaConfig, read_config
from library.architectures.anima.options import AnimaOptions
from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles, named
from library.checkpoints.model_lookup import existing
from library.checkpoints.weights import Weights, configure, first_names, with_prefix
from library.errors import UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.identify import open_single_file, refuse_transformer
from library.models.language_models import WORDS
from library.models.loading import Absent, MaybeComponent, first_side, materialise, on_meta_device, open_if_there
from library.models.qwen3 import Qwen3Release, load_qwen3, open_qwen3
from library.models.vae.qwen_image import CHANNELS, empty_vae, open_vae
from library.models.vae.qwen_image_2d import replace_layers_for_images
from library.models.vae.vae import vae_dtype_of
from library.options.model import BASE_FLAG
from library.suggestions import nearby

logger = logging.getLogger(__name__)

ADAPTER_FLAG = "--llm_adapter_path"
MARK = "blocks.0.adaln_modulation_self_attn.1.weight"
ADAPTER_MARK = "blocks.0.norm_self_attn.weight"
QWEN3 = Qwen3Release("--qwen3", "Qwen/Qwen3-0.6B", "text_encoders.qwen3_06b.transformer.model.")
PREFIXES = ("net.", "model.diffusion_model.", "")


@dataclass(frozen=True)
class AnimaLoader:
    """The three models, each loaded on request; frozen, on the CPU."""

    path: Path  # the file of the denoiser
    config: AnimaConfig
    denoiser_weights: Weights
    text: MaybeComponent
    vae_component: MaybeComponent
    dtype: torch.dtype
    vae_dtype: torch.dtype
    computes_in_2d: bool  # the VAE computes in two dimensions

    @property
    def num_qwen3_words(self) -> int | None:
        """The size of Qwen3's vocabulary, or None if its files are missing."""
        return first_side(self.text, WORDS)

    def text_encoders(self) -> list[nn.Module]:
        return [load_qwen3(self.text, self.dtype)]

    def vae(self) -> nn.Module:
        vae = materialise(empty_vae(self.vae_component.config), self.vae_component.weights, self.vae_dtype)
        return replace_layers_for_images(vae) if self.computes_in_2d else vae

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        return materialise(on_meta_device(Anima, self.config), self.denoiser_weights, self.dtype, weight_format)


def open_loader(options: AnimaOptions) -> AnimaLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    path, weights = open_base(options.model.pretrained_model_name_or_path)
    if options.text.llm_adapter_path:
        weights = with_adapter(weights, open_adapter(options.text.llm_adapter_path))
    elif f"{ADAPTER}{ADAPTER_MARK}" not in weights.shapes:
        raise UserError(
            f"{BASE_FLAG} {path} has no text adapter (nothing begins with {ADAPTER!r}); it is a Cosmos model or "
            f"only a part of Anima; use anima-preview.safetensors or another complete one, or add {ADAPTER_FLAG}"
        )
    loader = AnimaLoader(
        path=path,
        config=configure(weights, read_config),
        denoiser_weights=weights,
        text=open_if_there(
            options.text_caching.cache_text_encoder_outputs_to_disk, lambda: open_qwen3(options.text.qwen3, QWEN3)
        ),
        vae_component=open_if_there(
            options.caching.cache_latents_to_disk, lambda: open_vae("Anima", options.model.vae)
        ),
        dtype=DTYPES[options.precision.mixed_precision],
        vae_dtype=vae_dtype_of(options.model, options.precision.mixed_precision),
        computes_in_2d=options.computing.qwen_image_vae_2d,
    )
    check_fit(loader)
    return loader


def open_base(name: str | None) -> tuple[Path, Weights]:
    """Open the denoiser's file, names without prefix. Raises UserError for another model, naming it."""
    path = existing(BASE_FLAG, named(name, "the .safetensors file of Anima's transformer"))
    advice = "use the file of Anima's transformer"
    return path, denoiser_of(path, open_single_file(list_specs(), BASE_FLAG, path, "anima", advice))


def denoiser_of(path: Path, whole: Weights) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it if it is known."""
    prefix = next((p for p in PREFIXES if f"{p}{MARK}" in whole.shapes), None)
    if prefix is None:
        why = f"it has no {MARK}, so it is not an Anima transformer"
        refuse_transformer(list_specs(), BaseFiles(path, whole), whole, "anima", why)
    return with_prefix(whole, prefix)


def open_adapter(name: str) -> Weights:
    """Open the text adapter of --llm_adapter_path, names without prefix."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{ADAPTER_FLAG} {name} is not a file{nearby(path)}")
    weights = model_lookup.open_file(ADAPTER_FLAG, path)
    prefixes = (*(f"{p}{ADAPTER}" for p in PREFIXES), "")
    prefix = next((p for p in prefixes if f"{p}{ADAPTER_MARK}" in weights.shapes), None)
    if prefix is None:
        first = first_names(weights)
        raise UserError(f"{ADAPTER_FLAG} {name} is not a text adapter: it has no {ADAPTER_MARK} (first names: {first})")
    return with_prefix(weights, prefix)


def with_adapter(base: Weights, adapter: Weights) -> Weights:
    """Replace the denoiser's text adapter."""
    own = {name: shape for name, shape in base.shapes.items() if not name.startswith(ADAPTER)}
    given = {f"{ADAPTER}{name}": shape for name, shape in adapter.shapes.items()}

    def read(name: str) -> torch.Tensor:
        return adapter.read(name.removeprefix(ADAPTER)) if name in given else base.read(name)

    return Weights(base.origin, {**own, **given}, read)


def check_fit(loader: AnimaLoader) -> None:
    """Raise UserError if the parts do not fit together."""
    config = loader.config
    if config.channels != CHANNELS:
        raise UserError(
            f"{BASE_FLAG} {loader.path}: the transformer takes {config.channels} channels, but the VAE has "
            f"{CHANNELS}; it is not an Anima model"
        )
    if config.adapter.width != config.text_width:
        raise UserError(
            f"{BASE_FLAG} {loader.path}: its text adapter has width {config.adapter.width}, but the transformer "
            f"expects text features of width {config.text_width}"
        )
    if isinstance(loader.text, Absent):
        return
    width = loader.text.config["hidden_size"]
    if width != config.adapter.source_width:
        raise UserError(
            f"{QWEN3.flag} {loader.text.weights.origin} has width {width}, but Anima's text adapter expects "
            f"{config.adapter.source_width}; use {QWEN3.hub_name}"
        )

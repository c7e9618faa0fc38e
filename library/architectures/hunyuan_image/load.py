"""Loading of HunyuanImage 2.1 checkpoints: the four files of the original release, or a diffusers folder."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.hunyuan_image.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.hunyuan_image.model import HunyuanImage, HunyuanImageConfig, read_config
from library.architectures.hunyuan_image.options import HunyuanImageOptions
from library.architectures.hunyuan_image.qwen import load_qwen, qwen_component
from library.architectures.hunyuan_image.vae import MARK, SCALE, compute_in_chunks, empty_vae, vae_component
from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles, open_base
from library.checkpoints.weights import Weights, configure, renamed
from library.errors import NotThere, UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.identify import open_transformer, refuse_transformer
from library.models.language_models import WORDS, store_in_8_bits, text_encoder_dtype
from library.models.loading import (
    Component,
    MaybeComponent,
    check_text_width,
    first_side,
    materialise,
    on_meta_device,
    open_if_there,
)
from library.models.t5 import load_t5, t5_component, t5_of_folder
from library.options.model import BASE_FLAG
from library.protocols import LatentSpec

logger = logging.getLogger(__name__)

MODEL = "HunyuanImage 2.1"
GLYPH_MARK = "byt5_in.fc1.weight"
FOLDERS = {"vae": "vae", "text_encoder": "text_encoder", "byt5": "text_encoder_2"}
GLYPH_WORDS = "shared.weight"
NUM_BYTE_IDS = 259  # three special tokens and 256 bytes
SPEC = LatentSpec(channels=64, downscale=32, bucket_step=32, cache_suffix="_hi.npz", had_keys_without_size=False)


@dataclass(frozen=True)
class HunyuanImageLoader:
    """The four models, each loaded on request; frozen, on the CPU."""

    path: Path  # the folder or file of the denoiser
    config: HunyuanImageConfig
    denoiser_weights: Weights
    vae_component: MaybeComponent
    qwen: MaybeComponent
    byt5: MaybeComponent
    dtype: torch.dtype
    text_dtype: torch.dtype
    vae_dtype: torch.dtype
    shrinks_qwen: bool
    vae_chunk_rows: int | None = None  # rows of each convolution computed at a time; None for all

    @property
    def num_qwen_words(self) -> int | None:
        """The size of Qwen's vocabulary, or None if its files are missing."""
        return first_side(self.qwen, WORDS)

    def text_encoders(self) -> list[nn.Module]:
        qwen = load_qwen(self.qwen, self.text_dtype)
        if self.shrinks_qwen:
            store_in_8_bits(qwen, "Qwen2.5-VL")
        return [qwen, load_t5(self.byt5, self.text_dtype)]

    def vae(self) -> nn.Module:
        vae = materialise(empty_vae(self.vae_component.config), self.vae_component.weights, self.vae_dtype)
        return vae if self.vae_chunk_rows is None else compute_in_chunks(vae, self.vae_chunk_rows)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        return materialise(on_meta_device(HunyuanImage, self.config), self.denoiser_weights, self.dtype, weight_format)


def open_loader(options: HunyuanImageOptions) -> HunyuanImageLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    own = options.hunyuan_image
    given = {"vae": options.model.vae, "text_encoder": own.text_encoder, "byt5": own.byt5}
    base = open_base(
        options.model.pretrained_model_name_or_path,
        "hunyuanimage2.1.safetensors, or a diffusers folder",
        ["transformer", *(folder for part, folder in FOLDERS.items() if given[part] is None)],
    )
    weights = read_denoiser(base)
    precision = options.precision.mixed_precision
    dtype = DTYPES[precision]
    texts_are_cached = options.text_caching.cache_text_encoder_outputs_to_disk
    loader = HunyuanImageLoader(
        path=base.path,
        config=configure(weights, read_config),
        denoiser_weights=weights,
        vae_component=open_if_there(
            options.caching.cache_latents_to_disk, lambda: checked_vae(open_component("vae", given["vae"], base))
        ),
        qwen=open_if_there(texts_are_cached, lambda: open_component("text_encoder", own.text_encoder, base)),
        byt5=open_if_there(texts_are_cached, lambda: open_component("byt5", own.byt5, base)),
        dtype=dtype,
        text_dtype=text_encoder_dtype(precision),
        vae_dtype=torch.float32 if options.model.no_half_vae or dtype == torch.float32 else torch.float16,
        shrinks_qwen=own.fp8_vl,
        vae_chunk_rows=own.vae_chunk_size or None,
    )
    check_fit(loader)
    return loader


def read_denoiser(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    weights = open_transformer(list_specs(), base, "hunyuan_image")
    if DIFFUSERS_MARK in weights.shapes:
        return KEYS.from_diffusers(weights)
    if GLYPH_MARK not in weights.shapes:
        why = f"it has no {GLYPH_MARK}, so it is not a transformer of {MODEL}"
        refuse_transformer(list_specs(), base, weights, "hunyuan_image", why)
    return weights


def open_component(part: str, name: str | None, base: BaseFiles) -> Component:
    """Open another part from the file or folder of its flag or from the diffusers folder of the base model."""
    flag, folder = f"--{part}", FOLDERS[part]
    if name is None and base.whole is not None:
        raise NotThere(f"{flag} is missing: {base.path} is only the transformer")
    config, weights = base.open_folder(folder) if name is None else model_lookup.open_model(flag, name, folder)
    try:
        if config is None:
            return component_of_file(part, weights)
        if part == "vae":
            return Component(config, weights)
        return qwen_component(weights, config) if part == "text_encoder" else t5_of_folder(config, weights)
    except ValueError as error:
        raise error if flag in str(error) else UserError(f"{flag}: {error}") from error


def component_of_file(part: str, weights: Weights) -> Component:
    if part == "vae":
        return vae_component(weights)
    if part == "text_encoder":
        return qwen_component(weights)
    if any(key.startswith("block.") for key in weights.shapes):  # an encoder saved separately
        weights = renamed(weights, lambda key: key if key == GLYPH_WORDS else f"encoder.{key}")
    return t5_component(weights)


def checked_vae(component: Component) -> Component:
    """Raise UserError if a VAE's latents differ from HunyuanImage 2.1's in shape; warn of another scale."""
    origin, config = component.weights.origin, component.config
    found = (config.get("latent_channels"), config.get("spatial_compression_ratio"))
    if MARK not in component.weights.shapes or found != (SPEC.channels, SPEC.downscale):
        raise UserError(
            f"--vae {origin} has {found[0]} channels per {found[1]} pixels, but {MODEL} needs "
            f"{SPEC.channels} per {SPEC.downscale}; use hunyuan_image_2.1_vae_fp16.safetensors"
        )
    scale = config.get("scaling_factor") or SCALE
    if scale != SCALE:
        logger.warning("--vae %s has latent scale %s, but HunyuanImage 2.1 uses %s", origin, scale, SCALE)
    return component


def check_fit(loader: HunyuanImageLoader) -> None:
    """Raise UserError if the parts do not fit together."""
    config = loader.config
    if config.channels != SPEC.channels:
        raise UserError(
            f"{BASE_FLAG} {loader.path}: the transformer takes {config.channels} channels, but only {SPEC.channels} "
            "are supported"
        )
    whose = f"{MODEL}'s"
    check_text_width("--text_encoder", loader.qwen, WORDS, config.text_width, whose)
    check_text_width("--byt5", loader.byt5, GLYPH_WORDS, config.glyph_width, whose)
    num_words = first_side(loader.byt5, GLYPH_WORDS)
    if num_words is not None and num_words < NUM_BYTE_IDS:
        raise UserError(f"--byt5 {loader.byt5.weights.origin} has {num_words} embeddings; ByT5 needs {NUM_BYTE_IDS}")

"""Checkpoints of HunyuanImage 2.1 to modules: the four files of the original release, or a diffusers folder."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.architectures.hunyuan_image.checkpoint_keys import DIFFUSERS_MARK, from_diffusers
from library.architectures.hunyuan_image.model import HunyuanImage, HunyuanImageConfig, read_config
from library.architectures.hunyuan_image.options import HunyuanImageOptions
from library.architectures.hunyuan_image.qwen import WORDS as QWEN_WORDS
from library.architectures.hunyuan_image.qwen import load_qwen, qwen_component
from library.architectures.hunyuan_image.vae import MARK, SCALE, compute_in_chunks, empty_vae, vae_component
from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.weights import Weights, configure, renamed, with_prefix
from library.errors import NotThere, UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.memory.formats.fp8 import Fp8Rows
from library.memory.frozen import layers_in_blocks, store_all_in
from library.models.identify import refuse_other_folder, refuse_other_model
from library.models.loading import Absent, Component, MaybeComponent, first_side, materialise, open_if_there
from library.models.shapes import shape_of
from library.models.t5 import load_t5, t5_component, t5_of_folder
from library.options.model import BASE_FLAG
from library.protocols import LatentSpec

logger = logging.getLogger(__name__)

DENOISER_PREFIXES = ("model.diffusion_model.", "")
GLYPH_MARK = "byt5_in.fc1.weight"
FOLDERS = {"denoiser": "transformer", "vae": "vae", "text_encoder": "text_encoder", "byt5": "text_encoder_2"}
GLYPH_WORDS = "shared.weight"
NUM_BYTE_IDS = 259  # three special tokens and 256 bytes
SPEC = LatentSpec(channels=64, downscale=32, bucket_step=32, cache_suffix="_hi.npz", had_keys_without_size=False)


@dataclass(frozen=True)
class HunyuanImageLoader:
    """The four models, each loaded when it is asked for; frozen, on the CPU."""

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
    vae_chunk_rows: int | None = None  # of each convolution that are computed at a time; None for all

    @property
    def num_qwen_words(self) -> int | None:
        """None where the encoder is not there."""
        return first_side(self.qwen, QWEN_WORDS)

    def text_encoders(self) -> list[nn.Module]:
        qwen = load_qwen(self.qwen, self.text_dtype)
        if self.shrinks_qwen:
            layers = layers_in_blocks(qwen).values()
            logger.info("Qwen2.5-VL: %d layers in 8 bits", store_all_in(Fp8Rows(), layers))
        return [qwen, load_t5(self.byt5, self.text_dtype)]

    def vae(self) -> nn.Module:
        vae = materialise(empty_vae(self.vae_component.config), self.vae_component.weights, self.vae_dtype)
        return vae if self.vae_chunk_rows is None else compute_in_chunks(vae, self.vae_chunk_rows)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        with torch.device("meta"):
            model = HunyuanImage(self.config)
        return materialise(model, self.denoiser_weights, self.dtype, weight_format)


def open_loader(options: HunyuanImageOptions) -> HunyuanImageLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag when a file is missing, broken, incomplete or of another model.
    """
    name = options.model.pretrained_model_name_or_path
    if not name:
        raise UserError(f"{BASE_FLAG} is missing: give hunyuanimage2.1.safetensors, or a diffusers folder")
    wanted = {
        "vae": options.model.vae,
        "text_encoder": options.hunyuan_image.text_encoder,
        "byt5": options.hunyuan_image.byt5,
    }
    needed = [folder for part, folder in FOLDERS.items() if wanted.get(part) is None]
    path = model_lookup.find_model(BASE_FLAG, name, [(folder,) for folder in needed])
    weights = denoiser_of(path, None if path.is_dir() else model_lookup.open_file(BASE_FLAG, path))
    dtype = DTYPES[options.precision.mixed_precision]
    texts_are_cached = options.text_caching.cache_text_encoder_outputs_to_disk
    loader = HunyuanImageLoader(
        path=path,
        config=configure(weights, read_config),
        denoiser_weights=weights,
        vae_component=open_if_there(
            options.caching.cache_latents_to_disk, lambda: checked_vae(open_component("vae", wanted["vae"], path))
        ),
        qwen=open_if_there(texts_are_cached, lambda: open_component("text_encoder", wanted["text_encoder"], path)),
        byt5=open_if_there(texts_are_cached, lambda: open_component("byt5", wanted["byt5"], path)),
        dtype=dtype,
        text_dtype=torch.bfloat16 if dtype == torch.float16 else dtype,  # Qwen's states do not fit float16
        vae_dtype=torch.float32 if options.model.no_half_vae or dtype == torch.float32 else torch.float16,
        shrinks_qwen=options.hunyuan_image.fp8_vl,
        vae_chunk_rows=options.hunyuan_image.vae_chunk_size or None,
    )
    check_fit(loader)
    return loader


def denoiser_of(path: Path, whole: Weights | None) -> Weights:
    """The denoiser's weights under our names. Raises UserError saying which model it is where it is another."""
    if whole is None:
        refuse_other_folder(list_specs(), BASE_FLAG, path, "hunyuan_image")
        _, weights = model_lookup.open_part(BASE_FLAG, path / FOLDERS["denoiser"], FOLDERS["denoiser"])
    else:
        prefix = next(p for p in DENOISER_PREFIXES if not p or any(key.startswith(p) for key in whole.shapes))
        weights = with_prefix(whole, prefix)
    if DIFFUSERS_MARK in weights.shapes:
        return from_diffusers(weights)
    if GLYPH_MARK not in weights.shapes:
        names = list(weights.shapes)
        refuse_other_model(list_specs(), BASE_FLAG, str(path), (whole or weights).shapes, "hunyuan_image")
        raise UserError(
            f"{BASE_FLAG} {path}: it has no {GLYPH_MARK}, so it is no transformer of HunyuanImage 2.1 (first names: "
            f"{', '.join(names[:3]) or 'none'})"
        )
    return weights


def open_component(part: str, name: str | None, base: Path) -> Component:
    """One of the other models, from the file or folder of its flag or from the diffusers folder of the base."""
    flag, folder = f"--{part}", FOLDERS[part]
    if name is None and not base.is_dir():
        raise NotThere(f"{flag} is missing: {base} is the transformer alone")
    if name is None:
        opened: tuple[dict[str, Any] | None, Weights] = model_lookup.open_part(BASE_FLAG, base / folder, folder)
    else:
        opened = model_lookup.open_model(flag, name, folder)
    config, weights = opened
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
    if any(key.startswith("block.") for key in weights.shapes):  # an encoder that was saved by itself
        weights = renamed(weights, lambda key: key if key == GLYPH_WORDS else f"encoder.{key}")
    return t5_component(weights)


def checked_vae(component: Component) -> Component:
    """Raise UserError where a VAE makes other latents than HunyuanImage 2.1's."""
    origin, config = component.weights.origin, component.config
    found = (config.get("latent_channels"), config.get("spatial_compression_ratio"))
    if MARK not in component.weights.shapes or found != (SPEC.channels, SPEC.downscale):
        raise UserError(
            f"--vae {origin} makes {found[0]} channels of every {found[1]} pixels, HunyuanImage 2.1 needs "
            f"{SPEC.channels} of every {SPEC.downscale}; use hunyuan_image_2.1_vae_fp16.safetensors"
        )
    scale = config.get("scaling_factor") or SCALE
    if scale != SCALE:
        logger.warning("--vae %s is made for latents times %s; HunyuanImage 2.1 takes %s", origin, scale, SCALE)
    return component


def check_fit(loader: HunyuanImageLoader) -> None:
    """Raise UserError where the parts do not fit together."""
    config = loader.config
    if config.channels != SPEC.channels:
        raise UserError(
            f"{BASE_FLAG} {loader.path}: the transformer takes {config.channels} channels, training feeds "
            f"{SPEC.channels}"
        )
    for flag, component, words, width in (
        ("--text_encoder", loader.qwen, QWEN_WORDS, config.text_width),
        ("--byt5", loader.byt5, GLYPH_WORDS, config.glyph_width),
    ):
        if isinstance(component, Absent):
            continue
        num_words, found = shape_of(component.weights.shapes, words)
        if found != width:
            raise UserError(
                f"{flag} {component.weights.origin} is {found} wide, the transformer listens to {width}; it is another "
                "encoder than HunyuanImage 2.1's"
            )
        if flag == "--byt5" and num_words < NUM_BYTE_IDS:
            raise UserError(f"{flag} {component.weights.origin} knows {num_words} words; ByT5 has more than 258")

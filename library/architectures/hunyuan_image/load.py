"""Loading of HunyuanImage 2.1 checkpoints: the four files of the original release, or a diffusers folder."""

import logging
from functools import partial

import torch

from library.architectures.hunyuan_image.layers import DIFFUSERS_MARK, KEYS, denoiser_module, from_original, is_target
from library.architectures.hunyuan_image.model import HunyuanImage, HunyuanImageConfig, read_config
from library.architectures.hunyuan_image.options import HunyuanImageOptions
from library.architectures.hunyuan_image.qwen import load_qwen, qwen_component
from library.architectures.hunyuan_image.vae import MARK, SCALE, load_hunyuan_image_vae, vae_component
from library.architectures.specs import list_specs
from library.base.errors import NotThere, about, flagged
from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles, open_base
from library.checkpoints.weights import Weights, configure, rename_weights
from library.memory.devices import DTYPES
from library.models.dit_loader import DitLoader, check_input_width, open_dit_loader
from library.models.language_models import WORDS, choose_load
from library.models.loading import Component, check_text_width, get_first_side
from library.models.t5 import load_t5, t5_component, t5_of_folder
from library.models.transformer_file import TransformerFile
from library.protocols import LatentSpec

logger = logging.getLogger(__name__)

MODEL = "HunyuanImage 2.1"
FOLDERS = {"vae": "vae", "text_encoder": "text_encoder", "byt5": "text_encoder_2"}
GLYPH_WORDS = "shared.weight"
NUM_BYTE_IDS = 259  # three special tokens and 256 bytes
TRANSFORMER = TransformerFile(
    base="hunyuan_image",
    title=MODEL,
    architecture="hunyuan-image-2.1",
    mark="byt5_in.fc1.weight",
    diffusers_mark=DIFFUSERS_MARK,
    is_layer=is_target,
    name=denoiser_module,
    build=HunyuanImage,
    read_config=read_config,
    from_diffusers=KEYS.from_diffusers,
)
SPEC = LatentSpec(channels=64, downscale=32, bucket_step=32, cache_suffix="_hi.npz", had_keys_without_size=False)


def open_loader(options: HunyuanImageOptions) -> DitLoader:
    """Open the files that the options name, Qwen2.5-VL and ByT5 as text encoders; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    model_options = options.parts
    paths = {"vae": options.model.vae, "text_encoder": model_options.text_encoder, "byt5": model_options.byt5}
    base = open_base(
        options.model,
        "hunyuanimage2.1.safetensors, or a diffusers folder",
        ["transformer", *(folder for part, folder in FOLDERS.items() if paths[part] is None)],
    )
    weights = TRANSFORMER.read(list_specs(), base)  # under their original names
    config = configure(weights, read_config)
    # sd-scripts runs this VAE in float16 under bf16 too.
    is_float32 = options.model.no_half_vae or DTYPES[options.precision.mixed_precision] == torch.float32
    loader = open_dit_loader(
        options,
        base,
        rename_weights(weights, from_original),
        partial(HunyuanImage, config),
        texts=[
            (
                lambda: open_component("text_encoder", model_options.text_encoder, base),
                choose_load(load_qwen, "Qwen2.5-VL", model_options.fp8_vl),
            ),
            (lambda: open_component("byt5", model_options.byt5, base), load_t5),
        ],
        vae=lambda: check_vae(open_component("vae", paths["vae"], base)),
        load_vae=partial(load_hunyuan_image_vae, chunk_rows=model_options.vae_chunk_size or None),
        vae_dtype=torch.float32 if is_float32 else torch.float16,
    )
    check_fit(loader, config)
    return loader


def open_component(part: str, name: str | None, base: BaseFiles) -> Component:
    """Open a part from the file or folder of its flag, or from the folder of the base model in diffusers' layout."""
    flag, folder = f"--{part}", FOLDERS[part]
    if name is None and base.whole is not None:
        raise about(flag, kind=NotThere)(f"is missing: {base.path} is only the transformer")
    config, weights = base.open_folder(folder) if name is None else model_lookup.open_model(flag, name, folder)
    with flagged(flag):
        if config is None:
            return component_of_file(part, weights)
        if part == "vae":
            return Component(config, weights)
        return qwen_component(weights, config) if part == "text_encoder" else t5_of_folder(config, weights)


def component_of_file(part: str, weights: Weights) -> Component:
    if part == "vae":
        return vae_component(weights)
    if part == "text_encoder":
        return qwen_component(weights)
    if any(key.startswith("block.") for key in weights.shapes):  # an encoder saved separately
        weights = rename_weights(weights, lambda key: key if key == GLYPH_WORDS else f"encoder.{key}")
    return t5_component(weights)


def check_vae(component: Component) -> Component:
    """Return the VAE. Raises UserError for latents of another shape than HunyuanImage 2.1's; warns of another scale."""
    origin, config = component.weights.origin, component.config
    latent_shape = (config.get("latent_channels"), config.get("spatial_compression_ratio"))
    if MARK not in component.weights.shapes or latent_shape != (SPEC.channels, SPEC.downscale):
        raise about("--vae", origin)(
            f"has {latent_shape[0]} channels per {latent_shape[1]} pixels, but {MODEL} needs {SPEC.channels} per "
            f"{SPEC.downscale}",
            "use hunyuan_image_2.1_vae_fp16.safetensors",
        )
    scale = config.get("scaling_factor") or SCALE
    if scale != SCALE:
        logger.warning("--vae %s has latent scale %s, but HunyuanImage 2.1 uses %s", origin, scale, SCALE)
    return component


def check_fit(loader: DitLoader, config: HunyuanImageConfig) -> None:
    """Raise UserError if the parts do not fit together."""
    check_input_width(loader.path, config.in_features, SPEC.channels, "token", MODEL)
    qwen, byt5 = (part.component for part in loader.texts)
    check_text_width("--text_encoder", qwen, WORDS, config.text_width, f"{MODEL}'s Qwen2.5-VL")
    check_text_width("--byt5", byt5, GLYPH_WORDS, config.glyph_width, f"{MODEL}'s ByT5")
    num_words = get_first_side(byt5, GLYPH_WORDS)
    if num_words is not None and num_words < NUM_BYTE_IDS:
        raise about("--byt5", byt5.weights.origin)(f"has {num_words} embeddings; ByT5 needs {NUM_BYTE_IDS}")

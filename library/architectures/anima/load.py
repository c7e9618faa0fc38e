"""Loading of Anima checkpoints: the three files of its release (transformer with text adapter, Qwen3, VAE)."""

from functools import partial
from pathlib import Path

from library.architectures.anima.layers import ADAPTER
from library.architectures.anima.model import Anima, AnimaConfig, read_config
from library.architectures.anima.options import AnimaOptions
from library.architectures.specs import list_specs
from library.base.errors import about
from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles, check_variant, require_base_name
from library.checkpoints.model_lookup import existing
from library.checkpoints.weights import Weights, configure, join_weights, list_first_names, rename_weights, with_prefix
from library.memory.devices import DTYPES
from library.models.dit_loader import DitLoader, check_input_width, open_dit_loader
from library.models.identify import open_single_file, refuse_transformer
from library.models.loading import Absent
from library.models.qwen3 import Qwen3Release, load_qwen3, open_qwen3
from library.models.vae.qwen_image import CHANNELS, load_vae, open_vae
from library.models.vae.qwen_image_2d import load_vae_for_images
from library.options.model import BASE_FLAG

ADAPTER_FLAG = "--llm_adapter_path"
MARK = "blocks.0.adaln_modulation_self_attn.1.weight"
ADAPTER_MARK = "blocks.0.norm_self_attn.weight"
QWEN3 = Qwen3Release("--qwen3", "Qwen/Qwen3-0.6B", "text_encoders.qwen3_06b.transformer.model.")
PREFIXES = ("net.", "model.diffusion_model.", "")


def open_loader(options: AnimaOptions) -> tuple[DitLoader, AnimaConfig]:
    """Open the files that the options name; only headers are read. Return the loader and the transformer's
    configuration.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    path, weights = open_base(options.model.pretrained_model_name_or_path)
    check_variant(path, (), options.model.variant)
    if options.text.llm_adapter_path:
        weights = with_adapter(weights, open_adapter(options.text.llm_adapter_path))
    elif f"{ADAPTER}{ADAPTER_MARK}" not in weights.shapes:
        raise about(BASE_FLAG, path, cause="missing")(
            f"has no text adapter (nothing begins with {ADAPTER!r}); it is a Cosmos model or only a part of Anima",
            f"use anima-preview.safetensors or another complete one, or add {ADAPTER_FLAG}",
        )
    config = configure(weights, read_config)
    loader = open_dit_loader(
        options,
        BaseFiles(path),
        weights,
        partial(Anima, config),
        texts=[(lambda: open_qwen3(options.text.qwen3, QWEN3), load_qwen3)],
        text_dtype=DTYPES[options.precision.mixed_precision],
        vae=lambda: open_vae("Anima", options.model.vae),
        load_vae=load_vae_for_images if options.computing.qwen_image_vae_2d else load_vae,
    )
    check_fit(loader, config)
    return loader, config


def open_base(name: str | None) -> tuple[Path, Weights]:
    """Open the denoiser's file, names without prefix. Raises UserError for another model, naming it."""
    path = existing(BASE_FLAG, require_base_name(name, "the .safetensors file of Anima's transformer"))
    advice = "use the file of Anima's transformer"
    return path, read_denoiser(path, open_single_file(list_specs(), BASE_FLAG, path, "anima", advice))


def read_denoiser(path: Path, weights: Weights) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it if it is known."""
    prefix = next((p for p in PREFIXES if f"{p}{MARK}" in weights.shapes), None)
    if prefix is None:
        why = f"it has no {MARK}, so it is not an Anima transformer"
        refuse_transformer(list_specs(), BaseFiles(path, weights), weights, "anima", why)
    return with_prefix(weights, prefix)


def open_adapter(name: str) -> Weights:
    """Open the text adapter of --llm_adapter_path, names without prefix."""
    weights = model_lookup.open_file(ADAPTER_FLAG, Path(name).expanduser())
    prefixes = (*(f"{p}{ADAPTER}" for p in PREFIXES), "")
    prefix = next((p for p in prefixes if f"{p}{ADAPTER_MARK}" in weights.shapes), None)
    if prefix is None:
        first_names = list_first_names(weights)
        raise about(ADAPTER_FLAG)(
            f"{name} is not a text adapter: it has no {ADAPTER_MARK} (first names: {first_names})"
        )
    return with_prefix(weights, prefix)


def with_adapter(base: Weights, adapter: Weights) -> Weights:
    """Return the denoiser's weights with `adapter` in place of its text adapter."""
    # Either file may store some weights in 8 bits, which joining keeps.
    parts = {"base": base, "adapter": rename_weights(adapter, lambda name: f"{ADAPTER}{name}")}
    part_of = {name: "base" for name in base.shapes if not name.startswith(ADAPTER)}
    return join_weights(base.origin, parts, {**part_of, **dict.fromkeys(parts["adapter"].shapes, "adapter")})


def check_fit(loader: DitLoader, config: AnimaConfig) -> None:
    """Raise UserError if the parts do not fit together."""
    check_input_width(loader.path, config.channels, CHANNELS, "latent pixel", "Anima")
    if config.adapter.width != config.text_width:
        raise about(BASE_FLAG, loader.path, cause="does not fit")(
            f": its text adapter has width {config.adapter.width}, but the transformer "
            f"expects text features of width {config.text_width}"
        )
    if isinstance(loader.text.component, Absent):
        return
    width = loader.text.component.config["hidden_size"]
    if width != config.adapter.source_width:
        raise about(QWEN3.flag, loader.text.component.weights.origin, cause="does not fit")(
            f"has width {width}, but Anima's text adapter expects {config.adapter.source_width}",
            f"use {QWEN3.hub_name}",
        )

"""Loading of Qwen-Image 2.1 checkpoints: three files, one file with everything, or a diffusers folder."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import nn

from library.architectures.qwen_image_21.checkpoint_keys import FUSED, PARTS
from library.architectures.qwen_image_21.model import QwenImage21, read_config
from library.architectures.qwen_image_21.options import QwenImage21Options
from library.architectures.qwen_image_21.vae import CHANNELS, load_qwen_image_21_vae, open_vae
from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.fused_tensors import split_rows
from library.checkpoints.weights import Weights, configure
from library.models import dit_loader
from library.models.dit_loader import DitLoader, add_vision, check_input_width, open_dit, open_dit_loader
from library.models.identify import open_denoiser
from library.models.language_models import WORDS, choose_load
from library.models.loading import check_text_width
from library.models.qwen3 import FOLDER, Qwen3Release
from library.models.qwen3_vl import load_qwen3_vl, qwen3_vl_component
from library.models.qwen3_vl_vision import load_vision, vision_component

MODEL = "Qwen-Image 2.1"
QWEN3_VL = Qwen3Release("--text_encoder", "Qwen/Qwen3-VL-8B-Instruct", "text_encoders.qwen3vl_8b.transformer.model.")
MARK = "txt_in.text_norm.weight"


def open_loader(options: QwenImage21Options) -> DitLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(options.model, options.parts.text_encoder, MODEL)
    weights = read_denoiser(base)
    config = configure(weights, read_config)
    loader = build_loader(options, base, weights, partial(QwenImage21, config))
    check_input_width(base.path, config.in_features, CHANNELS, "token", MODEL)
    check_text_width(QWEN3_VL.flag, loader.text.component, WORDS, config.text_width, QWEN3_VL.hub_name)
    return loader


def build_loader(
    options: QwenImage21Options, base: BaseFiles, weights: Weights, build: Callable[[], nn.Module] | None = None
) -> DitLoader:
    # The language and the vision model are in the same files, whose headers are read once.
    qwen3_vl = cache(lambda: open_qwen3_vl(options.parts.text_encoder, base))
    load_text = choose_load(load_qwen3_vl, "Qwen3-VL", options.parts.fp8_vl)
    loader = open_dit_loader(
        options,
        base,
        weights,
        build,
        texts=[(lambda: qwen3_vl_component(*qwen3_vl(), QWEN3_VL), load_text)],
        vae=lambda: open_vae(options.model.vae, base),
        load_vae=load_qwen_image_21_vae,
    )
    return add_vision(loader, lambda: vision_component(qwen3_vl()[0]), load_vision)


open_encoder = partial(dit_loader.open_encoder, open_loader, build_loader)


def read_denoiser(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    return split_rows(open_denoiser(list_specs(), base, "qwen_image_21", MARK), FUSED, PARTS)


def open_qwen3_vl(name: str | None, base: BaseFiles) -> tuple[Weights, dict[str, Any] | None]:
    """Open Qwen3-VL from --text_encoder or the base model; return its weights and the configuration, if in a folder."""
    config, weights = base.open_text_encoder(QWEN3_VL.flag, name, FOLDER, QWEN3_VL.prefix)
    return weights, config

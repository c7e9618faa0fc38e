"""Which base model a checkpoint is of, and what to tell a user who gave another one than is wanted.

Base models are named by the keys of `library.checkpoints.adapter_names.BASES`: "sd1", "sd2", "sdxl", ...
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from library.checkpoints.model_lookup import read_json
from library.checkpoints.weights import Weights
from library.errors import UserError
from library.models.unet_keys import UNET_PREFIX
from library.models.vae_keys import VAE_PREFIX

logger = logging.getLogger(__name__)

SD1_TEXT_WIDTH = 768
SD2_TEXT_WIDTH = 1024

WORDS: Mapping[str, tuple[str, str]] = {  # how to call a model, and the script that trains it
    "sd1": ("an SD 1.x", "train_network.py"),
    "sd2": ("an SD 2.x", "train_network.py with --v2"),
    "sdxl": ("an SDXL", "sdxl_train_network.py"),
    "sd3": ("an SD3", "sd3_train_network.py"),
    "flux": ("a FLUX", "flux_train_network.py"),
    "lumina": ("a Lumina", "lumina_train_network.py"),
    "hunyuan_image": ("a HunyuanImage", "hunyuan_image_train_network.py"),
    "anima": ("an Anima", "anima_train_network.py"),
}
FILE_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (  # (base, what a name contains); the first that fits is told
    ("sdxl", ("conditioner.embedders.", "diffusion_model.label_emb.", "add_embedding.linear_1")),
    ("sd3", ("joint_blocks.",)),
    ("hunyuan_image", ("txt_in.individual_token_refiner", "byt5_in.")),
    ("flux", ("double_blocks.", "single_transformer_blocks.")),
    ("lumina", ("cap_embedder.", "context_refiner.")),
    ("anima", ("llm_adapter.",)),
    ("sd2", ("cond_stage_model.model.",)),
)
UNET_MODELS = ("sd1", "sd2", "sdxl")
REFINER_MARK = "conditioner.embedders.0.model."
NO_MODELS = (  # told only when there is no U-Net: old checkpoints may carry such names beside it
    ((".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lokr_w", ".hada_w", "lora_unet_", "lora_te_"),
     "an adapter (LoRA), not a base model; go on training it with --network_weights"),
    (("control_model.", "controlnet_"), "a ControlNet, not a base model"),
    (("emb_params", "string_to_param"), "a textual inversion embedding, not a base model"),
    (("down_blocks.", "up_blocks.", "mid_block."),
     "the U-Net of a diffusers folder alone; give the folder that has unet/, vae/ and text_encoder/"),
    ((VAE_PREFIX, "encoder.down.", "encoder.down_blocks.", "decoder.conv_in."),
     "a VAE, not a base model; use it with --vae"),
    (("encoder.layers.", "token_embedding"), "a text encoder alone, not a base model"),
)  # fmt: skip
PIPELINES: Mapping[str, str] = {  # how the class names of diffusers' pipelines begin
    "StableDiffusionXL": "sdxl",
    "StableDiffusion3": "sd3",
    "Flux": "flux",
    "Lumina": "lumina",
    "HunyuanImage": "hunyuan_image",
    "Anima": "anima",
}


def base_of_file(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The base model of a single file, None where its names do not tell."""
    for base, marks in FILE_MARKS:
        if any(mark in name for name in names for mark in marks):
            return base
    return unet_generation(shapes) if any(name.startswith(UNET_PREFIX) for name in names) else None


def base_of_folder(class_name: str, unet_shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The base model of a diffusers folder, by its pipeline's class name and its U-Net."""
    found = pipeline_base(class_name)
    if found is None and any("add_embedding.linear_1" in name for name in unet_shapes):
        found = "sdxl"
    return found or unet_generation(unet_shapes)


def refuse_other_folder(flag: str, folder: Path, wanted: str) -> None:
    """Raise UserError where a diffusers folder names the pipeline of another model than `wanted`, or of one that no
    script trains. A folder that names none passes, and so does one with a U-Net, which tells more than a name."""
    class_name = read_json(folder / "model_index.json").get("_class_name", "")
    found = pipeline_base(class_name)
    if found is None and class_name.startswith("StableDiffusion") and wanted not in UNET_MODELS:
        found = unet_generation({})
    refuse_other(flag, str(folder), found, wanted)
    if found is None and class_name and not class_name.startswith("StableDiffusion") and not (folder / "unet").is_dir():
        raise UserError(f"{flag} {folder}: its model_index.json names {class_name}, which no script trains yet")


def pipeline_base(class_name: str) -> str | None:
    return next((base for start, base in PIPELINES.items() if class_name.startswith(start)), None)


def unet_generation(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """SD 1.x or 2.x: by the width of the text that a U-Net listens to; small ones by the kind of their projections."""
    width = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    if width in (SD1_TEXT_WIDTH, SD2_TEXT_WIDTH):
        return "sd2" if width == SD2_TEXT_WIDTH else "sd1"
    projection = next((shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")), ())
    return "sd2" if len(projection) == 2 else "sd1"


def way_out(found: str, wanted: str) -> str:
    """What to do with a model of another kind than is wanted."""
    if (found, wanted) == ("sd2", "sd1"):
        return "add --v2"
    if (found, wanted) == ("sd1", "sd2"):
        return "leave out --v2"
    return f"use {WORDS[found][1]}"


def refuse_other_file(flag: str, weights: Weights, wanted: str, text_prefixes: Sequence[str]) -> None:
    """Raise UserError when a single file is no whole checkpoint of a U-Net model `wanted`, naming what it is."""
    names = list(weights.shapes)
    if any(name.startswith(REFINER_MARK) for name in names):
        raise UserError(f"{flag} {weights.origin}: this is the SDXL refiner; only the base model is trained")
    refuse_other(flag, weights.origin, base_of_file(names, weights.shapes), wanted, "checkpoint")
    if not any(name.startswith(UNET_PREFIX) for name in names):
        what = next((what for marks, what in NO_MODELS if any(m in name for name in names for m in marks)), None)
        if what:
            raise UserError(f"{flag} {weights.origin}: this is {what}")
        raise UserError(
            f"{flag} {weights.origin}: nothing in it begins with {UNET_PREFIX!r}, so it is no Stable Diffusion "
            f"checkpoint (first names: {', '.join(names[:3]) or 'none'})"
        )
    for prefix in text_prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise UserError(
                f"{flag} {weights.origin} has a U-Net but no text encoder (nothing begins with {prefix!r}); "
                "use a full checkpoint"
            )


def refuse_other(flag: str, origin: str, found: str | None, wanted: str, kind: str = "model") -> None:
    """Raise UserError for a folder or file in which another base model was recognised; None is none."""
    if found is not None and found != wanted:
        raise UserError(f"{flag} {origin}: this is {WORDS[found][0]} {kind}; {way_out(found, wanted)}")


def warn_of_other_prediction(path: Path, predicts_velocity: bool) -> None:
    """Say so when a diffusers folder was trained to predict another thing than this run will teach it."""
    learned = read_json(path / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if predicts_velocity != (learned == "v_prediction"):
        verb = "give" if learned == "v_prediction" else "leave out"
        logger.warning(
            "%s says that the model predicts %s; %s --v_parameterization to go on with that", path, learned, verb
        )

"""Which base model a checkpoint is of, and what to tell a user who gave another one than is wanted."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from library.checkpoints import model_lookup
from library.checkpoints.model_card import ModelCard, Shapes, recognise
from library.checkpoints.model_lookup import read_json
from library.checkpoints.weights import Weights, with_prefix
from library.errors import NotThere, UserError
from library.models.unet.keys import UNET_NAME, UNET_PREFIX
from library.models.vae.keys import VAE_PREFIX

logger = logging.getLogger(__name__)

NO_MODELS = (  # told only when there is no U-Net: old checkpoints may carry such names beside it
    ((".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lokr_w", ".hada_w", ".oft_", ".boft_", "lora_unet_",
      "lora_te_"),
     "an adapter (LoRA), not a base model; go on training it with --network_weights"),
    (("control_model.", "controlnet_"), "a ControlNet, not a base model"),
    (("emb_params", "string_to_param"), "a textual inversion embedding, not a base model"),
    (("down_blocks.", "up_blocks.", "mid_block."),
     "the U-Net of a diffusers folder alone; give the folder that has unet/, vae/ and text_encoder/"),
    ((VAE_PREFIX, "encoder.down.", "encoder.down_blocks.", "decoder.conv_in."),
     "a VAE, not a base model; use it with --vae"),
    (("encoder.layers.", "token_embedding"), "a text encoder alone, not a base model"),
)  # fmt: skip


def base_of_file(cards: Sequence[ModelCard], shapes: Shapes) -> ModelCard | None:
    """The base model of a single file, None where its names do not tell."""
    return recognise(cards, shapes, lambda card: card.checkpoint)


def base_of_folder(cards: Sequence[ModelCard], class_name: str, unet_shapes: Shapes) -> ModelCard | None:
    """The base model of a diffusers folder with a U-Net, by its pipeline's class name and the U-Net's names."""
    named = bases_of_pipeline(cards, class_name)
    if len(named) == 1:
        return named[0]
    return base_of_file(cards, {f"unet.{name}": shape for name, shape in unet_shapes.items()})


def bases_of_pipeline(cards: Sequence[ModelCard], class_name: str) -> tuple[ModelCard, ...]:
    """The base models that a pipeline of diffusers is for: those with the longest beginning of its class name."""
    lengths = [max((len(s) for s in card.pipelines if class_name.startswith(s)), default=0) for card in cards]
    return tuple(card for card, length in zip(cards, lengths, strict=True) if length and length == max(lengths))


def base_of_checkpoint(cards: Sequence[ModelCard], flag: str, path: Path) -> ModelCard:
    """The base model of a file or folder, recognised by names alone.

    Raises UserError naming `flag` for one that is broken or of no base model that is known, saying what it is.
    """
    if not path.is_dir():
        weights = model_lookup.open_file(flag, path)
        found = base_of_file(cards, weights.shapes)
        return found or refuse_unknown_file(flag, weights)
    class_name = read_json(path / "model_index.json").get("_class_name", "")
    named = bases_of_pipeline(cards, class_name)
    if not named:
        refuse_unknown_folder(flag, path, class_name)
    if len(named) == 1:
        return named[0]
    found = base_of_folder(cards, class_name, model_lookup.open_part(flag, path / "unet", "unet")[1].shapes)
    if found is None:  # whatever has names is of the family
        raise UserError(f"{flag} {path}: the U-Net in it has no weights")
    return found


def refuse_other_folder(cards: Sequence[ModelCard], flag: str, folder: Path, wanted: str) -> None:
    """Raise UserError where a diffusers folder names the pipeline of another model than `wanted`, or of one that no
    script trains. A folder that names none passes, and so does one with a U-Net, which tells more than a name."""
    class_name = read_json(folder / "model_index.json").get("_class_name", "")
    named = bases_of_pipeline(cards, class_name)
    is_told = len(named) == 1 or (named and not card_of(cards, wanted).folders)
    refuse_other(cards, flag, str(folder), named[0] if is_told else base_of_parts(cards, folder), wanted)
    if not named:
        refuse_unknown_folder(flag, folder, class_name)


def base_of_parts(cards: Sequence[ModelCard], folder: Path) -> ModelCard | None:
    """The one base model that has more of its folders there than others have, None where several have as many."""
    there = [card for card in cards if card.folders and all((folder / name).is_dir() for name in card.folders)]
    most = max((len(card.folders) for card in there), default=0)
    found = [card for card in there if len(card.folders) == most]
    return found[0] if len(found) == 1 else None


def refuse_unknown_folder(flag: str, folder: Path, class_name: str) -> None:
    """Raise UserError for a folder whose pipeline no script trains, unless there is a U-Net, which tells more."""
    if class_name and not (folder / "unet").is_dir():
        raise UserError(f"{flag} {folder}: its model_index.json names {class_name}, which no script trains yet")


def way_out(found: ModelCard, wanted: ModelCard) -> str:
    """What to do with a model of another kind than is wanted."""
    if found.script == wanted.script:
        return f"add {found.script_flag}" if found.script_flag else f"leave out {wanted.script_flag}"
    return f"use {found.script}" + (f" with {found.script_flag}" if found.script_flag else "")


def refuse_other_file(cards: Sequence[ModelCard], flag: str, weights: Weights, wanted: str) -> None:
    """Raise UserError when a single file is no checkpoint of a U-Net model `wanted`, naming what it is."""
    names = list(weights.shapes)
    refuse_variants(cards, flag, weights.origin, weights.shapes)
    refuse_other(cards, flag, weights.origin, base_of_file(cards, weights.shapes), wanted, "checkpoint")
    if not any(re.match(UNET_NAME, name) for name in names):
        refuse_unknown_file(flag, weights)


def text_encoder_in(flag: str, weights: Weights, prefix: str) -> Weights:
    """The text encoder in a checkpoint of a U-Net model, whose names begin with `prefix`. Raises NotThere."""
    found = with_prefix(weights, prefix)
    if not found.shapes:
        raise NotThere(
            f"{flag} {weights.origin} has a U-Net but no text encoder (nothing begins with {prefix!r}); "
            "use a full checkpoint"
        )
    return found


def refuse_variants(cards: Sequence[ModelCard], flag: str, origin: str, shapes: Shapes) -> None:
    """Raise UserError for a file of a model that looks like one of those known and is not trained."""
    for pattern, what in (item for card in cards for item in card.variants.items()):
        if any(re.search(pattern, name) for name in shapes):
            raise UserError(f"{flag} {origin}: this is {what}")


def refuse_unknown_file(flag: str, weights: Weights) -> NoReturn:
    """Raise UserError for a file in which no base model is recognised, saying what it is."""
    names = list(weights.shapes)
    what = next((what for marks, what in NO_MODELS if any(m in name for name in names for m in marks)), None)
    if what:
        raise UserError(f"{flag} {weights.origin}: this is {what}")
    of_denoiser = [name for name in names if name.startswith(UNET_PREFIX)]
    if of_denoiser:
        raise UserError(
            f"{flag} {weights.origin}: its denoiser is of no model that a script trains (first names: "
            f"{', '.join(of_denoiser[:3])})"
        )
    raise UserError(
        f"{flag} {weights.origin}: nothing in it begins with {UNET_PREFIX!r}, so it is no Stable Diffusion "
        f"checkpoint (first names: {', '.join(names[:3]) or 'none'})"
    )


def refuse_other_model(cards: Sequence[ModelCard], flag: str, origin: str, shapes: Shapes, wanted: str) -> None:
    """Raise UserError for a file in which another base model than `wanted` is recognised."""
    refuse_variants(cards, flag, origin, shapes)
    refuse_other(cards, flag, origin, base_of_file(cards, shapes), wanted)


def refuse_other(
    cards: Sequence[ModelCard], flag: str, origin: str, found: ModelCard | None, wanted: str, kind: str = "model"
) -> None:
    """Raise UserError for a folder or file in which another base model was recognised; None stands for no model."""
    if found is not None and found.name != wanted:
        raise UserError(f"{flag} {origin}: this is {found.called} {kind}; {way_out(found, card_of(cards, wanted))}")


def card_of(cards: Sequence[ModelCard], name: str) -> ModelCard:
    return next(card for card in cards if card.name == name)


def warn_of_other_prediction(path: Path, predicts_velocity: bool) -> None:
    """Say so when a diffusers folder was trained to predict another thing than this run will teach it."""
    learned = read_json(path / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if predicts_velocity != (learned == "v_prediction"):
        verb = "give" if learned == "v_prediction" else "leave out"
        logger.warning(
            "%s says that the model predicts %s; %s --v_parameterization to go on with that", path, learned, verb
        )

"""Recognition of a checkpoint's base model, and errors for a model other than the requested one."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from library.base.errors import NotThere, about
from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.base_model_spec import BaseModelSpec, Shapes, bases_of_pipeline, recognise
from library.checkpoints.model_lookup import read_json, read_pipeline_class
from library.checkpoints.weights import Weights, find_prefix, list_first_names, with_prefix
from library.models.unet.checkpoint_keys import UNET_NAME, UNET_PREFIX
from library.models.vae.checkpoint_keys import VAE_PREFIX

logger = logging.getLogger(__name__)

DENOISER_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "",
)  # prefixes of a transformer's names in files
NO_MODELS = (  # used only if there is no U-Net: old checkpoints may contain such names too
    ((".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lokr_w", ".hada_w", ".oft_", ".boft_", "lora_unet_",
      "lora_te_"),
     "an adapter (LoRA), not a base model; continue training it with --network_weights"),
    (("control_model.", "controlnet_"), "a ControlNet, not a base model"),
    (("emb_params", "string_to_param"), "a textual inversion embedding, not a base model"),
    (("down_blocks.", "up_blocks.", "mid_block."),
     "only the U-Net of a diffusers folder; use the folder that has unet/, vae/ and text_encoder/"),
    ((VAE_PREFIX, "encoder.down.", "encoder.down_blocks.", "decoder.conv_in."),
     "a VAE, not a base model; use it with --vae"),
    (("encoder.layers.", "token_embedding"), "only a text encoder, not a base model"),
)  # fmt: skip


def base_of_file(specs: Sequence[BaseModelSpec], shapes: Shapes) -> BaseModelSpec | None:
    """Return the base model of a single file, or None if its names do not identify one."""
    return recognise(specs, shapes, lambda spec: spec.checkpoint)


def base_of_folder(specs: Sequence[BaseModelSpec], class_name: str, unet_shapes: Shapes) -> BaseModelSpec | None:
    """Return the base model of a diffusers folder with a U-Net, from its pipeline's class and the U-Net's names."""
    named = bases_of_pipeline(specs, class_name)
    if len(named) == 1:
        return named[0]
    return base_of_file(specs, {f"unet.{name}": shape for name, shape in unet_shapes.items()})


def base_of_checkpoint(specs: Sequence[BaseModelSpec], flag: str, path: Path) -> BaseModelSpec:
    """Recognise the base model of a file or folder from names alone.

    Raises UserError naming `flag` if it is broken or of no known base model, and says what it is.
    """
    if not path.is_dir():
        weights = model_lookup.open_file(flag, path)
        spec = base_of_file(specs, weights.shapes)
        return spec or refuse_unknown_file(flag, weights)
    class_name = read_pipeline_class(path)
    named = bases_of_pipeline(specs, class_name)
    if not named:
        refuse_unknown_folder(flag, path, class_name)
    if len(named) == 1:
        return named[0]
    spec = base_of_folder(specs, class_name, model_lookup.open_part(flag, path / "unet", "unet")[1].shapes)
    if spec is None:  # every U-Net with weights is recognised as this family
        raise about(flag, path)(": its U-Net has no weights", "download it again")
    return spec


def refuse_other_folder(specs: Sequence[BaseModelSpec], flag: str, folder: Path, expected: str) -> None:
    """Raise UserError if a diffusers folder belongs to another model than `expected`, by the pipeline that it names or
    else by its subfolders, or if it names a pipeline that no script trains.

    An unknown pipeline with a U-Net passes: the U-Net's weights tell more than a name.
    """
    class_name = read_pipeline_class(folder)
    named = bases_of_pipeline(specs, class_name)
    is_named = len(named) == 1 or (named and not find_spec(specs, expected).folders)
    refuse_other(specs, flag, str(folder), named[0] if is_named else base_of_parts(specs, folder), expected)
    if not named:
        refuse_unknown_folder(flag, folder, class_name)


def base_of_parts(specs: Sequence[BaseModelSpec], folder: Path) -> BaseModelSpec | None:
    """Return the base model with all of its subfolders present; the one with most subfolders if several have, None
    if they tie."""
    complete = [spec for spec in specs if spec.folders and all((folder / name).is_dir() for name in spec.folders)]
    max_folders = max((len(spec.folders) for spec in complete), default=0)
    candidates = [spec for spec in complete if len(spec.folders) == max_folders]
    return candidates[0] if len(candidates) == 1 else None


def refuse_unknown_folder(flag: str, folder: Path, class_name: str) -> None:
    """Raise UserError for a folder whose pipeline no script trains. One with a U-Net passes: its weights decide."""
    if class_name and not (folder / "unet").is_dir():
        raise about(flag, folder)(
            f": its model_index.json names {class_name}, which has no script of its own",
            "try diffusers_train_network.py",
        )


def suggest_fix(recognised: BaseModelSpec, expected: BaseModelSpec) -> str:
    """Return the advice for a model of another kind than the expected one: the flag or the script that trains it."""
    if recognised.script == expected.script:
        return f"add {recognised.script_flag}" if recognised.script_flag else f"remove {expected.script_flag}"
    flag = f" with {recognised.script_flag}" if recognised.script_flag else ""
    return f"use {recognised.script}{flag}, or {recognised.prompts_script} to train from prompts alone"


def refuse_other_file(specs: Sequence[BaseModelSpec], flag: str, weights: Weights, expected: str) -> None:
    """Raise UserError if a single file is not a checkpoint of the U-Net model `expected`, and say what it is."""
    names = list(weights.shapes)
    # Variants have the names of the model that they vary, so they have to be refused first.
    refuse_variants(specs, flag, weights.origin, weights.shapes)
    refuse_other(specs, flag, weights.origin, base_of_file(specs, weights.shapes), expected, "checkpoint")
    if not any(re.match(UNET_NAME, name) for name in names):
        refuse_unknown_file(flag, weights)


def text_encoder_in(flag: str, weights: Weights, prefix: str) -> Weights:
    """Return the text encoder in a U-Net checkpoint, below `prefix`. Raises NotThere if it is missing."""
    encoder = with_prefix(weights, prefix)
    if not encoder.shapes:
        raise about(flag, weights.origin, kind=NotThere)(
            f"has a U-Net but no text encoder (nothing begins with {prefix!r})", "use a full checkpoint"
        )
    return encoder


def refuse_variants(specs: Sequence[BaseModelSpec], flag: str, origin: str, shapes: Shapes) -> None:
    """Raise UserError for an unsupported variant of a known model."""
    for pattern, description in (item for spec in specs for item in spec.variants.items()):
        if any(re.search(pattern, name) for name in shapes):
            raise about(flag, origin, cause="does not fit")(f": this is {description}")


def refuse_unknown_file(flag: str, weights: Weights) -> NoReturn:
    """Raise UserError for a file in which no base model is recognised, and say what it is."""
    names = list(weights.shapes)
    description = next(
        (description for marks, description in NO_MODELS if any(m in name for name in names for m in marks)), None
    )
    if description:
        raise about(flag, weights.origin, cause="does not fit")(f": this is {description}")
    denoiser_names = [name for name in names if name.startswith(UNET_PREFIX)]
    if denoiser_names:
        raise about(flag, weights.origin)(
            f": its denoiser belongs to no supported model (first names: {', '.join(denoiser_names[:3])})"
        )
    raise about(flag, weights.origin)(
        f"is not a checkpoint of a supported base model (first names: {list_first_names(weights)})"
    )


def refuse_other_model(specs: Sequence[BaseModelSpec], flag: str, origin: str, shapes: Shapes, expected: str) -> None:
    """Raise UserError for a file that holds another base model than `expected`, or an unsupported variant."""
    refuse_variants(specs, flag, origin, shapes)
    refuse_other(specs, flag, origin, base_of_file(specs, shapes), expected)


def refuse_other(
    specs: Sequence[BaseModelSpec],
    flag: str,
    origin: str,
    recognised: BaseModelSpec | None,
    expected: str,
    kind: str = "model",
) -> None:
    """Raise UserError if another base model was recognised in a folder or file; None means that no model was."""
    if recognised is not None and recognised.name != expected:
        fix = suggest_fix(recognised, find_spec(specs, expected))
        raise about(flag, origin, cause="does not fit")(f": this is {recognised.called} {kind}; {fix}")


def open_unet_folder(specs: Sequence[BaseModelSpec], base: BaseFiles, expected: str) -> tuple[dict[str, Any], Weights]:
    """Open the configuration and the weights of a diffusers folder's U-Net. Raises UserError for another model than
    `expected`."""
    refuse_other_folder(specs, base.flag, base.path, expected)
    config, weights = base.open_folder("unet")
    class_name = read_pipeline_class(base.path)
    refuse_other(specs, base.flag, str(base.path), base_of_folder(specs, class_name, weights.shapes), expected)
    return config, weights


def open_transformer(specs: Sequence[BaseModelSpec], base: BaseFiles, expected: str) -> Weights:
    """Open the denoiser of a base model, names without prefix. Raises UserError for a folder of another model than
    `expected`."""
    if base.whole is None:
        refuse_other_folder(specs, base.flag, base.path, expected)
        return base.open_folder("transformer")[1]
    return with_prefix(base.whole, find_prefix(base.whole.shapes, DENOISER_PREFIXES))


def open_denoiser(
    specs: Sequence[BaseModelSpec],
    base: BaseFiles,
    expected: str,
    mark: str,
    diffusers_mark: str | None = None,
    from_diffusers: Callable[[Weights], Weights] = lambda weights: weights,
) -> Weights:
    """Open the denoiser of `expected` under the names of its original layout, which include `mark`.

    Weights that include `diffusers_mark` are in diffusers' layout, and `from_diffusers` renames them. Raises UserError
    for another model, naming it.
    """
    weights = open_transformer(specs, base, expected)
    refuse_variants(specs, base.flag, str(base.path), weights.shapes)
    if diffusers_mark in weights.shapes:
        weights = from_diffusers(weights)
    if mark not in weights.shapes:
        why = f"it has no {mark}, so it is not a {find_spec(specs, expected).title} transformer"
        refuse_transformer(specs, base, base.whole or weights, expected, why)
    return weights


def open_single_file(specs: Sequence[BaseModelSpec], flag: str, path: Path, expected: str, advice: str) -> Weights:
    """Open the file of a base model that exists only as a single file.

    Raises UserError for a folder, naming its model if that is another one, else with `advice`.
    """
    if path.is_dir():
        refuse_other_folder(specs, flag, path, expected)
        raise about(flag, path)(f"is a folder; {advice}")
    return model_lookup.open_file(flag, path)


def refuse_transformer(
    specs: Sequence[BaseModelSpec], base: BaseFiles, weights: Weights, expected: str, why: str
) -> NoReturn:
    """Raise UserError for weights that are not a denoiser of `expected`, naming their model if it is recognised, else
    with `why`."""
    refuse_other_model(specs, base.flag, str(base.path), (base.whole or weights).shapes, expected)
    raise about(base.flag, base.path)(f": {why} (first names: {list_first_names(weights)})")


def find_spec(specs: Sequence[BaseModelSpec], name: str) -> BaseModelSpec:
    return next(spec for spec in specs if spec.name == name)


def warn_of_other_prediction(path: Path, predicts_velocity: bool) -> None:
    """Warn if a diffusers folder was trained with another prediction type than this run uses."""
    prediction_type = read_json(path / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if predicts_velocity != (prediction_type == "v_prediction"):
        verb = "add" if prediction_type == "v_prediction" else "remove"
        logger.warning(
            "%s: the model was trained to predict %s; %s --v_parameterization to do the same",
            path,
            prediction_type,
            verb,
        )

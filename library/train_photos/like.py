"""--like: train as a LoRA or a configuration of any trainer was trained."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.architectures.specs import list_specs
from library.base.errors import about
from library.checkpoints.hashes import webui_hash
from library.checkpoints.headers import is_safetensors, read_header
from library.checkpoints.recognition import recognise_adapter
from library.train_photos.base import Base
from library.training.command_line.recipes import Recipe
from library.translation.reading import read_configuration
from library.translation.translating import Translation, translate

FLAG = "--like"
# What a file decides. Of one line, a value of the file replaces all values of the recipe: they belong together.
TAKEN = (
    ("network_module", "network_dim", "network_alpha", "network_dropout", "network_args", "scale_weight_norms"),
    ("learning_rate", "unet_lr", "text_encoder_lr", "network_train_unet_only", "network_train_text_encoder_only"),
    ("optimizer_type", "optimizer_args", "max_grad_norm"),
    ("lr_scheduler", "lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_args",
     "lr_scheduler_min_lr_ratio", "lr_scheduler_type"),
    ("timestep_sampling", "discrete_flow_shift", "training_shift", "sigmoid_scale", "weighting_scheme", "logit_mean",
     "logit_std", "mode_scale", "model_prediction_type", "min_timestep", "max_timestep"),
    ("train_batch_size",), ("gradient_accumulation_steps",), ("resolution",), ("clip_skip",), ("guidance_scale",),
    ("noise_offset",), ("multires_noise_iterations", "multires_noise_discount"), ("ip_noise_gamma",),
    ("loss_type", "huber_c", "huber_schedule", "huber_scale"), ("min_snr_gamma", "debiased_estimation_loss"),
    ("caption_dropout_rate",), ("caption_tag_dropout_rate",), ("shuffle_caption",), ("keep_tokens",), ("ema_decay",),
    ("max_token_length",), ("t5xxl_max_token_length",), ("apply_t5_attn_mask",),
)  # fmt: skip
NOT_KEPT = {"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"}  # of a text encoder that is trained


def like_recipe(path: Path, base: Base, recipe: Recipe) -> Recipe:
    """Return the recipe with what a file says of its training; a LoRA is also the start of the run.

    Raises UserError for a file that says nothing, and for one of another base model.
    """
    configuration = read_configuration(path, FLAG)
    is_adapter = is_safetensors(path)
    if configuration is None and not is_adapter:
        raise about(FLAG, path, cause="wrong value")("is neither a LoRA nor a configuration of a trainer")
    translation = None if configuration is None else translate(configuration, base.spec.script)
    check_base(path, base, translation, is_adapter)
    values = {} if translation is None else choose_taken(translation, base)
    known = base.spec.options.defaults()
    replaced = {name for names in TAKEN for name in names if values.keys() & {*names}}
    if not values.get("network_train_unet_only", recipe.values.get("network_train_unet_only")):
        replaced |= NOT_KEPT
    start = {"network_weights": str(path.absolute()), "dim_from_weights": True} if is_adapter else {}
    kept = {name: value for name, value in recipe.values.items() if name not in replaced}
    module = {"network_module": recipe.values["network_module"]}
    title = describe_taken(path, base, translation, values, is_adapter)
    options = {name: value for name, value in {**module, **kept, **values, **start}.items() if name in known}
    return replace(recipe, name=f"like {path.name}, {recipe.name}", title=title, values=options)


def choose_taken(translation: Translation, base: Base) -> dict[str, Any]:
    """Return the values that a file decides; a warmup becomes a share of the run, whose length is another one."""
    values = {name: translation.values[name] for names in TAKEN for name in names if name in translation.values}
    subset = translation.datasets[0] if translation.datasets else {}
    for name in ("resolution", "caption_dropout_rate", "shuffle_caption", "keep_tokens"):
        if name in subset:
            values[name] = subset[name].value
    warmup, steps = values.get("lr_warmup_steps"), translation.values.get("max_train_steps")
    if isinstance(warmup, int | float) and isinstance(steps, int) and 1 <= warmup < steps:
        values["lr_warmup_steps"] = round(warmup / steps, 4)
    return {name: value for name, value in values.items() if name in base.spec.options.defaults()}


def check_base(path: Path, base: Base, translation: Translation | None, is_adapter: bool) -> None:
    """Raise UserError if a file was made for another base model."""
    if is_adapter:
        header = read_header(path)
        shapes = {name: entry.shape for name, entry in header.tensors.items()}
        spec = recognise_adapter(list_specs(), shapes, header.metadata)
        if spec is not None and spec is not base.spec:
            raise about(FLAG, path, cause="does not fit")(f"was trained on {spec.title}, and the base is {base.title}")
    elif translation is not None and translation.script != base.spec.script:
        raise about(FLAG, path, cause="does not fit")(
            f"is for {translation.script}, and {base.title} is trained by {base.spec.script}"
        )


def is_same_file(path: Path, base: Base) -> bool:
    """Return True if an adapter's metadata have the hash of the base's file."""
    stated = read_header(path).metadata.get("ss_sd_model_hash")
    return stated is not None and base.path.is_file() and stated == webui_hash(base.path)


def describe_taken(
    path: Path, base: Base, translation: Translation | None, values: Mapping[str, Any], is_adapter: bool
) -> str:
    """Say what was taken from a file, what has no equal, and how the base is known to fit."""
    fit = "the same base by its hash" if is_adapter and is_same_file(path, base) else f"a base of {base.spec.title}"
    taken = ", ".join(f"{name} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in values.items())
    start = "; it goes on from its weights, with their rank and alpha" if is_adapter else ""
    missing = [] if translation is None else [outcome.place for outcome in translation.missing]
    lacking = f"; without an equal: {', '.join(missing)}" if missing else ""
    return f"{fit}; taken: {taken or 'nothing, it does not say how it was trained'}{start}{lacking}"

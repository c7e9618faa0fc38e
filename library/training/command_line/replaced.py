"""Detects programs that replace trainer methods, like plug-ins of sd-scripts, and reports methods that are never
called.

In sd-scripts the trainer calls its own methods throughout. Here a run is built from plain functions, and a trainer only
has `train`, so replacing any other method has no effect.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from library.base.errors import UserError

logger = logging.getLogger(__name__)

EVENTS = "--log_events reports every step, loss and image to other programs while the run is going"
BASE_MODEL = "a base model is a package in library/architectures, and docs/architectures.md says how to add one"
LOSS = "--loss_type, --min_snr_gamma and the timestep options define the loss"
NETWORK = "--network_module takes your own module, which is notified of every step"
TRAINED = "--network_train_unet_only and --text_encoder_lr select what is trained"
METADATA = "--training_comment, --metadata_title and similar options set the metadata of the file"
FORMATS = "--mixed_precision, --fp8_base and --base_format set the formats of the models"
CHECKS = "the options are checked against their declarations; run your own checks before you call train"

NEVER_CALLED: Mapping[str, Sequence[str]] = {  # what does their work -> names of methods
    EVENTS: (
        "sample_images", "generate_step_logs", "step_logging", "epoch_logging", "val_logging", "accelerator_logging",
    ),
    BASE_MODEL: (
        "load_target_model", "load_unet_lazily", "get_tokenize_strategy", "get_tokenizers", "load_tokenizer",
        "get_latents_caching_strategy", "get_text_encoding_strategy", "get_text_encoder_outputs_caching_strategy",
        "get_models_for_text_encoding", "cache_text_encoder_outputs_if_needed", "get_text_cond", "call_unet",
        "encode_images_to_latents", "shift_scale_latents", "get_noise_scheduler", "get_noise_pred_and_target",
        "get_flow_pred_and_target",
    ),
    LOSS: ("process_batch", "post_process_loss"),
    NETWORK: ("post_process_network", "all_reduce_network", "on_step_start", "on_validation_step_end"),
    TRAINED: ("is_train_text_encoder", "get_text_encoders_train_flags", "is_text_encoder_not_needed_for_training"),
    METADATA: ("update_metadata", "get_sai_model_spec"),
    FORMATS: (
        "cast_text_encoder", "cast_vae", "cast_unet", "prepare_text_encoder_fp8", "prepare_unet_with_accelerator",
        "prepare_text_encoder_grad_ckpt_workaround",
    ),
    CHECKS: ("assert_extra_args",),
}  # fmt: skip

FIRST_SCRIPT, FIRST_TRAINER = "train_network", "NetworkTrainer"
KEPT = "AS_IMPORTED"  # the modules that programs import keep their original contents under this name


def refuse_replaced(trainer: object) -> None:
    """Raise UserError if a program replaces trainer methods that would never be called, naming the alternative; warn of
    changes to the modules that programs import.

    In sd-scripts every trainer is a NetworkTrainer, so replacements there apply to all.
    """
    # Looked up rather than imported: a program cannot have changed a script that it has not imported.
    base_trainer = vars(sys.modules[FIRST_SCRIPT]).get(FIRST_TRAINER) if FIRST_SCRIPT in sys.modules else None
    names = {*dir(trainer), *dir(base_trainer)}
    replaced_by_work = {work: [name for name in methods if name in names] for work, methods in NEVER_CALLED.items()}
    replaced = [f"{', '.join(methods)} ({work})" for work, methods in replaced_by_work.items() if methods]
    if replaced:
        raise UserError(
            f"this program replaces methods of {type(trainer).__name__} that are never called here: "
            f"{'; '.join(replaced)}. Leave them out, or train with sd-scripts"
        )
    for module, changed in find_changed_modules().items():
        logger.warning(
            "this program sets %s of %s, which has no effect: nothing here uses it", ", ".join(changed), module
        )


def find_changed_modules() -> dict[str, list[str]]:
    """Return what a program has changed in the modules that keep their original contents."""
    # sys.modules also holds None, for libraries that are hidden from others.
    modules = {name: vars(module) for name, module in sys.modules.items() if isinstance(module, ModuleType)}
    changed = {}
    for name, values in sorted(modules.items()):
        if name.startswith("library.") and KEPT in values:
            originals = values[KEPT]
            unchanged = {KEPT, *(key for key, value in values.items() if key in originals and originals[key] is value)}
            changed[name] = sorted(key for key in values if key not in unchanged and not key.startswith("__"))
    return {name: keys for name, keys in changed.items() if keys}

"""The metadata of a saved adapter: `ss_*` keys about the training, `modelspec.*` keys about the model.

All values are strings: `str()` of the Python value, so that None becomes "None", and JSON for dicts and lists. The
modelspec.* keys follow version 1.0.1 of Stability AI's model metadata standard.
"""

import base64
import json
import mimetypes
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from library.base.errors import about
from library.base.version import NAME, VERSION
from library.checkpoints.hashes import sha256_of_file, webui_hash
from library.options.base import Options
from library.options.model import ModelOptions
from library.options.train import TrainOptions
from library.options.training.averaging import FILES

EXPERT, BOUNDARY = "ss_expert", "ss_boundary_ratio"  # which of two denoisers was trained, and where they change
# The keys that sd-scripts writes even with --no_metadata, and those without which a file cannot be used.
KEPT_WITHOUT_METADATA = (
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    EXPERT, BOUNDARY,
)  # fmt: skip
RECORDED_OPTIONS = (
    "output_name", "learning_rate", "unet_lr", "gradient_accumulation_steps", "lr_warmup_steps", "lr_scheduler",
    "network_module", "network_dim", "network_alpha", "network_dropout", "mixed_precision", "full_fp16", "clip_skip",
    "max_token_length", "cache_latents", "lowram", "noise_offset", "multires_noise_iterations",
    "multires_noise_discount", "adaptive_noise_scale", "zero_terminal_snr", "training_comment", "max_grad_norm",
    "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "prior_loss_weight",
    "min_snr_gamma", "scale_weight_norms", "ip_noise_gamma", "noise_offset_random_strength",
    "ip_noise_gamma_random_strength", "loss_type", "huber_schedule", "huber_scale", "huber_c", "fp8_base",
    "fp8_base_unet", "validation_seed", "validation_split", "max_validation_steps", "validate_every_n_epochs",
    "validate_every_n_steps", "resize_interpolation",
)  # fmt: skip
"""Options that are recorded under their own name with the prefix `ss_`."""
RECORDED_FIELDS = (
    "session_id", "num_train_images", "num_validation_images", "num_reg_images", "num_batches_per_epoch", "num_epochs",
    "max_train_steps", "seed", "optimizer", "run_digest",
)  # fmt: skip
"""Fields of `RunSummary` that are recorded under their own name with the prefix `ss_`."""
MODELSPEC_TEXTS = (
    "author", "description", "license", "tags", "usage_hint", "trigger_phrase", "preprocessor", "is_negative_embedding",
    "merged_from",
)  # fmt: skip


@dataclass(frozen=True)
class RunSummary:
    """Values of the metadata that only a run's set-up finds out."""

    session_id: int
    started_at: float  # Unix time
    seed: int
    num_train_images: int  # repeats included
    num_validation_images: int
    num_reg_images: int
    num_batches_per_epoch: int
    num_epochs: int
    max_train_steps: int
    optimizer: str  # full class name and the given arguments
    has_relative_step: bool  # True for Adafactor with its own learning rates
    network_args: Mapping[str, Any]  # as passed to the network module
    datasets: Mapping[str, Any]  # the ss_* keys that describe the data; dicts and lists become JSON
    run_digest: str  # of all that determines the trained weights


def training_metadata(options: TrainOptions, architecture: Mapping[str, str], summary: RunSummary) -> dict[str, str]:
    """Return the `ss_*` keys that all files of a run share, without the hashes of the base model's files."""
    option_values = options.flat()
    text_rates = options.network.text_encoder_lr or []
    values: dict[str, Any] = {
        **{f"ss_{name}": option_values[name] for name in RECORDED_OPTIONS},
        **{f"ss_{name}": getattr(summary, name) for name in RECORDED_FIELDS},
        "ss_training_started_at": summary.started_at,
        # sd-scripts records a number or a list, depending on the base model. A number alone would lose the other rates.
        "ss_text_encoder_lr": text_rates if len(text_rates) > 1 else next(iter(text_rates), None),
        "ss_gradient_checkpointing": options.memory.recomputes,
        "ss_sd_scripts_commit_hash": commit_hash() or "(unknown)",
        "ss_face_crop_aug_range": _number_pair(options.dataset.face_crop_aug_range),
        "ss_debiased_estimation": options.loss.debiased_estimation_loss,
    }
    if summary.has_relative_step:
        # sd-scripts clears these options when Adafactor finds its own rates, and records them as cleared.
        values.update(ss_learning_rate=None, ss_text_encoder_lr=None, ss_unet_lr=None)
        values["ss_lr_scheduler"] = f"adafactor:{options.optimizer.learning_rate}"
    if options.network.network_args is not None:
        values["ss_network_args"] = dict(summary.network_args)
    if options.averaging.averages(FILES):
        values["ss_ema_decay"] = options.averaging.ema_decay
    if options.guidance.guidance_loss is not None:
        values |= {f"ss_{name}": value for name, value in options.guidance.flat().items()}
    values.update(summary.datasets)
    values.update((key, value) for key, value in architecture.items() if key.startswith("ss_"))
    return {key: _text(value) for key, value in values.items()}


def base_file_metadata(model: ModelOptions) -> dict[str, str]:
    """Return names and hashes of the checkpoint and the VAE. Reads both files completely, which takes seconds."""
    metadata: dict[str, str] = {}
    for key, path in (("sd_model", model.pretrained_model_name_or_path), ("vae", model.vae)):
        if not path:
            continue
        if not Path(path).exists():
            metadata[f"ss_{key}_name"] = path
            continue
        metadata[f"ss_{key}_name"] = Path(path).name
        metadata[f"ss_{key}_hash"] = webui_hash(path)
        metadata[f"ss_new_{key}_hash"] = sha256_of_file(path)
    return metadata


def modelspec_metadata(
    options: Options, architecture: Mapping[str, str], saved_at: float, resolution: tuple[int, int] | None = None
) -> dict[str, str]:
    """Return the non-empty `modelspec.*` keys for a file saved at `saved_at` (Unix time).

    `resolution` is the largest (width, height) of the datasets. None: that of --resolution or the base model.
    """
    texts = options.flat()
    title = texts["metadata_title"] or texts["output_name"] or f"LoRA@{saved_at}"
    values: dict[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "implementation_version": f"{NAME}/{VERSION}+{(commit_hash() or 'unknown')[:12]}",
        "title": title,
        "date": datetime.fromtimestamp(int(saved_at)).isoformat(),
        "timestep_range": _timestep_range(texts["min_timestep"], texts["max_timestep"]),
        "encoder_layer": None if texts["clip_skip"] is None else str(texts["clip_skip"]),
        "thumbnail": thumbnail_url(texts["metadata_thumbnail"]),
    }
    values.update((name, texts[f"metadata_{name}"]) for name in MODELSPEC_TEXTS)
    metadata = {key: value for key, value in architecture.items() if key.startswith("modelspec.")}
    if texts["metadata_arch"]:
        metadata["modelspec.architecture"] = f"{texts['metadata_arch']}/lora"
    if texts["metadata_reso"]:
        metadata["modelspec.resolution"] = modelspec_resolution("metadata_reso", texts["metadata_reso"])
    elif resolution is not None:
        metadata["modelspec.resolution"] = "{}x{}".format(*resolution)
    elif texts["resolution"]:
        metadata["modelspec.resolution"] = modelspec_resolution("resolution", str(texts["resolution"]))
    metadata.update((f"modelspec.{name}", value) for name, value in values.items() if value)
    return metadata


def modelspec_resolution(flag: str, text: str) -> str:
    """Format SIDE or WIDTH,HEIGHT as modelspec writes resolutions, WIDTHxHEIGHT. Raises UserError for other texts."""
    sides = [side.strip() for side in text.split(",")]
    if len(sides) > 2 or not all(side.isdecimal() and len(side) <= 6 and int(side) > 0 for side in sides):
        raise about(f"--{flag}")(f"is {text}", "use a side or WIDTH,HEIGHT in pixels, such as 1024 or 1024,768")
    return f"{int(sides[0])}x{int(sides[-1])}"


def file_metadata(
    training: Mapping[str, str], modelspec: Mapping[str, str], *, step: int, epoch: int, saved_at: float, is_full: bool
) -> dict[str, str]:
    """Return the metadata of one file; `epoch` counts from 1. Unless `is_full`, only the `ss_*` keys that readers
    need are kept."""
    metadata = dict(training)
    metadata.update(ss_training_finished_at=str(saved_at), ss_steps=str(step), ss_epoch=str(epoch))
    if not is_full:
        metadata = {key: metadata[key] for key in KEPT_WITHOUT_METADATA if key in metadata}
    return {**metadata, **modelspec}


@cache
def commit_hash() -> str | None:
    """Return the git commit of this checkout; None outside git."""
    checkout = Path(__file__).parents[2]
    # git would otherwise answer for a repository further up, such as that of a front end.
    if not (checkout / ".git").exists():
        return None
    # In a front end's folder .git is that of sd-scripts, which has no such file.
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD", "HEAD:library/base/version.py"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split()[0]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _number_pair(text: str | None) -> tuple[float, ...] | None:
    return tuple(float(number) for number in text.split(",")) if text else None


def _timestep_range(low: int | None, high: int | None) -> str | None:
    if low is None and high is None:
        return None
    return f"{0 if low is None else low},{1000 if high is None else high}"


def thumbnail_url(value: str | None) -> str | None:
    """Return an image file as a data URL; data URLs are returned unchanged.

    Raises UserError if --metadata_thumbnail is neither.
    """
    if not value or value.startswith("data:"):
        return value
    path = Path(value)
    mime_type = mimetypes.guess_type(path.name)[0]
    if not path.is_file() or mime_type is None or not mime_type.startswith("image/"):
        raise about("--metadata_thumbnail")(f"is {value}, which is not an image file", "use a PNG, JPEG or WebP file")
    return f"data:{mime_type};base64,{base64.b64encode(path.read_bytes()).decode()}"

"""Which pictures and captions are trained, and how they are shaped."""

from dataclasses import dataclass
from pathlib import Path

from library.options.base import Options, option


@dataclass(frozen=True)
class DatasetOptions(Options):
    """Which pictures and captions are trained, and how they are shaped."""

    dataset_config: Path | None = option(None, help="")
    train_data_dir: str | None = option(None, help="")
    reg_data_dir: str | None = option(None, help="")
    in_json: str | None = option(None, help="")
    dataset_repeats: int = option(1, help="")
    dataset_class: str | None = option(None, help="")
    debug_dataset: bool = option(False, help="")
    cache_info: bool = option(False, help="")
    shuffle_caption: bool = option(False, help="")
    caption_separator: str = option(",", help="")
    caption_extension: str = option(".caption", help="")
    caption_extention: str | None = option(None, help="")
    keep_tokens: int = option(0, help="")
    keep_tokens_separator: str = option("", help="")
    secondary_separator: str | None = option(None, help="")
    enable_wildcard: bool = option(False, help="")
    caption_prefix: str | None = option(None, help="")
    caption_suffix: str | None = option(None, help="")
    caption_dropout_rate: float = option(0.0, help="")
    caption_dropout_every_n_epochs: int = option(0, help="")
    caption_tag_dropout_rate: float = option(0.0, help="")
    token_warmup_min: int = option(1, help="")
    token_warmup_step: float = option(0, help="")
    color_aug: bool = option(False, help="")
    flip_aug: bool = option(False, help="")
    face_crop_aug_range: str | None = option(None, help="")
    random_crop: bool = option(False, help="")
    alpha_mask: bool = option(False, help="")
    conditioning_data_dir: str | None = option(None, help="")
    masked_loss: bool = option(False, help="")
    prior_loss_weight: float = option(1.0, help="")
    resolution: str | None = option(None, help="")
    enable_bucket: bool = option(False, help="")
    min_bucket_reso: int = option(256, help="")
    max_bucket_reso: int = option(1024, help="")
    bucket_reso_steps: int = option(64, help="")
    bucket_no_upscale: bool = option(False, help="")
    resize_interpolation: str | None = option(None, help="", choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"))
    train_batch_size: int = option(1, help="")
    max_data_loader_n_workers: int = option(8, help="")
    persistent_data_loader_workers: bool = option(False, help="")

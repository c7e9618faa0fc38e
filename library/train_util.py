"""Functions of sd-scripts' library.train_util for programs that import it; nothing here calls them."""

import argparse
import logging
from collections.abc import Mapping
from typing import Any

from library.data.description.buckets import (
    Size,
    bucket_sizes,
    cover,
    nearest_bucket,
    ratio_error,
    shape_without_upscale,
)
from library.training.command_line.cli import parse
from library.training.config_file import SECRETS

logger = logging.getLogger(__name__)


def verify_command_line_training_args(args: argparse.Namespace) -> None:
    """Warn about secrets on the command line, which a tracker may publish."""
    if args.log_with not in (None, "tensorboard"):
        for name in SECRETS:
            if getattr(args, name, None) is not None:
                logger.warning("--%s: %s may publish the command line; put it into --config_file", name, args.log_with)


def read_config_from_file(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options of the command line merged over those of `config_file`, if `args` name one."""
    return parse(parser) if args.config_file or args.output_config else args


def prepare_dataset_args(args: argparse.Namespace, support_metadata: bool) -> None:
    """Parse pairs of numbers in `resolution` and `face_crop_aug_range`, and apply the misspelled
    `caption_extention`."""
    if args.caption_extention is not None:
        args.caption_extension, args.caption_extention = args.caption_extention, None
    if isinstance(args.resolution, str):
        sides = [int(side) for side in args.resolution.split(",")]
        args.resolution = (sides[0], sides[-1])
    if isinstance(args.face_crop_aug_range, str):
        args.face_crop_aug_range = tuple(float(end) for end in args.face_crop_aug_range.split(","))


def precalculate_safetensors_hashes(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return `sshs_model_hash` and `sshs_legacy_hash` of a file with these tensors."""
    from library.checkpoints.hashes import sshs_hashes

    return sshs_hashes(tensors, metadata)


class BucketManager:
    """Assignment of images to buckets; sizes are (width, height) in pixels."""

    def __init__(
        self, no_upscale: bool, max_reso: Size | None, min_size: int | None, max_size: int | None, reso_steps: int
    ) -> None:
        assert max_reso is not None
        self.no_upscale, self.max_reso, self.reso_steps = no_upscale, max_reso, reso_steps
        self.min_size, self.max_size = min_size or reso_steps, max_size or max(max_reso)
        self.predefined_resos: list[Size] = []
        self.resos: list[Size] = []
        self.buckets: list[list[Any]] = []

    def make_buckets(self) -> None:
        """Compute the bucket sizes from which `select_bucket` chooses."""
        self.predefined_resos = bucket_sizes(self.max_reso, self.min_size, self.max_size, self.reso_steps)

    def select_bucket(self, image_width: int, image_height: int) -> tuple[Size, Size, float]:
        """Return (bucket, size that the image is resized to before cropping, aspect ratio error) for an image."""
        image = (image_width, image_height)
        if self.no_upscale:
            shape = shape_without_upscale(image, self.max_reso, self.reso_steps)
            return shape.bucket, shape.resized, ratio_error(shape.bucket, image)
        bucket = nearest_bucket(image, self.predefined_resos)
        return bucket, cover(image, bucket), ratio_error(bucket, image)

    def add_image(self, reso: Size, image_or_info: Any) -> None:
        """Add an entry to a bucket."""
        if reso not in self.resos:
            self.resos.append(reso)
            self.buckets.append([])
        self.buckets[self.resos.index(reso)].append(image_or_info)

    def sort(self) -> None:
        """Sort the buckets by size."""
        order = sorted(range(len(self.resos)), key=lambda i: self.resos[i])
        self.resos = [self.resos[i] for i in order]
        self.buckets = [self.buckets[i] for i in order]


AS_IMPORTED = dict(globals())  # detects names that a program patches, which has no effect

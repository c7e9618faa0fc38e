"""Batches from a user's own class (`dataset_class`), which is called as sd-scripts calls it.

The class is created as `cls(None, max_token_length, resolution, debug_dataset)`. Its `len` is the number of batches per
epoch. Item i is batch i, a mapping with `captions`, `images` (B, 3, H, W) from -1 to 1 or `latents` (B, C, h, w), and
optionally `loss_weights` (B), `alpha_masks` (B, H, W), `original_sizes_hw`, `crop_top_lefts`, `target_sizes_hw` (B, 2
each), `image_keys` and `custom_attributes`. Token IDs are ignored, because captions are tokenized here.
`set_current_epoch(epoch)`, if it exists, is called before each batch.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from library.base.errors import UserError, about
from library.base.randomness import random_for
from library.data.batches.validation_set import ValidationSet, make_empty_set
from library.data.description.dataset_file import parse_numbers
from library.data.description.schema import RunDataConfig
from library.data.plan.audit_values import make_empty_values
from library.options.dataset import DatasetOptions
from library.protocols import LatentSpec
from library.types import Batch, StepOf

logger = logging.getLogger(__name__)

FLAG = "--dataset_class"
PER_IMAGE = (
    "loss_weights", "alpha_masks", "original_sizes_hw", "crop_top_lefts", "target_sizes_hw", "image_keys",
    "custom_attributes",
)  # fmt: skip
DESCRIBED = ("dataset_config", "train_data_dir", "reg_data_dir", "in_json")


class OwnDataset:
    """The batches of a user's dataset object, reshuffled for every epoch."""

    def __init__(self, source: Any, name: str, seed: int, spec: LatentSpec) -> None:
        """Wrap the dataset object `source`. Raises UserError if it has no batches."""
        self.config = RunDataConfig((), is_from_file=False)
        self.spec = spec
        self._source, self._name, self._seed = source, name, seed
        try:
            self.num_batches = len(source)
        except (TypeError, NotImplementedError) as error:
            raise about(FLAG)(f"{name} must return the number of its batches from len(): {error}") from error
        if self.num_batches < 1:
            raise about(FLAG)(f"{name} has no batches: its len() is {self.num_batches}")

    @property
    def batch_sizes(self) -> list[int]:
        return [int(getattr(self._source, "batch_size", 1))]

    @property
    def num_train_images(self) -> int:
        num_images = int(getattr(self._source, "num_train_images", 0))
        # A class derived from sd-scripts' MinimalDataset has 0 here unless it sets the number.
        return num_images or self.num_batches * self.batch_sizes[0]

    @property
    def num_reg_images(self) -> int:
        return int(getattr(self._source, "num_reg_images", 0))

    @property
    def identity(self) -> dict[str, Any]:
        """The class and the captions of the first batch; nothing else is known in advance."""
        captions = blake2b("\n".join(self._batch(1, 0).captions).encode(), digest_size=16).hexdigest()
        return {
            "num_pictures": self.num_train_images,
            "num_batches": self.num_batches,
            "pictures": self._name,
            "captions": captions,
            "settings": self._name,
        }

    @property
    def identity_with_contents(self) -> dict[str, Any]:
        return self.identity

    @property
    def image_paths(self) -> list[str]:
        return []

    image_plan = sizes = prompts = None  # unknown before the batches are drawn

    @property
    def own_batches(self) -> "OwnDataset":
        return self

    @property
    def validation(self) -> ValidationSet:
        """An empty set: nothing is held out."""
        return make_empty_set()

    def iterate_epoch(
        self, epoch: int, batch_indices: Sequence[int], step_of: StepOf, num_workers: int, persistent_workers: bool
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch at `batch_indices`. They are made in this process, on request."""
        order = list(range(self.num_batches))
        random_for(self._seed, "batch order", epoch).shuffle(order)
        return (self._batch(epoch, order[batch_index]) for batch_index in batch_indices)

    def audit(self, log: logging.Logger) -> None:
        log.info("%s %s: %d batches per epoch, made in this process", FLAG, self._name, self.num_batches)

    def audit_values(self) -> dict[str, Any]:
        """Return the audit values of data without listed images."""
        return make_empty_values()

    def metadata(self, described: DatasetOptions, batches_per_step: int = 1) -> dict[str, Any]:
        size = self.batch_sizes[0]
        return {
            "ss_dataset_class": self._name,
            "ss_batch_size_per_device": size,
            "ss_total_batch_size": size * batches_per_step,
        }

    def limited_to_largest_batch(self) -> tuple["OwnDataset", int]:
        """Return self and batch 0: the sizes of the batches are unknown."""
        return self, 0

    def report_skipped(self, log: logging.Logger) -> None:
        """Do nothing: no image is skipped here."""

    def close(self) -> None:
        """Do nothing: there are no worker processes."""

    def _batch(self, epoch: int, number: int) -> Batch:
        if callable(set_epoch := getattr(self._source, "set_current_epoch", None)):
            set_epoch(epoch)
        item = self._source[number]
        if not isinstance(item, Mapping):
            raise about(FLAG)(f"{self._name}: batch {number} is {type(item).__name__}, not a mapping")
        return build_batch(item, f"{FLAG} {self._name}: batch {number}", self.spec)


def build_batch(item: Mapping[str, Any], place: str, spec: LatentSpec) -> Batch:
    """Build a batch from the keys of sd-scripts' datasets. Raises UserError naming missing or invalid ones."""
    captions = item.get("captions")
    if not captions:
        raise UserError(f"{place} has no `captions`: captions are tokenized here, and token IDs are ignored")
    pixels, latents = item.get("images"), item.get("latents")
    if pixels is None and latents is None:
        raise UserError(f"{place} has neither `images` nor `latents`")
    tensor = pixels if latents is None else latents
    count, channels = len(captions), 3 if latents is None else spec.channels
    if not isinstance(tensor, Tensor) or tensor.dim() != 4 or tensor.shape[:2] != (count, channels):
        actual = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"{place}: expected ({count}, {channels}, height, width) for {count} captions, not {actual}")
    check_entries(item, place, count)
    scale = 1 if latents is None else spec.downscale
    default_targets = [[side * scale for side in tensor.shape[2:]]] * count
    targets = read_number_pairs(item, "target_sizes_hw", default_targets)
    sizes = [
        read_number_pairs(item, "original_sizes_hw", targets),
        read_number_pairs(item, "crop_top_lefts", [[0, 0]] * count),
        targets,
    ]
    weights = item.get("loss_weights")
    return Batch(
        keys=[str(key) for key in item.get("image_keys") or captions],
        captions=[str(caption) for caption in captions],
        pixels_BCHW=None if latents is not None else tensor.float(),
        latents_BCHW=None if latents is None else tensor.float(),
        conditioning=None,
        loss_weights_B=torch.ones(count) if weights is None else torch.as_tensor(weights, dtype=torch.float32),
        masks_B1HW=read_masks(item, place, count),
        sizes_B6=torch.cat(sizes, dim=1),
        attributes=[dict(table) for table in item.get("custom_attributes") or [{}] * count],
    )


def check_entries(item: Mapping[str, Any], place: str, count: int) -> None:
    """Raise UserError for values that are not one for each of the `count` captions: torch would spread a single one."""
    for name in PER_IMAGE:
        # An empty list of keys or attributes stands for none.
        if (values := item.get(name)) is not None and len(values) not in (0, count):
            raise UserError(f"{place}: `{name}` has {len(values)} entries for {count} captions", "give one for each")


def read_masks(item: Mapping[str, Any], place: str, count: int) -> Tensor | None:
    """Return masks_B1HW. Raises UserError for another shape."""
    if item.get("alpha_masks") is None:
        return None
    masks_BHW = torch.as_tensor(item["alpha_masks"], dtype=torch.float32)
    if masks_BHW.dim() != 3:
        raise UserError(
            f"{place}: expected `alpha_masks` of shape ({count}, height, width), not {list(masks_BHW.shape)}"
        )
    return masks_BHW[:, None]


def read_number_pairs(item: Mapping[str, Any], key: str, default: Any) -> Tensor:
    """Return pairs of numbers, shape (B, 2), float32."""
    value = item.get(key)
    chosen = default if value is None else value
    return chosen if isinstance(chosen, Tensor) else torch.as_tensor(chosen, dtype=torch.float32)


def parse_resolution(resolution: str | None) -> tuple[int, int] | None:
    if resolution is None:
        return None
    first, *others = parse_numbers("--resolution", resolution, int, (1, 2), "512 or 768,512")
    return first, others[0] if others else first


def warn_of_replaced(values: Mapping[str, Any]) -> None:
    """Warn about options that describe images, which the user's class replaces."""
    for option in DESCRIBED:
        if values.get(option):
            logger.warning("--%s is ignored: %s provides the data", option, FLAG)


def open_own_dataset(
    cls: type[Any], data: DatasetOptions, max_token_length: int | None, spec: LatentSpec, seed: int
) -> OwnDataset:
    """Create the user's dataset. Raises UserError if the class does not accept the arguments."""
    name = data.dataset_class
    assert name is not None
    try:
        source = cls(None, max_token_length, parse_resolution(data.resolution), data.debug_dataset)
    except TypeError as error:
        raise about(FLAG)(
            f"{name} is called with (tokenizer=None, max_token_length, resolution, debug_dataset): {error}"
        ) from error
    return OwnDataset(source, name, seed, spec)

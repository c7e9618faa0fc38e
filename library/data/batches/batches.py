"""Construction of a batch as a function of the seed, the epoch and its draws; runs in loader workers.

Shapes: B samples, C channels, H height, W width.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from library.base.errors import UserError
from library.base.randomness import random_for
from library.data.caching.latent_files import LatentFile, Latents, judge
from library.data.caching.latent_jobs import Job
from library.data.caching.stores import CacheFiles
from library.data.caching.text_files import Row, TextFile, stack_rows
from library.data.decoding.images import (
    DamagedImage,
    Pixels,
    Placement,
    apply_placement,
    change_colour,
    change_light,
    crop_at_centre,
    crop_at_face,
    crop_at_random,
    parse_face,
    read_pixels,
    with_alpha,
)
from library.data.decoding.npz import DAMAGED, MISSING
from library.data.decoding.tensors import to_mask, to_pixels
from library.data.description.buckets import crop_ltrb
from library.data.description.captions import caption_variant, compose_caption, is_dropped
from library.data.description.schema import SubsetConfig
from library.data.plan.samples import Sample, Samples, check_size, find_replacement
from library.data.plan.seen_references import SeenReferences, read_placed_references
from library.data.sources.storage.storage import Storage
from library.types import Batch, Conditioning


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """The draws of a batch, as sent to a worker."""

    epoch: int
    step: int  # optimizer step, for tag warm-up
    draws: tuple[int, ...]


@dataclass(frozen=True)
class PartialBatch:
    """A batch as returned by a worker. `finish_batch` adds the features that the main process keeps in memory."""

    batch: Batch
    samples: list[int]
    flips: list[bool]
    latents: list[Tensor | None]  # CHW each
    masks: list[Tensor | None]  # HW each, 0..1
    texts: list[Row | None]
    references: list[tuple[Tensor, ...]]  # latents of each sample's references, CHW
    text_keys: list[str]  # keys of text features that are kept in memory
    unconditional_keys: list[str] = field(default_factory=list)  # the same for the unconditional caption
    unconditional_texts: list[Row | None] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # messages about damaged images that were replaced


class DrawnSample(NamedTuple):
    """The pixels or latents of one draw; latents that the main process keeps in memory are None."""

    number: int  # index of the sample
    is_flipped: bool
    image: Pixels | None
    latent: Tensor | None  # CHW
    mask: Tensor | None  # HW
    references: tuple[Tensor, ...] = ()  # CHW each: pixels if the image has pixels, else latents


@dataclass(frozen=True)
class Orders:
    """The batches requested from the workers in one epoch, in order."""

    epoch: int
    batches: Sequence[tuple[int, ...]]  # the draws of every batch of the epoch
    batch_indices: Sequence[int]  # indices of the requested batches in the epoch
    step_of: Callable[[int], int]  # optimizer step of a batch, by its index

    def __len__(self) -> int:
        return len(self.batch_indices)

    def __iter__(self) -> Iterator[BatchOrder]:
        return (BatchOrder(self.epoch, self.step_of(i), self.batches[i]) for i in self.batch_indices)


@dataclass
class BatchSampler(Sampler[BatchOrder]):
    """A sampler of one epoch's orders. The loader holds this object, so that `orders` can be replaced and workers
    outlive an epoch."""

    orders: Orders

    def __iter__(self) -> Iterator[BatchOrder]:
        return iter(self.orders)

    def __len__(self) -> int:
        return len(self.orders)


@dataclass(frozen=True)
class BatchMaker(Dataset[PartialBatch | UserError]):
    """Everything a worker needs to make batches, in plain values that can be sent to any kind of process."""

    seed: int
    samples: Samples
    sample_of_draw: NDArray[np.int32]
    subsets: tuple[SubsetConfig, ...]
    prior_loss_weight: float
    max_train_steps: int
    files: CacheFiles[LatentFile]
    in_memory: frozenset[int]  # samples whose latents are kept by the main process
    num_variants: int = 0  # see `DataPlan`
    text_files: CacheFiles[TextFile] = field(default_factory=CacheFiles)
    damaged: frozenset[int] = frozenset()  # samples that were found damaged while caching
    storage: Storage = field(default_factory=Storage)
    is_mirrored: bool = False  # mirror every image, regardless of flip_aug
    has_alpha: bool = False  # images are RGBA, for a base model that encodes their alpha channel
    seen: SeenReferences | None = None  # reference images for text encoders that see them
    vae: str | None = None  # which has made the files of latents; None: any
    unconditional: str | None = None  # the caption of --guidance_loss, if its features are cached

    def __getitem__(self, order: BatchOrder) -> PartialBatch | UserError:
        """Make a batch. A UserError is returned, because torch rewrites those that are raised in another process."""
        try:
            return self.draft(order)
        except UserError as error:
            return error.with_traceback(None)

    def draft(self, order: BatchOrder) -> PartialBatch:
        """Read, crop and mirror images, or read their latents. Raises UserError if only some have latents."""
        self.read_ahead(order)
        skipped: list[str] = []
        drawn_samples = [self.read_or_replace(order.epoch, draw, skipped) for draw in order.draws]
        samples = [self.samples[drawn.number] for drawn in drawn_samples]
        latents = [drawn.latent for drawn in drawn_samples if drawn.image is None]
        if 0 < len(latents) < len(drawn_samples):
            keys = ", ".join(sample.image.key for sample in samples)
            raise UserError(f"only some of these images have cached latents: {keys}")
        batch = self.plain_batch(order, drawn_samples, samples)
        text_keys = [
            self.text_key(drawn, caption) for drawn, caption in zip(drawn_samples, batch.captions, strict=True)
        ]
        unconditional_keys = (
            [] if self.unconditional is None else [self.text_key(drawn, self.unconditional) for drawn in drawn_samples]
        )
        return PartialBatch(
            batch=batch,
            samples=[drawn.number for drawn in drawn_samples],
            flips=[drawn.is_flipped for drawn in drawn_samples],
            latents=latents,
            masks=[drawn.mask for drawn in drawn_samples],
            texts=[self.text_row(drawn.number, text) for drawn, text in zip(drawn_samples, text_keys, strict=True)],
            text_keys=text_keys,
            unconditional_keys=unconditional_keys,
            unconditional_texts=[
                # The caption alone is kept in memory; with references it is in the sample's file.
                None if key == self.unconditional else self.text_row(drawn.number, key)
                for drawn, key in zip(drawn_samples, unconditional_keys, strict=False)
            ],
            references=[drawn.references if drawn.image is None else () for drawn in drawn_samples],
            skipped=skipped,
        )

    def read_ahead(self, order: BatchOrder) -> None:
        """Start fetching those images of an order that have no cached latents."""
        numbers = self.sample_of_draw[list(order.draws)].tolist()
        unread = [number for number in numbers if number not in self.in_memory and number not in self.files]
        self.storage.read_ahead(self.samples[number].image for number in unread)

    def plain_batch(self, order: BatchOrder, drawn_samples: Sequence[DrawnSample], samples: Sequence[Sample]) -> Batch:
        """Make the batch without latents, masks and text features, which `finish_batch` adds."""
        subsets = [self.subsets[sample.subset] for sample in samples]
        sample_draws = list(zip(samples, order.draws, [drawn.is_flipped for drawn in drawn_samples], strict=True))
        pixels = [to_pixels(drawn.image) for drawn in drawn_samples if drawn.image is not None]
        corners = [
            locate_corner(self.placement(sample, order.epoch, draw, flip)) for sample, draw, flip in sample_draws
        ]
        return Batch(
            keys=[sample.image.key for sample in samples],
            captions=[self.caption(sample, order, draw) for sample, draw, _ in sample_draws],
            pixels_BCHW=torch.stack(pixels) if pixels else None,
            latents_BCHW=None,
            conditioning=None,
            loss_weights_B=torch.tensor([self.prior_loss_weight if subset.is_reg else 1.0 for subset in subsets]),
            masks_B1HW=None,
            sizes_B6=torch.tensor(
                [collect_sizes(sample, flip) for sample, _, flip in sample_draws], dtype=torch.float32
            ),
            attributes=[subset.custom_attributes for subset in subsets],
            crops_B2=torch.tensor(corners, dtype=torch.float32),
            reference_pixels=stack_references([drawn.references for drawn in drawn_samples if drawn.image is not None]),
            are_pairs=all(subset.opposite_dir for subset in subsets),
        )

    def text_key(self, drawn: DrawnSample, caption: str) -> str:
        """Return the key of the text features of a draw: its caption, combined with its references if text encoders
        see them."""
        return caption if self.seen is None else self.seen.key(drawn.number, caption, drawn.is_flipped)

    def text_row(self, number: int, text: str) -> Row | None:
        """Read the cached features of a text; None if the sample has no file or the text is empty."""
        if not text or number not in self.text_files:
            return None
        return self.text_files.file(number, self.samples[number], self.storage).read(text)

    def read_or_replace(self, epoch: int, draw: int, skipped: list[str]) -> DrawnSample:
        """Read the image or latents of a draw. A damaged image is replaced by another one and added to `skipped`."""
        number, broken = int(self.sample_of_draw[draw]), set(self.damaged)
        if number in broken:
            number = find_replacement(self.samples, self.subsets, number, broken)
        while True:
            try:
                return self.read_sample(number, epoch, draw)
            except DamagedImage as error:
                broken.add(number)
                number = find_replacement(self.samples, self.subsets, number, broken, str(error))
                skipped.append(str(error))

    def read_sample(self, number: int, epoch: int, draw: int) -> DrawnSample:
        """Read the image or latents of this sample for a draw. Raises DamagedImage."""
        subset = self.subsets[self.samples[number].subset]
        is_flipped = self.is_mirrored or (subset.flip_aug and random_for(self.seed, "flip", epoch, draw).random() < 0.5)
        if number in self.in_memory or number in self.files:
            return DrawnSample(number, is_flipped, None, *self.read_cached(number, is_flipped))
        image, mask, references = self.read_image(number, epoch, draw, is_flipped)
        return DrawnSample(number, is_flipped, image, None, mask, references)

    def caption(self, sample: Sample, order: BatchOrder, draw: int) -> str:
        """Compose the caption of one draw."""
        rules, text = self.subsets[sample.subset].captions, sample.image.caption
        rng = random_for(self.seed, "caption", order.epoch, draw)
        if not self.num_variants:
            return compose_caption(text, rules, rng, order.epoch, order.step, self.max_train_steps)
        # compose_caption decides on dropout first, too, so the same draws are dropped with and without cached text
        # features.
        if is_dropped(rules, rng, order.epoch):
            return ""
        return caption_variant(sample.image.key, text, rules, rng.randrange(self.num_variants))

    def read_image(
        self, number: int, epoch: int, draw: int, is_flipped: bool
    ) -> tuple[Pixels, Tensor | None, tuple[Tensor, ...]]:
        """Return (RGB or RGBA, mask, pixels of the references) of one draw. Alpha that serves as mask is not part of
        the image."""
        sample = self.samples[number]
        subset = self.subsets[sample.subset]
        rgb, alpha = read_pixels(sample.image.key, self.storage.content(sample.image))
        check_size(sample.image, rgb)
        placement = self.placement(sample, epoch, draw, is_flipped)
        image_alpha = None if subset.alpha_mask else alpha
        pixels = with_alpha(rgb, image_alpha) if self.has_alpha else rgb
        image = apply_placement(pixels, placement, subset.resize_interpolation)
        # A partner of opposite_dir is trained like its image.
        are_opaque = bool(subset.alpha_mask and subset.opposite_dir)
        reference_pixels = read_placed_references(
            sample, placement, subset.resize_interpolation, self.storage, self.has_alpha, are_opaque
        )
        if subset.color_aug:
            # Equal generators change an image and its references alike, so that a pair keeps its difference.
            rngs = [random_for(self.seed, "colour", epoch, draw) for _ in range(1 + len(reference_pixels))]
            image, *reference_pixels = map(change_colour, [image, *reference_pixels], rngs)
        if subset.light:
            change = partial(change_light, largest=subset.light)
            image, *reference_pixels = (
                change(pixels, rng=random_for(self.seed, "light", epoch, draw)) for pixels in [image, *reference_pixels]
            )
        references = tuple(map(to_pixels, reference_pixels))
        if sample.image.mask_path is not None:
            return image, file_mask(sample, placement, subset.resize_interpolation), references
        if subset.alpha_mask and alpha is not None:
            return image, to_mask(apply_placement(alpha, placement, subset.resize_interpolation)), references
        return image, None, references

    def placement(self, sample: Sample, epoch: int, draw: int, is_flipped: bool) -> Placement:
        """Return the crop of one draw."""
        subset = self.subsets[sample.subset]
        face = parse_face(sample.image.key) if subset.face_crop_aug_range else None
        if face is not None and subset.face_crop_aug_range is not None:
            rng = random_for(self.seed, "crop", epoch, draw)
            zoom, target = subset.face_crop_aug_range, sample.shape.bucket
            return crop_at_face(sample.image.size, target, face, zoom, subset.random_crop, rng, is_flipped)
        if subset.random_crop:
            return crop_at_random(sample.shape, random_for(self.seed, "crop", epoch, draw), is_flipped)
        return crop_at_centre(sample.shape, is_flipped)

    def read_cached(self, number: int, is_flipped: bool) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        """Return (latents, mask, latents of the references) of a draw; values kept in memory are None or empty."""
        sample = self.samples[number]
        subset = self.subsets[sample.subset]
        latent = mask = None
        references: tuple[Tensor, ...] = ()
        if number in self.files:
            file = self.files.file(number, sample, self.storage)
            if self.files.has_changed(number, file.path):
                self.check_replaced(file, number)
            stored = file.read(subset.flip_aug, subset.alpha_mask)
            latent, mask, references = pick(stored, is_flipped)
        if sample.image.mask_path is not None:
            mask = file_mask(sample, crop_at_centre(sample.shape, is_flipped), subset.resize_interpolation)
        return latent, mask, references

    def check_replaced(self, file: LatentFile, number: int) -> None:
        """Raise UserError if a file that was replaced during the run holds latents of another image or VAE."""
        sample = self.samples[number]
        subset = self.subsets[sample.subset]
        flags = subset.flip_aug, subset.alpha_mask, file, self.has_alpha, subset.opposite_dir is not None
        job = Job(sample, (number,), subset.resize_interpolation, *flags)
        fault = judge(file, sample.image, job.expected(self.vae, self.seen), self.storage).fault
        if fault not in (None, MISSING, DAMAGED):  # reading names the last two
            raise UserError(
                f"the latent cache {file.path} was replaced during the run and is {fault}", "run again to rebuild it"
            )


def pick(stored: Latents, is_flipped: bool) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Return (latents, mask, latents of the references) as drawn: all mirrored, or all plain."""
    mask = None if stored.alpha_HW is None else stored.alpha_HW.float() / 255
    if not is_flipped:
        return stored.latents_CHW, mask, stored.references
    assert stored.flipped_CHW is not None
    return stored.flipped_CHW, None if mask is None else mask.flip(-1), stored.flipped_references


def finish_batch(
    draft: PartialBatch, memory: Mapping[int, Latents], texts: Mapping[str, Row], text_padding: Mapping[str, float]
) -> Batch:
    """Add the features that are kept in memory to a batch. Samples without a mask get ones if another has a mask."""
    latents, masks, references = list(draft.latents), list(draft.masks), list(draft.references)
    for index, (number, is_flipped) in enumerate(zip(draft.samples, draft.flips, strict=True)):
        if number in memory:
            latents[index], mask, references[index] = pick(memory[number], is_flipped)
            # A mask file, which the worker has read, wins over the alpha of the cached image.
            masks[index] = masks[index] if masks[index] is not None else mask
    cached_latents = [latent for latent in latents if latent is not None]
    return replace(
        draft.batch,
        latents_BCHW=torch.stack(cached_latents) if cached_latents else None,
        conditioning=stack_texts(draft.text_keys, draft.texts, texts, text_padding),
        unconditional=stack_texts(draft.unconditional_keys, draft.unconditional_texts, texts, text_padding),
        masks_B1HW=stack_masks(masks),
        reference_latents=stack_references(references),
    )


def stack_texts(
    keys: Sequence[str], read: Sequence[Row | None], texts: Mapping[str, Row], padding: Mapping[str, float]
) -> Conditioning | None:
    """Stack the text features that a worker has read, or else those in memory; None if none are cached."""
    if not texts or not keys:
        return None
    return stack_rows([texts[key] if row is None else row for key, row in zip(keys, read, strict=True)], padding)


def stack_references(references: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Stack references (CHW) across samples into one BCHW tensor per reference number."""
    return tuple(torch.stack(reference) for reference in zip(*references, strict=True))


def stack_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Stack masks to (B, 1, H, W), with ones for samples without a mask. Return None if no sample has one."""
    shape = next((mask.shape for mask in masks if mask is not None), None)
    if shape is None:
        return None
    return torch.stack([torch.ones(shape) if mask is None else mask for mask in masks])[:, None]


def collect_sizes(sample: Sample, is_flipped: bool) -> tuple[float, ...]:
    """Return original height and width, crop top and left, target height and width."""
    width, height = sample.image.size
    target_width, target_height = sample.shape.bucket
    left, top, right, _ = crop_ltrb(sample.shape.bucket, sample.image.size)
    # The order and the mirrored left edge are sd-scripts'.
    return height, width, top, target_width - right if is_flipped else left, target_height, target_width


def locate_corner(placement: Placement) -> tuple[int, int]:
    """Return (top, left) of the crop in the resized image, mirrored if the draw is."""
    if not placement.is_flipped:
        return placement.top, placement.left
    return placement.top, placement.resized[0] - placement.target[0] - placement.left


def file_mask(sample: Sample, placement: Placement, interpolation: str | None) -> Tensor:
    """Read the red channel of the mask file, cropped like the image; one of another size is stretched to the target."""
    assert sample.image.mask_path is not None
    red = np.ascontiguousarray(read_pixels(sample.image.mask_path)[0][..., 0])
    if (red.shape[1], red.shape[0]) != sample.image.size:
        # Only without buckets, see `check_mask_sizes`; sd-scripts stretches such masks, too.
        placement = Placement(placement.target, 0, 0, placement.target, placement.is_flipped)
    return to_mask(apply_placement(red, placement, interpolation))


def start_worker(_: int) -> None:
    """Initialize a worker: ignore SIGINT, SIGHUP and SIGBREAK, which the main process handles, end on SIGTERM, and use
    OpenCV without threads."""
    # A forked worker inherits the main process's handlers, which wait for the end of a step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Windows passes Ctrl-Break to the whole process group.
    group_signal = "SIGBREAK" if sys.platform == "win32" else "SIGHUP"
    signal.signal(signal.Signals[group_signal], signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import cv2

    # OpenCV would start a thread per core in every worker.
    cv2.setNumThreads(0)


def identity_collate(draft: PartialBatch | UserError) -> PartialBatch | UserError:
    """Return a worker's batch unchanged, in place of the loader's collation."""
    return draft

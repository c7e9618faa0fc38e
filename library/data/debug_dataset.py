"""The output of `debug_dataset`: the batches of the first epoch."""

import logging
from collections import Counter, defaultdict
from itertools import islice

from library.data.training_data import TrainingData, open_batches
from library.types import Batch

logger = logging.getLogger(__name__)

MOST_IMAGES = 100  # images that are listed


def show_batches(data: TrainingData) -> None:
    """Log the shapes of the first epoch's batches, then each image once: caption, sizes, loss weight, attributes."""
    shapes: Counter[str] = Counter()
    samples: defaultdict[str, list[str]] = defaultdict(list)  # descriptions of its draws, by image
    for batch in open_batches(data).iterate_epoch(1, range(data.num_batches), lambda index: index, 0, False):
        tensors = {"pixels": batch.pixels_BCHW, "latents": batch.latents_BCHW, "masks": batch.masks_B1HW}
        tensors |= {f"reference {r} pixels": tensor for r, tensor in enumerate(batch.reference_pixels)}
        tensors |= {f"reference {r} latents": tensor for r, tensor in enumerate(batch.reference_latents)}
        shapes[
            ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor is not None)
        ] += 1
        for position, key in enumerate(batch.keys):
            samples[key].append(describe_sample(batch, position))
    for shape, count in shapes.items():
        logger.info("%d x %s", count, shape)
    references = references_by_key(data)
    for key, lines in islice(samples.items(), MOST_IMAGES):
        others = len(set(lines)) - 1
        varied = f"; {others} more with another caption or crop" if others else ""
        names = " <- ".join([key, *references.get(key, ())])
        logger.info("  %s: %s%s%s", names, lines[0], f", {len(lines)} times" if len(lines) > 1 else "", varied)
    if len(samples) > MOST_IMAGES:
        logger.info("  and %d more images", len(samples) - MOST_IMAGES)


def references_by_key(data: TrainingData) -> dict[str, tuple[str, ...]]:
    samples = () if data.image_plan is None else data.image_plan.samples
    return {
        sample.image.key: tuple(r.key for r in sample.image.references) for sample in samples if sample.image.references
    }


def describe_sample(batch: Batch, place: int) -> str:
    height, width, top, left, target_height, target_width = batch.sizes_B6[place].tolist()
    attributes = f", {dict(batch.attributes[place])}" if batch.attributes[place] else ""
    return (
        f'"{batch.captions[place]}", {width}x{height}, crop at {left},{top}, '
        f"trained at {target_width}x{target_height}, loss weight {batch.loss_weights_B[place].item():g}{attributes}"
    )

"""--debug_dataset: logs the batches of the first epoch."""

import logging

from library.data.training_data import TrainingData, open_batches

logger = logging.getLogger(__name__)


def show_batches(data: TrainingData) -> None:
    """Log every batch of the first epoch: images, captions, sizes, loss weights, tensor shapes."""
    batches = open_batches(data)
    for number, batch in enumerate(batches.of_epoch(1, range(data.num_batches), lambda index: index, 0, False)):
        tensors = {
            "pixels": batch.pixels_BCHW,
            "latents": batch.latents_BCHW,
            "masks": batch.masks_B1HW,
        }
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor is not None)
        logger.info("batch %d of %d: %s", number + 1, data.num_batches, shapes)
        for place, (key, caption) in enumerate(zip(batch.keys, batch.captions, strict=True)):
            height, width, top, left, target_height, target_width = batch.sizes_B6[place].tolist()
            logger.info(
                '  %s: "%s", %dx%d, crop at %d,%d, trained at %dx%d, loss weight %g%s',
                key,
                caption,
                width,
                height,
                left,
                top,
                target_width,
                target_height,
                batch.loss_weights_B[place].item(),
                f", {dict(batch.attributes[place])}" if batch.attributes[place] else "",
            )

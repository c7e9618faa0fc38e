"""Text conditioning of a batch."""

from library.memory.devices import send
from library.training.step.context import StepContext
from library.types import Batch, Conditioning


def build_conditioning(context: StepContext, batch: Batch, extra: Conditioning) -> Conditioning:
    """Return the batch's text conditioning, with gradient if a text encoder trains, merged with `extra`."""
    features = {**extra, **(batch.conditioning or {})}
    # The features of encoders in memory replace those that were cached before training.
    if context.models.text_encoders or batch.concept is not None:
        if context.trains_text_encoder:
            encode = context.arch.text.encode if context.live_text is None else context.live_text.encode
            features |= encode(context.models.text_encoders, context.arch.text.tokenize(batch.captions))
        else:
            features |= context.captions(batch.captions)
    cache = context.arch.text_cache
    on_host = () if cache is None else cache.on_host
    return {name: feature if name in on_host else send(feature, context.device) for name, feature in features.items()}

"""Text conditioning of a batch."""

from library.memory.devices import send
from library.training.step.context import StepContext
from library.types import Batch, Conditioning


def build_conditioning(context: StepContext, batch: Batch, extra: Conditioning) -> Conditioning:
    """Return the batch's text conditioning, with gradient if a text encoder trains, merged with `extra`."""
    found = {**extra, **(batch.conditioning or {})}
    # The features of encoders in memory replace those that were cached before training.
    if context.models.text_encoders or batch.concept is not None:
        if context.trains_text_encoder:
            encode = context.arch.text.encode if context.live_text is None else context.live_text.encode
            found |= encode(context.models.text_encoders, context.arch.text.tokenize(batch.captions))
        else:
            found |= context.captions(batch.captions)
    cache = context.arch.text_cache
    stay = () if cache is None else cache.on_host
    return {name: t if name in stay else send(t, context.device) for name, t in found.items()}

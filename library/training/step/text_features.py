"""The text conditioning of a batch."""

from library.memory.devices import send
from library.training.step.context import StepContext
from library.types import Batch, Conditioning


def build_conditioning(context: StepContext, batch: Batch, extra: Conditioning) -> Conditioning:
    """Text features of the batch, with gradient where a text encoder trains, beside what it is `told` of images."""
    found = {**extra, **(batch.conditioning or {})}
    # What encoders in memory give takes the place of what they gave before training.
    if context.models.text_encoders or batch.concept is not None:
        trains = context.trains_text_encoder
        found |= encode_live(context, batch) if trains else context.captions(batch.captions)
    cache = context.arch.text_cache
    stay = () if cache is None else cache.on_host
    return {name: t if name in stay else send(t, context.device) for name, t in found.items()}


def encode_live(context: StepContext, batch: Batch) -> Conditioning:
    """Return the text features of the encoders in memory, with gradient."""
    encode = context.arch.text.encode if context.live_text is None else context.live_text.encode
    return encode(context.models.text_encoders, context.arch.text.tokenize(batch.captions))

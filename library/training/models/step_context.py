"""Builds the context of training steps from the loaded models and the network."""

from collections.abc import Sequence
from dataclasses import replace

from library.options.training.guidance import NO_GUIDANCE, GuidanceOptions
from library.options.training.pairs import NO_PAIRS, PairOptions
from library.protocols import Architecture
from library.training.models.base_model import LoadedModels
from library.training.models.compute import Compute
from library.training.step.conditioning import CaptionMemo
from library.training.step.context import StepContext
from library.training.step.modes import eval_mode
from library.types import Conditioning
from networks.core.protocol import AdoptedNetwork


def step_context(
    trains_text_encoder: bool,
    vae_batch_size: int,
    arch: Architecture,
    seed: int,
    loaded: LoadedModels,
    network: AdoptedNetwork,
    compute: Compute,
    pairs: PairOptions = NO_PAIRS,
    guidance: GuidanceOptions = NO_GUIDANCE,
) -> StepContext:
    """Build the context of a step."""
    encoders, live, concepts = loaded.models.text_encoders, loaded.live_text, loaded.concepts
    encode = arch.text.encode if live is None else live.encode

    def encode_captions(captions: Sequence[str]) -> Conditioning:
        if concepts is not None:
            (caption,) = captions  # `CaptionMemo` encodes one caption at a time
            return concepts[caption]
        assert encoders, "the text encoders have left memory, batches carry their cached outputs"
        # Adapters that do not train act too, without dropout.
        with eval_mode([network.module]), compute.autocast():
            return encode(encoders, arch.text.tokenize(captions))

    return StepContext(
        arch=replace(arch, objective=arch.objective.on(compute.device)),
        models=loaded.models,
        network=network,
        seed=seed,
        device=compute.device,
        autocast=compute.autocast,
        trains_text_encoder=trains_text_encoder,
        captions=CaptionMemo(encode_captions, arch.text_cache.padding if arch.text_cache else {}),
        live_text=live,
        vae_batch_size=vae_batch_size,
        pairs=pairs,
        guidance=guidance,
    )

"""The text encoders of a run: on the device, or unloaded once every caption is encoded."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from library.base.errors import about, error_in, needing
from library.checkpoints.recognition import keys_of_text_encoders
from library.data.caching.captions import Encode, Encoders, TextEncoding, cache_texts
from library.data.caching.stores import NO_TEXTS, TextStore
from library.data.caching.text_files import stack_rows
from library.data.training_data import TrainingData
from library.memory.offload.encoders import place_encoders
from library.options.caching import CachingOptions
from library.options.machine.memory import PrecisionOptions
from library.options.network_args import is_switched_on
from library.options.training.network import NetworkOptions
from library.processes.process_group import Processes
from library.protocols import Architecture, LiveText, TextCacheSpec, TextPipeline
from library.training.models.compute import Compute
from library.training.step.context import Autocast
from library.types import Conditioning

logger = logging.getLogger(__name__)


Encoded = Mapping[str, Conditioning]
"""The conditioning of each text, with a first axis of 1."""


@dataclass(frozen=True)
class RunText:
    """The text encoders on the device, and the cached features of captions and prompts."""

    encoders: list[nn.Module]
    store: TextStore = NO_TEXTS  # the text features of captions; empty if nothing is cached
    prompts: Encoded | None = None  # features of preview prompts; None if nothing is cached
    concepts: Encoded | None = None  # features of the prompts that are trained without images


@dataclass(frozen=True)
class TextPlan:
    """The plan for a run's text encoders."""

    are_adapted: bool  # True if they get an adapter
    cached: TextCacheSpec | None  # whose outputs are cached; None if nothing is, or if every encoder trains
    live: LiveText | None  # those that train while others are cached; None if there are none

    @classmethod
    def resolve(cls, options: NetworkOptions, spec: TextCacheSpec | None) -> "TextPlan":
        are_adapted = not options.network_train_unet_only
        if spec is None or not spec.options.cache_text_encoder_outputs:
            return cls(are_adapted, None, None)
        live = spec.live if are_adapted else None
        trains_all = live is not None and set(live.keys) == set(spec.keys)
        return cls(are_adapted, None if trains_all else spec, live)


def check_text_caching(options: NetworkOptions, spec: TextCacheSpec | None, plan: TextPlan) -> None:
    """Raise UserError if cached features would differ from what the run trains with; warn of options without effect."""
    if spec is None or not spec.options.cache_text_encoder_outputs:
        return
    if spec.live is None and spec.can_train and plan.are_adapted:
        raise about("--cache_text_encoder_outputs")(
            "encodes the captions once and frees the text encoders, so these cannot get an adapter",
            "add --network_train_unet_only, or leave out --cache_text_encoder_outputs",
        )
    argument = None if plan.live is None else plan.live.excluded_by
    if argument is not None and is_switched_on(options.network_args, argument):
        raise error_in(f"--network_args {argument}")(
            f"--network_args {argument}=True trains a text encoder whose outputs --cache_text_encoder_outputs takes "
            "before training",
            "leave one of them out",
        )
    if plan.cached is None:
        logger.warning(
            "--cache_text_encoder_outputs has no effect: every text encoder trains, so every caption is encoded in "
            "each step; --network_train_unet_only trains the denoiser alone"
        )
        return
    for file, changed in files_that_change_text(options):
        raise about("--base_weights")(
            f"{file} changes the text encoder ({changed} and others), whose outputs --cache_text_encoder_outputs "
            "takes before anything is merged",
            "merge the file into the base model with tools/merge_lora.py first, or leave out "
            "--cache_text_encoder_outputs",
        )


def files_that_change_text(options: NetworkOptions) -> Iterator[tuple[str, str]]:
    """Yield each adapter to merge that changes a text encoder, with one of the keys that do."""
    for file in options.base_weights or ():
        if changed := keys_of_text_encoders(Path(file)):
            yield file, changed[0]


def prepare_text(
    plan: TextPlan,
    caching: CachingOptions,
    precision: PrecisionOptions,
    arch: Architecture,
    data: TrainingData,
    compute: Compute,
    prompts: Sequence[str],
    processes: Processes,
) -> RunText:
    """Load the text encoders, or cache their outputs for every caption and prompt.

    Encoders that train stay loaded. The others are not loaded at all if everything is on disk. If the options keep
    encoders on the CPU, those without an adapter never move to the device.
    """
    device, on_cpu = compute.device, arch.text_cache is not None and arch.text_cache.options.text_encoder_cpu
    encoder_device = torch.device("cpu") if on_cpu else device
    open_all = partial(open_encoders, arch, encoder_device, compute.autocast)
    if data.prompts is not None:
        encoders = open_all()  # which leave memory afterwards
        preview_features = encode_each(encoders.prompts, prompts)
        concept_features = encode_each(encoders.captions, data.prompts)
        return RunText([], prompts=preview_features, concepts=concept_features)
    if plan.cached is None:
        if on_cpu and plan.are_adapted:
            logger.warning("--text_encoder_cpu has no effect: text encoders that get an adapter stay on the GPU")
        place = device if plan.are_adapted else encoder_device
        return RunText([encoder.to(place) for encoder in arch.load.text_encoders()])
    assert data.image_plan is not None, "options refuse caches of a user's class"
    encoding = TextEncoding(plan.cached, open_all, precision.mixed_precision)
    cached = cache_texts(data.image_plan, encoding, prompts, caching.skip_cache_check, processes)
    features = {text: stack_rows([row], {}) for text, row in cached.prompts.items()}
    if plan.live is None:
        return RunText([], cached.store, features)
    with needing("text encoders get an adapter without --network_train_unet_only; give them, or that option"):
        return RunText([encoder.to(device) for encoder in plan.live.load()], cached.store, features)


def open_encoders(arch: Architecture, device: torch.device, autocast: Autocast) -> Encoders:
    """Load the text encoders, without gradients, on the device as far as they fit."""
    encoders = [encoder.eval() for encoder in arch.load.text_encoders()]
    place_encoders(encoders, device)

    def encode(pipeline: TextPipeline, captions: Sequence[str]) -> Conditioning:
        with torch.no_grad(), autocast():
            return pipeline.encode(encoders, pipeline.tokenize(captions))

    return Encoders(partial(encode, arch.text), partial(encode, arch.preview.text))


def encode_each(encode: Encode, texts: Sequence[str]) -> Encoded:
    """Encode each text separately. Return the conditioning by text, on the CPU."""
    return {text: {name: tensor.cpu() for name, tensor in encode([text]).items()} for text in texts}

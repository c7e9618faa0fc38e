"""The first stage of the set-up: the frozen models, and what is encoded once with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import torch
from torch import Tensor, nn

from library.data.batches.dataset import TrainingSet
from library.data.batches.training_data import TrainingData
from library.data.caching.latents import cache_latents
from library.memory.devices import place, release_memory
from library.options.caching import CachingOptions
from library.options.train import TrainOptions
from library.processes import Processes
from library.protocols import Architecture, LatentCodec, LiveText
from library.training.run.compute import Compute
from library.training.run.context import Models
from library.training.run.frozen_base import form_while_reading, open_spread
from library.training.run.text_caching import live_text, prepare_text
from library.types import Conditioning


@dataclass(frozen=True)
class LoadedModels:
    """What the base model has become."""

    models: Models
    live_text: LiveText | None  # the text encoders in memory where the outputs of others are cached
    prompts: Mapping[str, Conditioning] | None  # cached features of the previews' prompts; None where none are cached


def load_models(
    options: TrainOptions,
    arch: Architecture,
    seed: int,
    training_set: TrainingData,
    compute: Compute,
    prompts: Sequence[str],
    processes: Processes,
) -> LoadedModels:
    """Encode pictures, captions and prompts where they are to be cached, then load what trains.

    One model after the other, the largest last: VAE and text encoders that have encoded everything leave memory before
    the denoiser comes, so the peak of a cached run is the denoiser alone.
    """
    vae = prepare_vae(options, arch, seed, training_set, processes)
    release_memory(options.memory.highvram)
    text = prepare_text(options, arch, training_set, compute.device, compute.autocast, prompts, processes)
    release_memory(options.memory.highvram)
    spread = open_spread(options, processes)
    denoiser = arch.load.denoiser(form_while_reading(options, spread))
    arch.fit_to_sizes(denoiser, [dataset.resolution for dataset in training_set.config.datasets])
    models = Models(denoiser, text.encoders, vae, arch.view(text.encoders, denoiser), spread)
    return LoadedModels(models, live_text(options, arch.text_cache), text.prompts)


def prepare_vae(
    options: TrainOptions, arch: Architecture, seed: int, training_set: TrainingData, processes: Processes
) -> nn.Module | None:
    """The VAE on the device, or None where it has encoded every picture already and may leave memory."""
    if not options.caching.cache_latents:
        return place(arch.load.vae(), processes.device)
    assert isinstance(training_set, TrainingSet), "--dataset_class refuses --cache_latents"
    encode_pictures(arch.load.vae, arch.codec, options.caching, seed, training_set, processes)
    return None


def encode_pictures(
    load_vae: Callable[[], nn.Module],
    codec: LatentCodec,
    caching: CachingOptions,
    seed: int,
    training_set: TrainingSet,
    processes: Processes,
) -> None:
    """Cache the latents of every picture, and let the training set draw them in place of pixels.

    The VAE is not loaded where every entry is there and is trusted (--skip_cache_check).
    """

    @cache
    def vae() -> nn.Module:
        return place(load_vae(), processes.device)

    def encode(pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        with torch.no_grad():
            return codec.encode(vae(), pixels_BCHW.to(processes.device), generators).float().cpu()

    store = cache_latents(training_set, encode, cache(lambda: identity_of(vae())), caching, seed, processes)
    training_set.use_latents(store)


def identity_of(module: nn.Module) -> str:
    """A hash of a module's weights, names and dtypes."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()

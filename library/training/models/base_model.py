"""First stage of the set-up: the frozen models, and what they encode once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import torch
from torch import Tensor, nn

from library.data.caching.latents import cache_latents
from library.data.caching.stores import NO_LATENTS, NO_TEXTS, LatentStore, TextStore
from library.data.plan.data_plan import DataPlan
from library.data.training_data import TrainingData
from library.memory.devices import move_to_device, release_memory
from library.options.caching import CachingOptions
from library.options.train import TrainOptions
from library.processes.process_group import Processes
from library.protocols import Architecture, LatentCodec, LiveText
from library.training.failures.vae_memory import VaeFallback
from library.training.models.compute import Compute
from library.training.models.frozen_base import open_sharded
from library.training.models.frozen_models import load_frozen
from library.training.models.text_caching import TextPlan, prepare_text
from library.training.models.weight_formats import BaseFormats
from library.training.step.context import Models
from library.types import Conditioning
from networks.core.protocol import NetworkModule


@dataclass(frozen=True)
class LoadedModels:
    """The loaded models and the caches built with them."""

    models: Models
    live_text: LiveText | None  # text encoders that still run while the outputs of others are cached
    prompts: Mapping[str, Conditioning] | None  # cached features of preview prompts; None if nothing is cached
    latents: LatentStore = NO_LATENTS
    texts: TextStore = NO_TEXTS
    concepts: Mapping[str, Conditioning] | None = None  # features of prompts that are trained without images


def load_models(
    options: TrainOptions,
    formats: BaseFormats,
    text_plan: TextPlan,
    arch: Architecture,
    seed: int,
    data: TrainingData,
    compute: Compute,
    prompts: Sequence[str],
    processes: Processes,
    reader: NetworkModule,
) -> LoadedModels:
    """Encode images, captions and prompts if they are cached, then load what trains.

    Models are loaded one after the other, the largest last: a VAE or text encoder that has encoded everything leaves
    memory before the denoiser is loaded, so the peak of a cached run is the denoiser alone. `reader` is the network
    module that reads the adapters to merge.
    """
    vae, latents = prepare_vae(options.caching, arch, seed, data, processes)
    release_memory(options.memory.highvram)
    text = prepare_text(text_plan, options.caching, options.precision, arch, data, compute, prompts, processes)
    release_memory(options.memory.highvram)
    sharded = open_sharded(options.distributed, processes)
    models = load_frozen(options.network, formats.denoiser, arch, text.encoders, vae, compute, reader, sharded)
    arch.fit_to_sizes(models.denoiser, [dataset.resolution for dataset in data.config.datasets])
    if data.sizes is not None:
        arch.expect_sizes(sizes[0] for _, sizes in data.sizes.batch_shapes())
    return LoadedModels(models, text_plan.live, text.prompts, latents, text.store, text.concepts)


def prepare_vae(
    caching: CachingOptions, arch: Architecture, seed: int, data: TrainingData, processes: Processes
) -> tuple[nn.Module | None, LatentStore]:
    """Return (VAE on the device, latents); the VAE is None once it has encoded every image and is unloaded."""
    if data.prompts is not None:
        return None, NO_LATENTS
    if not caching.cache_latents:
        return move_to_device(arch.load.vae(), processes.device), NO_LATENTS
    assert data.image_plan is not None, "options refuse caches of a user's class"
    return None, encode_images(arch.load.vae, arch.codec, caching, seed, data.image_plan, processes)


def encode_images(
    load_vae: Callable[[], nn.Module],
    codec: LatentCodec,
    caching: CachingOptions,
    seed: int,
    plan: DataPlan,
    processes: Processes,
) -> LatentStore:
    """Cache the latents of every image.

    The VAE is loaded only if an entry is missing or must be verified.
    """

    @cache
    def vae() -> nn.Module:
        return move_to_device(load_vae(), processes.device)

    fallback = VaeFallback()

    def encode(pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        # A second attempt after an out-of-memory error must draw the same noise.
        states = [generator.get_state() for generator in generators or ()]

        def compute() -> Tensor:
            for generator, state in zip(generators or (), states, strict=True):
                generator.set_state(state)
            return codec.encode(vae(), pixels_BCHW.to(processes.device), generators).float().cpu()

        with torch.no_grad():
            return fallback.run(vae(), compute)

    # The hash is computed only if latents go into files: it reads all weights, 0.4 s for 84 million of them.
    return cache_latents(
        plan, encode, cache(lambda: hash_module(vae()) + plan.spec.vae_suffix), caching, seed, processes, vae
    )


def hash_module(module: nn.Module) -> str:
    """Return a hash of a module's names, dtypes and weights."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # numpy has no bfloat16, and `tobytes` writes in C order whatever the memory format.
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()

"""The models of a run on fake tensors, which only have shapes, as the run would build them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from library.base.errors import NotThere
from library.checkpoints.weights import to_meta_device
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.memory.frozen import frozen_layers, multiply_codes
from library.memory.planner.counter import OperationCounter
from library.memory.planner.fakes import give_fakes
from library.options.caching import CachingOptions
from library.options.training.concepts import ConceptOptions
from library.options.training.network import NetworkOptions
from library.protocols import Architecture
from library.training.models.compute import Compute
from library.training.models.frozen_adapters import create_training_adapter
from library.training.models.network import create, create_on_meta_device
from library.training.models.requests import RequestedRun
from library.training.models.weight_formats import format_while_reading
from library.training.step.context import Models, TrainingAdapter
from library.types import Batch, Conditioning
from networks.core.protocol import AdoptedNetwork, adopt

CPU = torch.device("cpu")  # fake CUDA tensors have no gradients in a torch build without CUDA


@dataclass(frozen=True)
class BatchShape:
    """The image sizes of a batch, in pixels."""

    count: int
    width: int
    height: int
    reference_sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of each sample's reference images
    num_tokens: int | None = None  # of the longest caption; None for the model's maximum
    num_captions: int | None = None  # different ones of the data set; None if they are unknown

    @property
    def num_pixels(self) -> int:
        return self.count * sum(width * height for width, height in ((self.width, self.height), *self.reference_sizes))


def shape_of_batch(batch: Batch, downscale: int) -> BatchShape:
    """Return the sizes of a batch's images; `downscale` is in pixels per latent."""
    height, width = batch.height_width
    scaled = [(tensor, 1) for tensor in batch.reference_pixels] + [
        (tensor, downscale) for tensor in batch.reference_latents
    ]
    references = tuple((tensor.shape[-1] * scale, tensor.shape[-2] * scale) for tensor, scale in scaled)
    return BatchShape(len(batch.keys), width, height, references)


@dataclass(frozen=True)
class MetaRun:
    """The models of a run at full size on fake tensors, with the adapter attached."""

    run: RequestedRun
    compute: Compute
    models: Models  # those that stay during training
    encoders: Sequence[nn.Module]  # all text encoders
    vae: nn.Module | None
    network: AdoptedNetwork
    num_tokens: int | None = None  # that captions have; None for the model's maximum

    @property
    def adapter_modules(self) -> list[nn.Module]:
        """The trained adapter and the training adapter."""
        beside = self.models.training_adapter
        return [network.module for network in (self.network, *([] if beside is None else [beside.network]))]

    @property
    def arch(self) -> Architecture:
        return self.run.arch


def run_on_meta_device(run: RequestedRun, num_tokens: int | None = None) -> MetaRun:
    """Build the models as in the run, in the active fake mode, for captions of `num_tokens`."""
    options, arch = run.options, run.arch
    multiplies, merges = options.precision.multiplies_codes, bool(options.network.base_weights)
    # The cost of decoding follows from `WeightFormat` and is added later: only codes that are multiplied are counted.
    codec = format_while_reading(run.formats.denoiser if multiplies else None, merges)
    encoders, denoiser, vae = load_fakes(arch, codec)
    if multiplies:
        multiply_codes(frozen_layers(denoiser))
    staying = encoders
    if options.concepts is not None:
        staying = []
    elif run.text.cached is not None:
        staying = encoders[: 0 if run.text.live is None else run.text.live.num_encoders]
    needs_vae = not has_latents(options.caching, options.concepts)
    models = Models(denoiser, staying, vae if needs_vae else None, arch.view(staying, denoiser))
    models = replace(models, training_adapter=training_adapter_on_meta_device(options.network, arch, models))
    network = network_on_meta_device(run, models)
    return MetaRun(run, Compute.build(options.precision, CPU), models, encoders, vae, network, num_tokens)


def has_latents(caching: CachingOptions, concepts: ConceptOptions | None) -> bool:
    """Return True if no step needs the VAE, because latents are cached or drawn from prompts."""
    return caching.cache_latents or concepts is not None


def training_adapter_on_meta_device(
    options: NetworkOptions, arch: Architecture, models: Models
) -> TrainingAdapter | None:
    """Attach the training adapter to the models, if there is one."""
    with unset_fake_temporarily():  # the file's real values determine ranks and forms
        adapter = create_training_adapter(options, arch, models)
    if adapter is not None:
        give_fakes(adapter.network.module.eval().requires_grad_(False))
        adapter.network.apply_to(*models.network_view, True, True)
    return adapter


def network_on_meta_device(run: RequestedRun, models: Models) -> AdoptedNetwork:
    """Attach the adapter to the models."""
    options, module, precision = run.options.network, run.module, run.options.precision
    if options.dim_from_weights or module.is_ours:
        with unset_fake_temporarily():
            # A file's real values determine ranks and forms.
            new = create if options.dim_from_weights else create_on_meta_device
            network = adopt(new(options, module, models))
        give_fakes(network.module, is_channels_last=False)
    else:
        with counter_for(run.arch):  # returns plausible values where a network module reads them
            network = adopt(create(options, module, models))
    with counter_for(run.arch):
        network.apply_to(
            *models.network_view, not options.network_train_unet_only, not options.network_train_text_encoder_only
        )
    if precision.full_fp16 or precision.full_bf16:
        give_fakes(network.module, DTYPES[precision.mixed_precision], is_channels_last=False)
    network.module.train()
    return network


def load_fakes(
    arch: Architecture, weight_format: RequestedFormat | None
) -> tuple[list[nn.Module], nn.Module, nn.Module | None]:
    """Load (text encoders, denoiser, VAE) as fakes, frozen; the VAE is None if its files are missing."""
    loader = to_meta_device(arch.load)
    with unset_fake_temporarily():
        encoders, denoiser = loader.text_encoders(), loader.denoiser(weight_format)
        try:
            vae = loader.vae()
        except NotThere:  # then it has encoded everything elsewhere
            vae = None
    for model in (*encoders, denoiser, *([] if vae is None else [vae])):
        give_fakes(model.eval().requires_grad_(False))
    return encoders, denoiser, vae


def counter_for(arch: Architecture, num_tokens: int | None = None) -> OperationCounter:
    """Build an operation counter that answers reads of values: captions have `num_tokens`, and conditions hold."""
    return OperationCounter({"int": limit_tokens(arch, num_tokens), "float": 0.5, "bool": True})


def longest_caption(arch: Architecture, num_tokens: int | None = None) -> str:
    return "a " * limit_tokens(arch, num_tokens)


def limit_tokens(arch: Architecture, num_tokens: int | None) -> int:
    """Return `num_tokens`, at most the model's maximum, which None stands for."""
    return arch.text.max_tokens if num_tokens is None else min(num_tokens, arch.text.max_tokens)


def fake_batch(arch: Architecture, shape: BatchShape, conditioning: Conditioning | None, has_latents: bool) -> Batch:
    """Build a batch of fake tensors, in the active fake mode."""
    spec = arch.codec.spec
    latents, *references = (
        (shape.count, spec.channels, height // spec.downscale, width // spec.downscale)
        for width, height in ((shape.width, shape.height), *shape.reference_sizes)
    )
    return Batch(
        keys=[f"image {i}" for i in range(shape.count)],
        captions=[longest_caption(arch, shape.num_tokens)] * shape.count,
        pixels_BCHW=None if has_latents else torch.empty(shape.count, 3, shape.height, shape.width),
        latents_BCHW=torch.empty(latents) if has_latents else None,
        conditioning=conditioning,
        loss_weights_B=torch.ones(shape.count),
        masks_B1HW=None,
        sizes_B6=torch.ones(shape.count, 6),
        attributes=[{}] * shape.count,
        reference_pixels=()
        if has_latents
        else tuple(torch.empty(shape.count, 3, height, width) for width, height in shape.reference_sizes),
        reference_latents=tuple(map(torch.empty, references)) if has_latents else (),
    )

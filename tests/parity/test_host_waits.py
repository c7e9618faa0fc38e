"""A step queues its work without waiting for the device, and saves no views of larger tensors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from library.training.models.base_model import LoadedModels
from library.training.models.compute import Compute
from library.training.models.requests import RequestedRun
from library.training.models.step_context import step_context
from library.training.planning.counted_inputs import count_captions
from library.training.planning.meta_run import BatchShape, fake_batch, run_on_meta_device
from library.training.step.losses import loss_of, start_batch
from library.types import Concept
from tests.device_reads import HostWaits, NoWaiting, move_fakes, on_device
from tests.device_standin import DEVICE, device_without_float64
from tests.parity.test_counting import open_tiny, real_step
from tests.tiny.bases import BASES

pytestmark = pytest.mark.usefixtures("fresh_process")  # reading options configures logging

SHAPE = BatchShape(2, 64, 64)

QUICK_BASES = ("sd", "flux", "qwen_image_21")


def take_step(name: str, folder: Path, *more: str, concept: Concept | None = None) -> list[Tensor]:
    """Compute the forward and backward pass of a batch on the device and return the gradients.

    With a `concept` the batch has no images.
    """
    cached = ("--cache_text_encoder_outputs", "--network_train_unet_only") if BASES[name].caches_text else ()
    options, arch = open_tiny(name, folder, *cached, *more)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        requested = RequestedRun.resolve(options, arch)
        meta = run_on_meta_device(requested)
        _, conditioning = count_captions(requested.text.cached, meta, SHAPE)
        batch = fake_batch(arch, SHAPE, conditioning, options.caching.cache_latents)
    models, network, on_host = meta.models, meta.network, arch.text_cache.on_host if arch.text_cache else ()
    with device_without_float64(), NoWaiting():
        move_fakes([models.denoiser, *models.text_encoders, network.module])
        network.prepare_gradients(*models.network_view)
        loaded = LoadedModels(models, requested.text.live, None)
        trains_text = options.trains_text_encoders
        context = step_context(trains_text, 1, arch, 3, loaded, network, Compute.build(options.precision, DEVICE))
        assert batch.latents_BCHW is not None
        there = {
            key: torch.ones(fake.shape, dtype=fake.dtype) if key in on_host else on_device(fake)
            for key, fake in (conditioning or {}).items()
        }
        real = {"loss_weights_B": torch.ones(SHAPE.count), "sizes_B6": torch.full((SHAPE.count, 6), 64.0)}
        batch = replace(
            batch, latents_BCHW=on_device(batch.latents_BCHW), conditioning=there if conditioning else None, **real
        )
        if concept is not None:
            captions = batch.captions[:1] * SHAPE.count
            batch = replace(batch, latents_BCHW=None, conditioning=None, captions=captions, concept=concept)
        start_batch(context, 0, 0)
        torch.autograd.backward(loss_of(context, batch, 0))
    return [p.grad for p in network.trainable_parameters() if p.grad is not None]


@pytest.mark.parametrize("name", [n if n in QUICK_BASES else pytest.param(n, marks=pytest.mark.nightly) for n in BASES])
def test_no_base_model_makes_the_host_wait(name: str, tmp_path: Path) -> None:
    gradients = take_step(name, tmp_path / "model")
    assert len(gradients) > 10 and all(gradient.device == DEVICE for gradient in gradients)


def test_a_batch_of_a_concept_does_not_make_the_host_wait(tmp_path: Path) -> None:
    concept = Concept("a dog", "", "a cat", push=-1.5, multiplier=-0.5, num_steps=5, num_denoised=3, guidance=3.0)
    gradients = take_step("sd", tmp_path / "model", "--network_train_unet_only", concept=concept)
    assert len(gradients) > 10 and all(gradient.device == DEVICE for gradient in gradients)


KINDS = {
    "dora": ("lora", "dora_wd=True"),
    "dora_per_output": ("lora", "dora_wd=True wd_on_output=True"),
    "dropouts": ("lora", "rank_dropout=0.3 module_dropout=0.3"),
    "ggpo": ("lora", "ggpo_sigma=0.03 ggpo_beta=0.01"),
    "dylora": ("dylora", "unit=2"),
    "tlora": ("tlora", "tlora_min_rank=2"),
    "lora_fa": ("lora_fa", ""),
    "loha": ("loha", ""),
    "lokr": ("lokr", "factor=2"),
    "oft_v2": ("oft_v2", ""),
    "boft": ("boft", ""),
}


QUICK = ("dora", "dropouts", "loha", "oft_v2")  # the others are nightly


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.nightly) for k in KINDS])
def test_no_adapter_kind_makes_the_host_wait(kind: str, tmp_path: Path) -> None:
    module, arguments = KINDS[kind]
    words = ["--network_module", f"networks.{module}", "--network_dropout", "0.2" if kind == "dropouts" else "0"]
    take_step("flux", tmp_path / "model", *words, *(["--network_args", *arguments.split()] if arguments else []))


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "shape": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "dtype too": lambda x: x.to("cpu", torch.float16),
    "copy": lambda x: torch.zeros(3).copy_(x),
    "to the device": lambda x: torch.ones(3).to(x.device) + x,
    "into the device": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_operations_that_make_the_host_wait_are_detected(read: Callable[[Tensor], object]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.zeros(3)
    with device_without_float64(), NoWaiting():
        x = on_device(fake)
        x + x.to(torch.float16) + torch.ones(3).to(DEVICE, non_blocking=True)
        with pytest.raises((HostWaits, DataDependentOutputException, DynamicOutputShapeException)):
            read(x)


# Tensors saved for the backward pass are not views of larger tensors, which would be kept in full.

SHARE = 0.03  # shifts, scales and gates are views of one vector; the last layer uses the image part of all tokens


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", BASES)
def test_no_saved_view_keeps_a_larger_tensor_alive(name: str, precision: str, tmp_path: Path) -> None:
    options, arch = open_tiny(name, tmp_path / "model", "--mixed_precision", precision)
    step = real_step(options, arch, BatchShape(2, 256, 192), recomputes=False)
    saved_tensors: dict[int, list[Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            saved_tensors.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    sizes = {key: parts[0].untyped_storage().nbytes() for key, parts in saved_tensors.items()}
    idle = sum(sizes[key] - bytes_of_union(parts) for key, parts in saved_tensors.items())
    assert idle < SHARE * sum(sizes.values())


def bytes_of_union(parts: list[Tensor]) -> int:
    """Return the bytes that tensors of one storage cover together."""
    size = parts[0].element_size()
    is_used = torch.zeros(parts[0].untyped_storage().nbytes() // size, dtype=torch.bool)
    places = torch.arange(len(is_used))
    for part in parts:
        is_used[places.as_strided(part.shape, part.stride(), part.storage_offset()).flatten()] = True
    return size * int(is_used.sum())

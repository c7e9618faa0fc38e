"""The memory of previews, which are drawn while everything for training stays allocated."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.memory.devices import bytes_of, tensors_of
from library.memory.planner.counter import OperationCounter
from library.memory.planner.prediction import ALLOCATOR_SHARE, CONTEXT_BYTES, CountedStep, ModeCost
from library.memory.planner.speed import NO_WORK, Work
from library.options.output.preview import PreviewOptions
from library.options.output.prompts import read_prompts
from library.protocols import Architecture
from library.training.evaluation.preview import PreviewSchedule
from library.training.evaluation.prompts import resolve_all


@dataclass(frozen=True)
class CountedPreview:
    """The memory of decoding the largest preview, in bytes of tensors.

    The denoiser needs less: without gradients it keeps the activations of one block at a time.
    """

    width: int
    height: int
    vae_bytes: int  # 0 if the VAE stays in memory during training
    decoding_bytes: int
    work: Work = NO_WORK  # of decoding

    def peak(self, step: CountedStep, chosen: ModeCost) -> int:
        """Return the GPU memory for a preview in a run configured as `chosen`."""
        resident_bytes = chosen.weight_bytes + step.adapter_bytes + step.optimizer.state + self.vae_bytes
        return resident_bytes + round((1 + ALLOCATOR_SHARE) * self.decoding_bytes) + CONTEXT_BYTES


def largest_preview(options: PreviewOptions, arch: Architecture) -> tuple[int, int] | None:
    """Return the width and height of the largest preview; None without previews.

    If the prompts file does not exist yet, assume the base model's default size.
    """
    if PreviewSchedule.build(options).is_empty or not options.sample_prompts:
        return None
    path, defaults = Path(options.sample_prompts), arch.preview.defaults
    if not path.is_file():
        return defaults.width, defaults.height
    sizes = [(prompt.width, prompt.height) for prompt in resolve_all(read_prompts(path), arch)]
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


def count_preview(
    options: PreviewOptions, arch: Architecture, vae: nn.Module | None, stays: bool, counter: OperationCounter
) -> CountedPreview | None:
    """Count decoding in the active fake mode; None without previews or without the VAE's files."""
    size = largest_preview(options, arch)
    if size is None or vae is None:
        return None
    (width, height), spec = size, arch.codec.spec
    latents_BCHW = torch.empty(1, spec.channels, height // spec.downscale, width // spec.downscale)
    counter.leave_out(tensors_of(vae))
    with counter, torch.no_grad():
        arch.codec.decode(vae, latents_BCHW)
    work = Work(counter.flops, counter.moved, counter.launches)
    return CountedPreview(width, height, 0 if stays else bytes_of(vae), counter.peak, work)

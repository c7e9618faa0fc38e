"""The fastest configuration of a training that fits a GPU, and its description."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.base.formatting import format_gib
from library.memory.planner.choice import Allowed, ModeChoice, choose
from library.memory.planner.gpus import GIB, Gpu
from library.memory.planner.prediction import CONTEXT_BYTES, ModeCost
from library.memory.planner.stages import StageMemory
from library.memory.planner.table import format_table
from library.options.train import TrainOptions
from library.training.planning.counting import CountedRun
from library.training.planning.previews import CountedPreview
from library.training.planning.settings import changes, describe, format_options, resolve_allowed, resolve_memory_mode


@dataclass(frozen=True)
class Fit:
    """A run's counts and the choice for a GPU."""

    counted: CountedRun
    allowed: Allowed
    choice: ModeChoice
    stage_sizes: Mapping[str, int]  # the batch sizes for encoding, by option; 0 if not even 1 fits
    num_passes: int | None = None  # of the run; None if its length is unknown

    @property
    def options(self) -> TrainOptions:
        """The options as the user gave them."""
        return self.counted.options

    def values(self) -> dict[str, Any]:
        """Return the chosen options that differ from the user's; none if nothing fits."""
        if self.choice.chosen is None:
            return {}
        sizes = {name: size for name, size in self.stage_sizes.items() if size and size != self.options.flat()[name]}
        off_the_card = {"text_encoder_cpu": True} if self.stage_sizes.get("text_encoder_batch_size") == 0 else {}
        own_format, memory = self.options.precision.denoiser_format, self.options.memory
        return changes(self.options.flat(), own_format, memory, self.choice.chosen.mode) | sizes | off_the_card

    def lines(self) -> Iterator[str]:
        """Yield the table, and how to pin its marked line."""
        gpu = self.choice.gpu
        nominal = "" if gpu.nominal_bytes is None else f" free of {gpu.nominal_bytes / GIB:g} GB"
        yield (
            f"{format_gib(gpu.memory_bytes)}{nominal} (counted as {gpu.name}: {gpu.flops / 1e12:.1f} TFLOP/s, "
            f"{gpu.bus / 1e9:.1f} GB/s from main memory), predicted:"
        )
        yield from format_table(self.choice, describe, self.num_passes)
        if self.options.precision.multiplies_codes:
            yield "the times are those of 16-bit products: --base_arithmetic 8bit is not modelled"
        for stage in self.counted.stages:
            yield self.stage_line(stage)
        if self.counted.preview is not None:
            yield self.preview_line(self.counted.preview)
        if self.choice.chosen is None:
            yield self.shortage()
        else:
            if self.choice.lacks_spare:
                left = self.choice.gpu.memory_bytes - self.choice.chosen.device_bytes
                yield f"only {format_gib(left)} stays free, which is little: nothing leaves more"
            yield self.peak_line(self.choice.chosen)
            fixed = format_options(self.values(), type(self.options).defaults())
            yield (
                f"selected: ->. To pin this choice, add: {fixed}"
                if fixed
                else "-> matches your options; nothing to change"
            )

    def peak_line(self, chosen: ModeCost) -> str:
        """Name the stage of the run with the highest GPU peak; each stage frees its memory."""
        peaks = {f"training ({chosen.peak})": chosen.device_bytes}
        peaks |= {
            stage.name: self.stage_bytes(stage) for stage in self.counted.stages if self.stage_sizes[stage.option]
        }
        if (preview := self.counted.preview) is not None:
            peaks["previews"] = preview.peak(self.counted.step, chosen)
        name = max(peaks, key=lambda stage: peaks[stage])
        return f"peak of the run: {name}, {format_gib(peaks[name])}"

    def preview_line(self, preview: CountedPreview) -> str:
        need = preview.peak(self.counted.step, self.choice.chosen or self.choice.least)
        line = f"previews of {preview.width}x{preview.height}: {format_gib(need)}"
        if need <= self.choice.gpu.memory_bytes:
            return line
        return f"{line}, more than there is: the VAE decodes them in tiles, or on the processor"

    def stage_bytes(self, stage: StageMemory) -> int:
        """Return a stage's bytes with the chosen batch size, or with 1 if none fits."""
        size = self.stage_sizes[stage.option] or 1
        return stage.peak(size, self.is_streamed(stage)) + CONTEXT_BYTES

    def is_streamed(self, stage: StageMemory) -> bool:
        size = self.stage_sizes[stage.option]
        return size > 0 and stage.is_streamed(size, self.choice.gpu.memory_bytes - CONTEXT_BYTES)

    def stage_line(self, stage: StageMemory) -> str:
        size, need = self.stage_sizes[stage.option], format_gib(self.stage_bytes(stage))
        if not size:
            return f"{stage.name} needs {need} by itself, more than there is: {WITHOUT_CARD[stage.option]}"
        streamed = ", layers streamed from main memory" if self.is_streamed(stage) else ""
        return f"{stage.name}: {need} with --{stage.option} {size}{streamed}"

    def shortage(self) -> str:
        """Describe the smallest configuration, its parts, and what could be reduced."""
        least, step = self.choice.least, self.counted.step
        training = step.adapter_bytes + step.gradient_bytes + step.optimizer.state
        activations = least.tensor_bytes - least.weight_bytes - training
        missing = format_gib(least.device_bytes - self.choice.gpu.memory_bytes)
        if least.device_bytes <= self.choice.gpu.memory_bytes:
            return (
                f"nothing fits: {describe(least.mode)} needs {format_gib(least.host_bytes)} of main memory, and "
                f"{format_gib(int(self.choice.gpu.main_memory_bytes))} are free. {SMALLER_WEIGHTS}"
            )
        smaller = "--train_batch_size or --resolution" if self.options.concepts is None else IN_PROMPTS
        return (
            f"nothing fits: the least is {format_gib(least.device_bytes)} with {describe(least.mode)}, {missing} too "
            f"much. Of it {format_gib(least.weight_bytes)} are frozen weights ({SMALLER_WEIGHTS}), "
            f"{format_gib(training)} the adapter, its gradients and its optimizer (a smaller --network_dim, or "
            "--optimizer_type AdamW8bit), "
            f"{format_gib(activations)} activations (a smaller {smaller})"
        )


WITHOUT_CARD = {
    "vae_batch_size": "use smaller images, or cache latents on another machine with --cache_latents_to_disk",
    "text_encoder_batch_size": "--text_encoder_cpu does it on the processor",
}
IN_PROMPTS = "batch_size or resolution in the --prompts_file"
SMALLER_WEIGHTS = "--base_format or --fit_formats int8 nf4 store them in fewer bits"


def fit_to(counted: CountedRun, gpu: Gpu, num_steps: int | None = None) -> Fit:
    """Choose the configuration for a GPU; options that the user has set are kept.

    `num_steps` is the number of optimizer steps, or None if unknown.
    """
    options = counted.options
    values, defaults = options.flat(), type(options).defaults()
    available_bytes = gpu.memory_bytes - CONTEXT_BYTES
    sizes = {}
    for stage in counted.stages:
        batch_size = values[stage.option]
        is_free = batch_size == defaults[stage.option]
        sizes[stage.option] = stage.most_that_fits(available_bytes) if is_free else batch_size
    allowed = resolve_allowed(
        options.fit, options.memory, resolve_memory_mode(options.memory, options.precision, options.distributed)
    )
    num_sides = 1 if options.pairs.pair_slider is None else 2
    num_passes = None if num_steps is None else num_steps * options.run.gradient_accumulation_steps * num_sides
    return Fit(counted, allowed, choose(counted.step, allowed, gpu), sizes, num_passes)

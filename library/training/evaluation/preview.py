"""Previews during training: schedule, prompts and files. The base model's `Preview` draws them."""

import logging
from bdb import BdbQuit
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite

from PIL import Image
from torch import nn
from tqdm import tqdm

from library.base.determinism import deterministic_mode
from library.base.progress import progress_bar
from library.memory.devices import move_to_device, release_memory
from library.options.output.preview import PreviewOptions
from library.options.output.prompts import read_preview_prompts
from library.options.training.averaging import PREVIEWS
from library.protocols import Architecture
from library.training.evaluation.drawing import collect_texts, decode, draw_latents, encode_prompts, seed_generator
from library.training.evaluation.image_scores import Scorer, format_means
from library.training.evaluation.preview_weights import with_preview_weights, without_training_adapter
from library.training.evaluation.prompt_images import show_with_references
from library.training.evaluation.prompts import resolve_all
from library.training.evaluation.strength_response import FEWEST, measure_response
from library.training.evaluation.without_side_effects import evaluating
from library.training.failures.interruption import Interruption
from library.training.failures.vae_memory import VaeFallback
from library.training.reporting.console_lines import announce, is_read_by_person
from library.training.reporting.event_stream import Events
from library.training.reporting.events import Scores, Strengths
from library.training.reporting.sample_images import (
    Drawn,
    build_preview_event,
    grid_path,
    image_path,
    is_written,
    write_grid,
    write_preview,
)
from library.training.reporting.trackers import Charts
from library.training.run_parts import Run
from library.training.step.context import StepContext
from library.types import Conditioning, Prompt, plain_caption

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreviewSchedule:
    """When to draw previews; None means never."""

    at_first: bool
    every_n_steps: int | None
    every_n_epochs: int | None

    @classmethod
    def build(cls, options: PreviewOptions) -> "PreviewSchedule":
        """Read the options: 0 and below mean never, epochs override steps."""
        steps, epochs = (max(n or 0, 0) or None for n in (options.sample_every_n_steps, options.sample_every_n_epochs))
        return cls(options.sample_at_first, steps if epochs is None else None, epochs)

    @property
    def is_empty(self) -> bool:
        return not (self.at_first or self.every_n_steps or self.every_n_epochs)

    def holds_step(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def holds_epoch(self, epoch: int) -> bool:
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0


def read_wanted_prompts(options: PreviewOptions, arch: Architecture) -> list[Prompt]:
    """Read the preview prompts; none if no interval or no file is given, or the file is empty."""
    path = options.sample_prompts
    if PreviewSchedule.build(options).is_empty or not path:
        return []
    specs = read_preview_prompts(options)
    if not specs:
        logger.warning("--sample_prompts %s holds no prompts: no images are drawn", path)
    defaults = arch.preview.defaults
    num_unsized = sum(spec.width is None or spec.height is None for spec in specs)
    if num_unsized:
        logger.info(
            "%d of %d preview prompts leave their size to the default, %d x %d; --w and --h in the prompt file set it",
            num_unsized, len(specs), defaults.width, defaults.height,
        )  # fmt: skip
    prompts = resolve_all(specs, arch)
    for text in map(plain_caption, collect_texts(prompts, arch)):
        if (num_tokens := arch.preview.text.count_tokens(text)) > arch.preview.text.max_tokens:
            logger.warning(
                "preview prompt of %d tokens: only the first %d are used: %s",
                num_tokens,
                arch.preview.text.max_tokens,
                text,
            )
    return prompts


def encode_with_loaded(
    context: StepContext, prompts: Sequence[Prompt], cached: Mapping[str, Conditioning] | None
) -> dict[str, Conditioning]:
    """Encode the prompts with the text encoders in memory, and add cached features of the others."""
    encoders = context.models.text_encoders
    return encode_prompts(context.arch, encoders, context.autocast, prompts, context.live_text, cached)


class Previews:
    """Draws a run's previews on schedule. Errors are logged, and training continues."""

    def __init__(
        self,
        run: Run,
        charts: Charts,
        prompts: Sequence[Prompt],
        cached: Mapping[str, Conditioning] | None = None,
        is_drawing: bool = False,
        scorer: Scorer | None = None,
    ) -> None:
        """`cached` holds the features of text encoders that are not in memory, by text.

        `is_drawing` is True if the main process draws; only it has prompts, and processes that share its base model
        take part.
        """
        self._run, self._charts, self._prompts, self._cached = run, charts, prompts, cached
        self._is_drawing, self._scorer = is_drawing, scorer
        sharded = run.context.models.sharded
        self._shared_base = sharded if is_drawing and sharded is not None and sharded.has_main else None
        self._schedule = PreviewSchedule.build(run.options.preview)
        self._vae_fallback = VaeFallback()
        # None where text encoders train, so that the features change.
        self._encoded = None if run.context.models.text_encoders else cached
        if run.context.models.text_encoders and prompts and not run.context.trains_text_encoder:
            with evaluating(run, PREVIEWS), deterministic_mode(False):
                self._encoded = encode_with_loaded(run.context, prompts, cached)

    def before_training(self, interruption: Interruption) -> bool:
        """Draw before the first step, if requested. Return False if an interruption stopped it."""
        return not self._schedule.at_first or self._draw_all(epoch_event(0), 0, 0, interruption)

    def are_due(self, step: int) -> bool:
        """Return True if previews are scheduled after `step`, ignoring epochs."""
        return bool(self._prompts) and self._schedule.holds_step(step)

    def after_step(self, step: int, epoch: int, interruption: Interruption) -> bool:
        """Draw if scheduled after `step` of `epoch`. Return False if an interruption stopped it."""
        return not self._schedule.holds_step(step) or self._draw_all(step_event(step), step, epoch, interruption)

    def draw_now(self, step: int, epoch: int, interruption: Interruption) -> bool:
        """Draw unless `after_step` did; without prompts this is logged. Return False if an interruption stopped it."""
        if not self._is_drawing:
            logger.warning("no previews can be drawn now: this run has no --sample_prompts with an interval")
        return self._schedule.holds_step(step) or self._draw_all(step_event(step), step, epoch, interruption)

    def after_epoch(self, step: int, epoch: int, interruption: Interruption) -> bool:
        """Draw if scheduled after `epoch`, whose last step is `step`. Return False if an interruption stopped it."""
        return not self._schedule.holds_epoch(epoch) or self._draw_all(epoch_event(epoch), step, epoch, interruption)

    def are_drawn(self, event: str, since: float) -> bool:
        """Return True if all images of an event are on disk and were written at `since` (seconds since 1970) or
        later."""
        options = self._run.options.saving
        paths = [partial(image_path, options, event, i, prompt.seed) for i, prompt in enumerate(self._prompts)]
        grids = [partial(grid_path, options, event)] if len(paths) > 1 else []
        return all(is_written(path_of, since) for path_of in (*paths, *grids))

    def _draw_all(self, event: str, step: int, epoch: int, interruption: Interruption) -> bool:
        """Draw in the main process, with the help of others if the base model is sharded. Return False in all
        processes if the main one was interrupted. Raises ProcessLost."""
        shared, processes, is_complete = self._shared_base, self._run.processes, True
        if shared is not None and not processes.is_main:
            # Gathering a block of the sharded base model is a collective: this rank takes part until the main one is
            # done.
            shared.follow(0)
        if self._prompts:
            with nullcontext() if shared is None else shared.lead():
                is_complete = not interruption.is_requested and self._draw_each(event, step, epoch, interruption)
        if not self._is_drawing:
            return is_complete
        processes.require_all()
        # The run ends at this step if its images are incomplete, in all processes or in none.
        result = processes.share(f"previews {event}", "complete" if is_complete else "incomplete")
        return result == "complete"

    def _draw_each(self, event: str, step: int, epoch: int, interruption: Interruption) -> bool:
        """Draw the images one after another. Return False if an interruption or a lost process left some undrawn."""
        run, context, drawn, is_complete = self._run, self._run.context, [], True
        # Front ends look for this line, which is sd-scripts'.
        translation = "" if is_read_by_person() else " / サンプル画像生成 ステップ"
        announce(f"\ngenerating sample images at step{translation}: {step}")
        try:
            release_memory(run.options.memory.highvram)
            denoiser, precision = context.models.denoiser, run.options.precision
            keeps_adapter = run.options.preview.sample_with_training_adapter
            with (
                evaluating(run, PREVIEWS),
                deterministic_mode(False),
                with_preview_weights(context.arch.preview, precision, denoiser),
                without_training_adapter(None if keeps_adapter else context.models.training_adapter),
            ):
                vae = context.models.vae
                # A run with cached latents has unloaded the VAE. It is loaded for these previews alone.
                if vae is None:
                    vae = move_to_device(context.arch.load.vae(), context.device)
                num_calls = sum(len(context.arch.preview.sampler(prompt).levels) for prompt in self._prompts)
                with progress_bar("previews", num_calls, leave=False) as bar:

                    def goes_on() -> bool:
                        nonlocal is_complete
                        is_complete = is_complete and not (interruption.is_requested or run.processes.is_lost)
                        return is_complete

                    def goes_on_after_call() -> bool:
                        bar.update(1)
                        return goes_on()

                    for index in range(len(self._prompts)):
                        if goes_on():
                            drawn += self._draw_one(event, step, epoch, index, vae, goes_on_after_call)
                del vae
            if len(drawn) > 1:
                write_grid(grid_path(run.options.saving, event), drawn)
            report_strengths(run.events, drawn, step, epoch)
            if self._scorer is not None and len(drawn) == len(self._prompts):
                report_scores(run.events, self._scorer, drawn, step, epoch)
            self._charts.log_images(drawn, step, epoch)
        except Exception as error:
            give_up("the previews", error)
        finally:
            release_memory(run.options.memory.highvram)
        return is_complete

    def _draw_one(
        self, event: str, step: int, epoch: int, index: int, vae: nn.Module, goes_on: Callable[[], bool]
    ) -> list[Drawn]:
        """Draw and write one image. Return it in a list, which is empty if that fails or the run is interrupted."""
        run, prompt = self._run, self._prompts[index]
        # A network of a third party may have a multiplier of its own, so it is set only where the prompt asks for one.
        if prompt.strength != 1:
            run.context.network.set_multiplier(prompt.strength)
        try:
            encoded = self._encoded
            if encoded is None:
                encoded = encode_with_loaded(run.context, [prompt], self._cached)
            generator = seed_generator(prompt, run.context.seed, index)
            latents_BCHW = draw_latents(run.context, prompt, encoded, generator, goes_on, vae)
            if latents_BCHW is None:
                return []
            image = decode(run.context, vae, latents_BCHW, self._vae_fallback)
            drawn = Drawn(index, prompt, show_with_references(prompt, image, run.context.arch.codec.spec))
            path = write_preview(image_path(run.options.saving, event, index, prompt.seed), drawn)
            with tqdm.external_write_mode():
                logger.info("preview %d: %s", index, path)
            if run.events.is_on:
                run.events.emit(build_preview_event(drawn, path, step, epoch))
            return [drawn]
        except Exception as error:
            give_up(f"preview {index} ({prompt.text})", error)
            return []
        finally:
            if prompt.strength != 1:
                run.context.network.set_multiplier(1.0)


def report_strengths(events: Events, drawn: Sequence[Drawn], step: int, epoch: int) -> None:
    """Log how the images of each prompt respond to its strengths, if it has several."""
    for strip in group_strips(drawn):
        prompt = strip[0].prompt
        response = measure_response(
            [preview.prompt.strength for preview in strip], [preview.image for preview in strip]
        )
        strengths = ", ".join(f"{strength:g}" for strength in response.strengths)
        logger.info(
            "%s: rank correlation of strength and change %.2f, strengths %s",
            prompt.text,
            response.correlation,
            strengths,
        )
        correlation = response.correlation if isfinite(response.correlation) else None
        events.emit(Strengths(step, epoch, prompt.text, prompt.seed, response.strengths, response.changes, correlation))


def report_scores(events: Events, scorer: Scorer, drawn: Sequence[Drawn], step: int, epoch: int) -> None:
    """Log and emit the scores of the images at strength 1, the strength of the saved file."""
    saved = [preview for preview in drawn if preview.prompt.strength == 1]
    if saved:
        scores = scorer.score(list(map(crop_references, saved)), [preview.prompt.text for preview in saved])
        logger.info("previews of step %d: %s", step, format_means(scores))
        events.emit(Scores(step, epoch, scores))


def crop_references(preview: Drawn) -> Image.Image:
    """Return a preview without the reference images on its left."""
    left = preview.image.width - preview.prompt.width if preview.prompt.reference_paths else 0
    return preview.image.crop((left, 0, *preview.image.size))


def group_strips(drawn: Sequence[Drawn]) -> Iterator[list[Drawn]]:
    """Yield groups of images that differ only in strength, if large enough to compare."""
    groups = defaultdict[Prompt, list[Drawn]](list)
    for preview in drawn:
        groups[replace(preview.prompt, strength=1.0)].append(preview)
    for group in groups.values():
        if len({preview.prompt.strength for preview in group}) >= FEWEST:
            yield group


def step_event(step: int) -> str:
    """Return the part of a file name that identifies the step."""
    return f"{step:06d}"


def epoch_event(epoch: int) -> str:
    """Return the part of a file name that identifies the epoch; epoch 0 is before training."""
    return f"e{epoch:06d}"


def give_up(task: str, error: Exception) -> None:
    """Log why something was not drawn. Raises a debugger's quit again, which ends the run."""
    if isinstance(error, BdbQuit):
        raise error
    with tqdm.external_write_mode():
        logger.error("%s failed, training continues: %s: %s", task, type(error).__name__, error)
    logger.debug("where it failed:", exc_info=error)

"""The time of a whole run as a clock shows it: loading, caching, training, previews, validation and what is drawn at
the end."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.memory.planner.prediction import MemoryMode, apply_mode, pass_work
from library.memory.planner.speed import Work
from library.options.output.prompts import PromptSpec
from library.protocols import Architecture
from library.training.evaluation.preview import PreviewSchedule, read_wanted_prompts
from library.training.evaluation.prompts import resolve
from library.training.evaluation.validation_loss import NUM_LEVELS
from library.training.planning.fit import Fit
from library.types import Prompt

# Assumptions, which benchmarks/run_duration.py compares with a clock.
START_S = 2.5  # of a process that loads models of no size
READ_BYTES_PER_S = 1e9  # an SSD's, or less than that of a file in memory
DECODE_S = 0.03  # of a photo's file
STEP_S = 0.03  # of a step besides its passes: the optimizer, the batch, what is reported
SAVE_S = 0.2  # of a file


@dataclass(frozen=True)
class RunDuration:
    """The seconds of a run's parts."""

    loading: float
    caching: float
    step: float
    num_steps: int
    previews: float
    validation: float
    saving: float
    sheets: float
    class_images: float = 0.0  # that the base draws first, with the models loaded for it

    @property
    def parts(self) -> Mapping[str, float]:
        names = ("loading", "caching", "previews", "validation", "saving", "sheets")
        parts = {"training": self.num_steps * self.step, **{name: getattr(self, name) for name in names}}
        return parts | {"class images": self.class_images}

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def seconds_left(self, step: int, step_s: float) -> float:
        """Return what is left after `step`, whose steps were measured to take `step_s`."""
        share = 1 - step / self.num_steps
        between = self.previews + self.validation + self.saving
        return share * (self.num_steps * step_s + between) + self.sheets


def predict_duration(
    fit: Fit, arch: Architecture, num_photos: int, num_rows: int, num_class_images: int = 0
) -> RunDuration | None:
    """Predict the parts of a run; None if nothing fits. `num_rows` are the times that the prompts are drawn for the
    sheets at the end, after the models have been loaded again."""
    counted, gpu, chosen, options = fit.counted, fit.choice.gpu, fit.choice.chosen, fit.options
    if chosen is None:
        return None
    run, batch, steps = options.run, counted.batch, options.run.max_train_steps
    forward, _ = pass_work(apply_mode(counted.step, MemoryMode()))
    # A call for one image launches as many kernels as one for a batch.
    launching_s = Work(launches=forward.launches).seconds(gpu, 1.0)
    arithmetic_s = (forward.seconds(gpu, 1.0) - launching_s) / batch.count
    pixels = batch.width * batch.height
    decoding_s = 0.0 if counted.preview is None else counted.preview.work.seconds(gpu, 1.0)

    def image_s(prompt: Prompt) -> float:
        num_predictions = prompt.num_steps * (2 if prompt.scale > 1 else 1)
        prediction_s = arithmetic_s * prompt.width * prompt.height / pixels + launching_s
        return num_predictions * prediction_s + decoding_s

    class_prompt = resolve(PromptSpec("", "", width=batch.width, height=batch.height), arch.preview.defaults)
    round_s = sum(map(image_s, read_wanted_prompts(options.preview, arch)))
    schedule = PreviewSchedule.build(options.preview)
    num_rounds = schedule.at_first + count_times(steps, schedule.every_n_steps)
    num_held_out = round(num_photos * options.validation.validation_split)
    num_validations = count_times(steps, options.validation.validate_every_n_steps) if num_held_out else 0
    loading_s = START_S + (chosen.weight_bytes + sum(stage.weights for stage in counted.stages)) / READ_BYTES_PER_S
    return RunDuration(
        loading=loading_s,
        caching=(num_photos + num_class_images)
        * (DECODE_S + sum(stage.work.seconds(gpu, 1.0) for stage in counted.stages)),
        step=run.gradient_accumulation_steps * chosen.seconds + STEP_S,
        num_steps=steps,
        previews=num_rounds * round_s,
        validation=num_validations * num_held_out * NUM_LEVELS * (arithmetic_s + launching_s),
        saving=(1 + count_times(steps, options.saving.save_every_n_steps)) * SAVE_S,
        sheets=num_rows * round_s + (loading_s if num_rows else 0.0),
        class_images=num_class_images * image_s(class_prompt) + loading_s if num_class_images else 0.0,
    )


def count_times(num_steps: int, every: int | None) -> int:
    return num_steps // every if every else 0

"""The plan of a run: its options, resolved, with the steps, the time and the memory that they take."""

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from library.base.atomic_files import atomic_path
from library.base.errors import about
from library.checkpoints.marks import TRAIN_PY, seal_text
from library.checkpoints.overwriting import sealed
from library.data.description.captions import caption_variant
from library.data.plan.audit import MOST_ENLARGED
from library.data.plan.audit_findings import Finding, collect_findings, find_file_kinds, make_finding
from library.data.plan.data_plan import DataPlan
from library.memory.devices import DTYPES
from library.memory.planner.measured import benchmark_gpu
from library.options.model import TRAINING_ADAPTER, ModelFile
from library.options.train import TrainOptions
from library.processes.process_group import ALONE
from library.protocols import Architecture
from library.train_photos.base import Base, Predicted, find_prediction, measure_losses
from library.train_photos.parts import find_parts, find_training_adapter
from library.train_photos.photos import Photo, PhotoFolder, Trigger
from library.training.command_line.checks import check
from library.training.command_line.cli import parse
from library.training.command_line.recipes import FOLDER, Recipe
from library.training.config_file import format_config
from library.training.evaluation.choice import MIN_IMAGES
from library.training.models.opening import native_sides, open_data_plan
from library.training.models.preflight import mute_logging
from library.training.models.requests import RequestedRun
from library.training.planning.fit import Fit, fit_to
from library.training.planning.fit_run import count_adapter_run, fit_run, largest_batch
from library.training.planning.run_duration import RunDuration, predict_duration
from library.training.saving.names import Names
from library.training.saving.state import StateManifest, newest_state
from tools.contact_sheet import find_device
from tools.recipes import interpolate_steps

TEXT_KIND = sealed("a file that train.py wrote, unchanged", TRAIN_PY)
OUTPUT = Path("output")  # default folder of all runs
SIDE_STEP = 64
SMALLEST_BUCKET = 256  # the scripts' own
SET_ASIDE, MOST_SET_ASIDE = 0.1, 50  # a share, and a number of photos
NUM_FILES = 8  # that a run saves, to choose from
FEWEST_STEPS = 25  # between two files
FEWEST_BATCHES = 4  # of an epoch
REFUSED_ADAPTER = (TRAINING_ADAPTER, "none")
MINUTES = 10  # of work that a crash may cost
PLANNED = ("fit", "fit_formats")  # resolved before the run
NUM_SHEET_FILES, NUM_STRENGTHS = 5, 3  # rows of the sheets at the end, besides strength 1 of the last file
SMALL_PRODUCT = 1024  # side of the matrices that measure a CPU


@dataclass(frozen=True)
class RunOrder:
    """The photos, the base and the options that a run is asked for."""

    args: Namespace  # the options of train.py
    base: Base
    recipe: Recipe
    folders: Sequence[PhotoFolder]
    trigger: Trigger
    side: int  # of the images that are trained
    given: Mapping[str, Any] = field(default_factory=dict)  # typed options of the script, which override all others

    @property
    def photos(self) -> list[Photo]:
        return [photo for folder in self.folders for photo in folder.photos]


@dataclass(frozen=True)
class Files:
    """The files of a run, in one folder."""

    folder: Path
    name: str

    @property
    def config(self) -> Path:
        return self.folder / f"{self.name}.toml"

    @property
    def dataset(self) -> Path:
        return self.folder / f"{self.name}-dataset.toml"

    @property
    def prompts(self) -> Path:
        return self.folder / f"{self.name}-prompts.txt"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def texts(self) -> tuple[Path, ...]:
        return self.config, self.dataset, self.prompts

    @property
    def names(self) -> Names:
        """The names of the files that training saves."""
        return Names(self.folder, self.name, "safetensors")

    @property
    def adapter(self) -> Path:
        return self.names.of_end()

    def find_state(self) -> StateManifest | None:
        """Return the newest undamaged state; the log names damaged ones."""
        return newest_state(self.folder, (self.name,))


@dataclass(frozen=True)
class RunTexts:
    """The content of a run's files, as values that JSON can hold."""

    script: str
    values: Mapping[str, Any]  # options of the script
    dataset: Mapping[str, Any]  # content of the dataset file
    prompts: str  # content of the prompts file

    def write(self, files: Files, head: str = "") -> None:
        """Write the dataset, the prompts, and last the options of the run, with the comment `head` above them."""
        paths = {"dataset_config": files.dataset, "sample_prompts": files.prompts, "output_dir": files.folder}
        paths["cache_dir"] = files.folder / "cache"  # nothing goes into the photos' folders
        named = {name: str(path.absolute()) for name, path in paths.items()}
        values = {**self.values, **named, "output_name": files.name}
        # The comment tells people and tools/run_queue.py which script trains with the file.
        options = f"# Options of {self.script}.\n{head}{format_config(values)}"
        texts = {files.dataset: format_config(self.dataset), files.prompts: self.prompts, files.config: options}
        for path, text in texts.items():
            with atomic_path(path) as unfinished:
                unfinished.write_text(seal_text(TRAIN_PY, text), encoding="utf-8", newline="\n")


@dataclass(frozen=True)
class Plan:
    """A run before its start."""

    order: RunOrder
    values: Mapping[str, Any]  # options of the base model's script
    prompts: str = ""  # content of the prompts file
    predicted: Predicted | None = None
    fit: Fit | None = None  # None if the time and the memory are not known
    captions: Sequence[str] = ()  # as trained, one for each photo
    num_repeats: int = 1  # of each photo in an epoch
    draws_per_step: float = 0.0  # of photos; 0 if unknown
    missing: ModelFile | None = None  # the training adapter of a distilled base, which is not there
    findings: Sequence[Finding] = ()  # about the photos
    duration: RunDuration | None = None

    def with_options(self, values: Mapping[str, Any]) -> "Plan":
        """Return the plan with more options, which replace none that the user gave."""
        given = {name: value for name, value in self.order.given.items() if (name, value) != REFUSED_ADAPTER}
        return replace(self, values={**self.values, **values, **given})

    @property
    def times_seen(self) -> float:
        """How often each photo is trained on; 0 if unknown."""
        num_trained = len(self.order.photos) * (1 - self.values.get("validation_split", 0.0))
        return float(self.values["max_train_steps"] * self.draws_per_step / num_trained) if num_trained else 0.0

    @property
    def texts(self) -> RunTexts:
        """The content of the run's files."""
        order = self.order
        subsets = [f.describe(order.trigger, self.num_repeats) for f in order.folders if f.photos]
        if order.args.class_images:
            subsets += [{"is_reg": True, "prompt": order.trigger.subject, "num": order.args.class_images}]
        return RunTexts(order.base.spec.script, self.values, {"datasets": [{"subsets": subsets}]}, self.prompts)


def read_options(base: Base, files: Files) -> TrainOptions:
    """Return the options of NAME.toml as the base model's script reads them. Raises UserError for what it refuses."""
    parser = base.make_parser()
    parser.raises_errors = True
    return base.spec.options.from_args(parse(parser, ["--config_file", str(files.config)]))


def make_plan(order: RunOrder, scratch: Files) -> Plan:
    """Resolve every option of a run, with temporary files. Raises UserError for what the user has to decide."""
    args, base, recipe, given = order.args, order.base, order.recipe, order.given
    usual, side, num_photos = {**recipe.values, **given}, order.side, len(order.photos)
    missing, adapter = find_training_adapter(base, given, args.models)
    plan = Plan(
        order,
        choose_values(recipe, side, num_photos, args.steps or interpolate_steps(recipe.steps, num_photos)),
        write_prompts(recipe, order.trigger, side),
        num_repeats=given.get("dataset_repeats") or choose_repeats(usual["train_batch_size"], num_photos),
        missing=None if adapter else missing,
        findings=find_problems(order.photos, side, bool(base.spec.latents.has_alpha or given.get("alpha_mask"))),
    ).with_options({**base.values, **({} if adapter is None else {TRAINING_ADAPTER: str(adapter)})})
    with mute_logging():  # the run itself logs the same
        plan.texts.write(scratch)
        options = read_options(base, scratch)
        plan, options = add_values(plan, options, find_parts(base, options, args.models))
        check(options)
        arch = base.spec.build(options)
        predicted = find_prediction(base, arch, args.prediction, partial(measure_losses, base, options))
        if predicted is not None:
            plan, options = add_values(replace(plan, predicted=predicted), options, predicted.values)
            arch = base.spec.build(options)
        plan = with_fit(plan, options, arch, usual.get("fit_formats"))
    return plan if args.minutes is None else limit_time(plan, args.minutes)


def add_values(plan: Plan, options: TrainOptions, values: Mapping[str, Any]) -> tuple[Plan, TrainOptions]:
    """Return the plan and its options with more values; those that the user gave win."""
    plan = plan.with_options(values)
    return plan, options.with_values({name: plan.values[name] for name in values})


def choose_repeats(batch_size: int, num_photos: int) -> int:
    """Return the repeats with which an epoch has a few batches: fewer photos would not fill them."""
    return max(1, -(-FEWEST_BATCHES * batch_size // num_photos))


def find_problems(photos: Sequence[Photo], side: int, uses_alpha: bool) -> list[Finding]:
    """Return what the audit finds in the photos that are trained, with short names."""
    measured, trained = [photo.measures for photo in photos], {photo.measures.path for photo in photos}
    found = [*collect_findings(measured, trained), *find_file_kinds(measured, trained if uses_alpha else set())]
    small = [photo.measures for photo in photos if MOST_ENLARGED * photo.side < side]
    enlarged = [(image.path, "{}x{}".format(*image.size)) for image in small]
    found += make_finding(enlarged, f"{{}} upscaled more than {MOST_ENLARGED}x; the LoRA may learn blur")
    return [finding.with_paths(lambda path: Path(path).name) for finding in found]


def choose_side(base: Base, usual: Mapping[str, Any], given: Mapping[str, Any], folders: Sequence[PhotoFolder]) -> int:
    """Return the side to train at: as given, else the recipe's `usual` one, or less if the base states less or photos
    have less than half."""
    side = int(str({**usual, **given}["resolution"]).partition(",")[0])
    if "resolution" in given:
        return side
    # The VAE of a folder without a U-Net states the size of its own training.
    stated = native_sides({}, str(base.path))[:1] if (base.path / "unet").is_dir() else []
    sides = [photo.side for folder in folders for photo in folder.photos]
    if sides and median(sides) < side / 2:
        stated.append(max(SIDE_STEP, int(median(sides)) // SIDE_STEP * SIDE_STEP))
    return min([side, *stated])


def choose_values(recipe: Recipe, side: int, num_photos: int, steps: int) -> dict[str, Any]:
    """Return a run's options that do not depend on the base's files: the recipe's, for this size and length."""
    values = {name: value for name, value in recipe.values.items() if name not in PLANNED}
    return {
        **values,
        **choose_precision(values["mixed_precision"]),
        "resolution": f"{side},{side}",
        "max_bucket_reso": 2 * side,
        **({"min_bucket_reso": max(SIDE_STEP, side // 2)} if side < 2 * SMALLEST_BUCKET else {}),
        **choose_length(steps, num_photos),
        "save_state_on_train_end": True,
        "save_every_n_minutes": MINUTES,
    }


def choose_length(steps: int, num_photos: int) -> dict[str, Any]:
    """Return the options of a run's length and of its files; photos are set aside to measure each file on, if there are
    enough for a choice."""
    most = max(1, min(NUM_FILES, steps // FEWEST_STEPS))
    # If possible, so that the last file has previews too.
    even = (number for number in range(most, most // 2, -1) if steps % number == 0)
    every = -(-steps // next(even, most))
    values = {"max_train_steps": steps, "save_every_n_steps": every, "sample_every_n_steps": every}
    if round(num_photos * SET_ASIDE) < MIN_IMAGES:
        return values
    share = min(SET_ASIDE, MOST_SET_ASIDE / num_photos)
    return {**values, "validation_split": share, "validate_every_n_steps": every}


def choose_precision(usual: str) -> dict[str, str]:
    """Return the precision that this machine computes in: GPUs before RTX 30 have no bf16, CPUs only emulate it."""
    device = find_device()
    if device.type == "cpu":
        return {"mixed_precision": "no"}
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return {"mixed_precision": usual if has_bf16 else "fp16"}


def write_prompts(recipe: Recipe, trigger: Trigger, side: int) -> str:
    """Return the recipe's prompts with the trigger, at the size of the training."""
    text = (FOLDER / recipe.values["sample_prompts"]).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    # The subject of a character is the recipe's cat; a style is drawn with it.
    pattern = "mycat" if recipe.name.endswith("_style") else "mycat(, a cat)?"
    replaced = re.sub(pattern, lambda match: trigger.text, "\n".join(lines))
    return re.sub(r"(--[wh]) \d+", rf"\1 {side}", replaced) + "\n"


# --- memory and time ---


def with_fit(plan: Plan, options: TrainOptions, arch: Architecture, formats: list[str] | None) -> Plan:
    """Return the plan with the fastest settings that fit this machine's GPU; elsewhere only its time is predicted."""
    run = RequestedRun.resolve(options, arch)
    data, device = open_data_plan(options, arch, run.text, options.run.seed or 0, 1), find_device()
    draws = data.num_train_images / max(1, data.num_batches) / (2 if plan.order.args.class_images else 1)
    plan = replace(plan, captions=compose_captions(data), draws_per_step=draws)
    if plan.order.base.spec.is_general:
        return plan
    if device.type == "cuda":
        options = replace(options, fit=replace(options.fit, fit="auto", fit_formats=formats))
        fit = fit_run(RequestedRun.resolve(options, arch), data, replace(ALONE, device=device), data)
    else:
        memory_bytes, dtype = psutil.virtual_memory().available, DTYPES[options.precision.mixed_precision]
        gpu = benchmark_gpu(device, memory_bytes, dtype, SMALL_PRODUCT)
        fit = fit_to(count_adapter_run(run, largest_batch(data), device), gpu, num_steps=data.max_train_steps)
    num_files = -(-int(plan.values["max_train_steps"]) // max(1, int(plan.values.get("save_every_n_steps") or 1)))
    num_rows = min(NUM_SHEET_FILES, num_files) + NUM_STRENGTHS
    order = plan.order
    takes = predict_duration(fit, arch, len(order.photos), num_rows, order.args.class_images)
    plan = replace(plan, fit=fit, duration=takes)
    return plan.with_options(fit.values()) if device.type == "cuda" else plan


def compose_captions(data: DataPlan) -> list[str]:
    """Return the caption of each photo as it is trained; of one that varies, a variant."""
    return [
        caption_variant(sample.image.key, sample.image.caption, data.subsets[sample.subset].captions, 0)
        for sample in data.samples
    ]


def limit_time(plan: Plan, minutes: float) -> Plan:
    """Return the plan with as many steps as fit into this time."""
    if plan.duration is None:
        raise about("--minutes")(
            f"{minutes:g}: how long a step of this model takes is not known", "give --steps instead"
        )
    beside = plan.duration.seconds - plan.duration.parts["training"]
    steps = int((60 * minutes - beside) / plan.duration.step)
    if steps < 1:
        raise about("--minutes")(
            f"is {minutes:g}, but loading, previews and sheets take {beside / 60:.1f} alone", "give more, or --steps"
        )
    plan = replace(plan, duration=replace(plan.duration, num_steps=steps))
    return plan.with_options(choose_length(steps, len(plan.order.photos)))

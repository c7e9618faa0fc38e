"""The plan of a run: its options, resolved, with the steps, the time and the memory that they take."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from library.base.errors import UserError
from library.checkpoints.files import atomic_path
from library.checkpoints.marks import seal_text
from library.checkpoints.overwriting import sealed
from library.data.description.captions import caption_variant
from library.data.plan.data_plan import DataPlan
from library.memory.devices import DTYPES
from library.memory.planner.measured import benchmark_gpu
from library.options.train import TrainOptions
from library.processes.process_group import ALONE
from library.protocols import Architecture
from library.train_photos.base import Base, Predicted, Prediction, find_prediction, measure_loss
from library.train_photos.parts import find_parts
from library.train_photos.photos import PhotoFolder, Trigger
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
from tools.contact_sheet import find_device
from tools.recipes import interpolate_steps

HEADER = "# Written by train.py, which replaces it if it runs with the same --name."
TEXT_KIND = sealed("a file that train.py wrote, unchanged", HEADER)
SIDE_STEP = 64
SMALLEST_BUCKET = 256  # the scripts' own
SET_ASIDE = 0.1  # of the photos
NUM_FILES = 8  # that a run saves, to choose from
MINUTES = 10  # of work that a crash may cost
PLANNED = ("fit", "fit_formats")  # resolved before the run
SMALL_PRODUCT = 1024  # side of the matrices that measure a CPU


@dataclass(frozen=True)
class Wishes:
    """The options of train.py."""

    trigger: Trigger
    steps: int | None
    minutes: float | None
    models: Path | None
    prediction: Prediction | None
    given: Mapping[str, Any] = field(default_factory=dict)  # options of the base model's script


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
    def texts(self) -> tuple[Path, ...]:
        return self.config, self.dataset, self.prompts

    @property
    def adapter(self) -> Path:
        return self.folder / f"{self.name}.safetensors"


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
                unfinished.write_text(seal_text(HEADER, text), encoding="utf-8", newline="\n")


@dataclass(frozen=True)
class Plan:
    """A run before its start."""

    base: Base
    recipe: Recipe
    folders: Sequence[PhotoFolder]
    trigger: Trigger
    values: Mapping[str, Any]  # options of the base model's script
    prompts: str  # content of the prompts file
    predicted: Predicted | None
    fit: Fit | None  # None if the time and the memory are not known
    given: Mapping[str, Any] = field(default_factory=dict)  # typed options of the script, which override all others
    captions: Sequence[str] = ()  # as trained, one for each photo

    def with_values(self, values: Mapping[str, Any]) -> "Plan":
        """Return the plan with more options, which replace none that the user gave."""
        return replace(self, values={**self.values, **values, **self.given})

    @property
    def num_photos(self) -> int:
        return sum(len(folder.photos) for folder in self.folders)

    @property
    def texts(self) -> "RunTexts":
        """The content of the run's files."""
        dataset = {"datasets": [{"subsets": [f.describe(self.trigger) for f in self.folders if f.photos]}]}
        return RunTexts(self.base.spec.script, self.values, dataset, self.prompts)

    def read(self, files: Files) -> TrainOptions:
        """Write the files, and return the options as the base model's script reads them."""
        self.texts.write(files)
        return read_options(self.base, files)


def read_options(base: Base, files: Files) -> TrainOptions:
    """Return the options of NAME.toml as the base model's script reads them."""
    parser = import_module(base.spec.script.removesuffix(".py")).setup_parser()
    return base.spec.options.from_args(parse(parser, ["--config_file", str(files.config)]))


def make_plan(base: Base, recipe: Recipe, folders: Sequence[PhotoFolder], wishes: Wishes, scratch: Files) -> Plan:
    """Resolve every option of a run, with temporary files. Raises UserError for what the user has to decide."""
    recipe = replace(recipe, values={**recipe.values, **wishes.given})
    side, trigger, num_photos = choose_side(base, recipe, folders), wishes.trigger, sum(len(f.photos) for f in folders)
    steps = wishes.steps or interpolate_steps(recipe.steps, num_photos)
    prompts = write_prompts(recipe, trigger, side)
    plan = Plan(base, recipe, folders, trigger, {}, prompts, None, None, wishes.given)
    plan = plan.with_values({**choose_values(recipe, side, num_photos, steps), **base.values})
    with mute_logging():  # the run itself logs the same
        options = plan.read(scratch)
        plan = plan.with_values(find_parts(base, options, wishes.models))
        options = plan.read(scratch)
        check(options)
        arch = base.spec.build(options)
        predicted = find_prediction(base, arch, wishes.prediction, partial(measure_loss, base, options))
        if predicted is not None:
            plan = replace(plan, predicted=predicted).with_values(predicted.values)
            options = plan.read(scratch)
            arch = base.spec.build(options)
        plan = with_fit(plan, options, arch, recipe.values.get("fit_formats"))
    return plan if wishes.minutes is None else limit_time(plan, wishes.minutes)


def choose_side(base: Base, recipe: Recipe, folders: Sequence[PhotoFolder]) -> int:
    """Return the side to train at: the recipe's, or less if the base states less or photos have less than half."""
    side = int(recipe.values["resolution"].partition(",")[0])
    # The VAE of a folder without a U-Net states the size of its own training.
    stated = native_sides({}, str(base.path))[:1] if (base.path / "unet").is_dir() else []
    photo_side = median(folder.median_side for folder in folders for _ in folder.photos)
    if photo_side < side / 2:
        stated.append(max(SIDE_STEP, int(photo_side) // SIDE_STEP * SIDE_STEP))
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
    every = -(-steps // NUM_FILES)
    values = {"max_train_steps": steps, "save_every_n_steps": every, "sample_every_n_steps": every}
    if round(num_photos * SET_ASIDE) < MIN_IMAGES:
        return values
    return {**values, "validation_split": SET_ASIDE, "validate_every_n_steps": every}


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


def with_fit(plan: Plan, options: TrainOptions, arch: Architecture, formats: Sequence[str] | None) -> Plan:
    """Return the plan with the fastest settings that fit this machine's GPU; elsewhere only its time is predicted."""
    run = RequestedRun.resolve(options, arch)
    data, device = open_data_plan(options, arch, run.text, options.run.seed or 0, 1), find_device()
    plan = replace(plan, captions=compose_captions(data))
    if plan.base.spec.is_general:
        return plan
    if device.type == "cuda":
        options = options.with_values({"fit": "auto", "fit_formats": formats})
        fit = fit_run(RequestedRun.resolve(options, arch), data, replace(ALONE, device=device), data)
        return replace(plan, fit=fit).with_values(fit.values())
    gpu = benchmark_gpu(
        device, psutil.virtual_memory().available, DTYPES[options.precision.mixed_precision], SMALL_PRODUCT
    )
    counted = count_adapter_run(run, largest_batch(data), device)
    return replace(plan, fit=fit_to(counted, gpu, num_steps=data.max_train_steps))


def compose_captions(data: DataPlan) -> list[str]:
    """Return the caption of each photo as it is trained; of one that varies, a variant."""
    return [
        caption_variant(sample.image.key, sample.image.caption, data.subsets[sample.subset].captions, 0)
        for sample in data.samples
    ]


def limit_time(plan: Plan, minutes: float) -> Plan:
    """Return the plan with as many steps as fit into this time."""
    if plan.fit is None or plan.fit.choice.chosen is None:
        raise UserError.about(
            "--minutes", f"{minutes:g}: how long a step of this model takes is not known; give --steps instead"
        )
    steps = max(1, int(60 * minutes / plan.fit.choice.chosen.seconds))
    return plan.with_values(choose_length(steps, plan.num_photos))

"""Checks of the options by themselves. Scripts make them before they import torch, which takes seconds."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from library.base.errors import NoDataFound, NotThere, UserError, about, error_in
from library.base.suggestions import nearby
from library.data.concepts.prompts_file import FLAG as PROMPTS_FLAG
from library.data.concepts.prompts_file import read_prompt_pairs
from library.options.base import Options
from library.options.dataset import FOLDER_FLAGS
from library.options.declared import PathKind
from library.options.leco import list_ignored_by_leco, list_refused_by_leco
from library.options.model import BASE
from library.options.no_effect import explain_unused, is_requested, is_set
from library.options.ranges import check_ranges
from library.options.requirements import check_requirements, unsupported
from library.options.train import TrainOptions
from library.options.training.concepts import ConceptOptions
from library.options.training.network import NetworkOptions
from library.options.training.noise import NoiseOptions

IMAGES = "train_data_dir"
MODEL_FILES = (".safetensors", ".sft", ".ckpt")
# The lookbehind keeps the search linear: without it every letter of a long word begins a scheme.
PASSWORD = re.compile(r"(?P<scheme>(?<!\w)\w+://)[^\s/@:]*:[^\s/@]+@(?P<host>[^\s/]*)")


def check_options(options: TrainOptions) -> None:
    """Raise UserError naming every unsupported flag, else the first mistake that the options alone show."""
    check_data(options)
    # A look at the data needs no base model and writes no adapter.
    if not options.dataset.only_looks:
        check_required(
            options.model.pretrained_model_name_or_path, options.network.network_module, options.saving.output_dir
        )
    check_multipliers(options.network)
    check_timesteps(options.noise)


def check_data(options: TrainOptions) -> None:
    """Raise UserError for mistakes that matter even if images are only encoded."""
    check_values(options)
    low, high = options.dataset.min_bucket_reso, options.dataset.max_bucket_reso
    if options.dataset.enable_bucket and low > high:
        raise about("--min_bucket_reso", cause="does not fit", others=["--max_bucket_reso"])(
            f"is {low}, above --max_bucket_reso {high}", "swap them"
        )
    if options.concepts is not None:
        check_concepts(options, options.concepts)
        return
    dataset = options.dataset
    if dataset.dataset_config is None and dataset.dataset_class is None:
        if not dataset.train_data_dir:
            raise error_in("--dataset_config", others=["--train_data_dir"], cause="missing")(
                "no images are named", "give --dataset_config with a TOML file, or --train_data_dir with a folder"
            )
        if not dataset.resolution:
            raise about("--resolution", cause="missing")(
                "is not set", "give the training size with it, such as 512 or 512,768"
            )


def check_concepts(options: Options, concepts: ConceptOptions) -> None:
    """Raise UserError for options that need images, and for mistakes in the prompts file."""
    values = options.flat()
    for name, why in list_refused_by_leco(type(options)).items():
        if is_requested(values[name]):
            raise about(f"--{name}", cause="does not fit")(f"does not work with {PROMPTS_FLAG}: {why}")
    if not concepts.prompts_file:
        raise about(PROMPTS_FLAG, cause="missing")("is not set", "give the TOML file with the prompts that are trained")
    read_prompt_pairs(Path(concepts.prompts_file), warn=ignore_message)


def ignore_message(*message: object) -> None:
    """Say nothing: the run warns of the same where it opens the file."""


def check_values(options: Options) -> None:
    """Raise UserError for values, paths and combinations that the options' declarations do not allow."""
    missing = unsupported(options)
    if missing:
        raise error_in(next(iter(missing)), others=[*missing][1:])("\n".join(missing.values()))
    refuse_passwords(options)
    check_ranges(options)
    check_choices(options)
    check_requirements(options)
    check_paths(options)


def check_paths(options: Options) -> None:
    """Raise UserError for the first path that does not exist, naming the nearest one, or is of another kind."""
    for name, kind, text in list_read_paths(options):
        path = os.path.expanduser(text)
        if not os.path.exists(path):
            hint = nearby(Path(path), is_folder=kind == "folder")
            error = NotThere if kind in ("part", "model") else NoDataFound if name == IMAGES else UserError
            reason = f"does not exist{hint or '; correct the path, or leave it out'}"
            raise about(f"--{name}", text, cause="missing", kind=error)(reason)
        found = "folder" if os.path.isdir(path) else "file"
        if found not in kind and kind not in ("part", "model"):
            raise about(f"--{name}", text)(f"is a {found}", f"name a {kind}")


def list_read_paths(options: Options) -> Iterator[tuple[str, PathKind, str]]:
    """Yield (option, kind, path) of every file and folder that the run reads."""
    values, defaults = options.flat(), type(options).defaults()
    # The config file has been read, and its ending may be left out; a strength may follow a training adapter.
    unread = {"config_file", "training_adapter"}
    if values["dataset_config"] or values["dataset_class"]:
        unread |= {*FOLDER_FLAGS}
    if values["resume_from_huggingface"]:
        unread |= {"resume"}
    if "prompts_file" in values:
        unread |= {*list_ignored_by_leco(type(options))}
    # A part of the base model may be missing once all its outputs are cached.
    is_cached = values["cache_latents_to_disk"] or values.get("cache_text_encoder_outputs_to_disk")
    looks = any(values.get(name) for name in ("debug_dataset", "audit_only", "show_timesteps"))
    for name, declared in type(options).declarations().items():
        value, kind = values[name], declared.path
        # A model may be a name on the hub unless it is called like a file.
        if kind is None or kind in ("new file", "new folder"):
            continue
        if kind == "model" and not str(value).lower().endswith(MODEL_FILES):
            continue
        if kind in ("part", "model") and (looks if name == BASE else is_cached):
            continue
        if name in unread or not is_set(value, defaults[name]) or explain_unused(declared, values, defaults):
            continue
        for text in value if isinstance(value, list) else [value]:
            yield name, kind, str(text)


def refuse_passwords(options: Options) -> None:
    """Raise UserError for a URL with a password, because log, events, report and metadata store options."""
    for name, value in options.flat().items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (match := PASSWORD.search(text)):
                raise about(f"--{name}")(
                    f"has a URL with a password, {match['scheme']}…@{match['host']}, which logs and files would keep. "
                    "No option takes one",
                    "give a file or a folder",
                )


def check_choices(options: Options) -> None:
    """Raise UserError for a value outside an option's choices, as a config file may contain."""
    values = options.flat()
    for name, declared in type(options).declarations().items():
        value, choices = values[name], declared.choices
        if choices is None or declared.takes_other_values or not is_set(value, declared.default):
            continue
        if not all(item in choices for item in (value if isinstance(value, list) else [value])):
            known = ", ".join(str(choice) for choice in choices if choice is not None)
            raise about(f"--{name}")(f"is {value!r}", f"use one of {known}")


def check_required(base_model: str | None, network_module: str | None, output_dir: str | None) -> None:
    """Raise UserError if the model, the network module or the output folder is missing."""
    if not base_model:
        raise about("--pretrained_model_name_or_path", cause="missing")(
            "is not set", "give the base model's file, folder or hub name"
        )
    if not network_module:
        raise about("--network_module", cause="missing")("is not set; networks.lora trains a LoRA")
    if not output_dir:
        raise about("--output_dir", cause="missing")("is not set", "give the folder that the trained weights go to")


def check_multipliers(network: NetworkOptions) -> None:
    """Raise UserError if there are more multipliers than files."""
    factors, files = network.base_weights_multiplier or [], network.base_weights or []
    if files and len(factors) > len(files):
        raise about("--base_weights_multiplier")(
            f"has {len(factors)} values for {len(files)} --base_weights", "give one for each file"
        )


def check_timesteps(noise: NoiseOptions) -> None:
    """Raise UserError if the lowest timestep exceeds the highest."""
    low, high = noise.min_timestep or 0, 1000 if noise.max_timestep is None else noise.max_timestep
    if low > high:
        raise about("--min_timestep", cause="does not fit", others=["--max_timestep"])(
            f"{low} is above --max_timestep {high}; the same value for both trains one level"
        )

"""Checks of the options before anything is loaded: contradictions, missing values, and options without effect."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath

import torch

from library.base.errors import about
from library.checkpoints.files import file_in_folder
from library.checkpoints.folders import ADDED_TO_NAMES, LONGEST_ON_WINDOWS
from library.checkpoints.metadata import modelspec_resolution, thumbnail_url
from library.checkpoints.recognition import keys_of_text_encoders
from library.memory.codecs.weight_format import load_format
from library.memory.planner.gpus import parse_size
from library.options.base import Options
from library.options.kinds import read_value
from library.options.leco import list_ignored_by_leco
from library.options.machine.base_formats import BASE_FORMATS
from library.options.machine.compiling import CompileOptions
from library.options.machine.memory import PrecisionOptions
from library.options.model import ModelOptions
from library.options.no_effect import find_unused
from library.options.output.preview import PreviewOptions
from library.options.output.prompts import SAMPLER, read_prompts
from library.options.train import TrainOptions
from library.options.training.network import NetworkOptions
from library.training.command_line import doubtful
from library.training.command_line.option_checks import check_options
from library.training.command_line.targets import check_targets
from library.training.evaluation.preview import PreviewSchedule
from library.training.models.frozen_adapters import TRAINING_ADAPTER, parse_adapter
from library.training.models.weight_formats import check_format
from library.training.optimization.optimizers import class_path, import_class, resolve_optimizer_type
from library.training.reporting.trackers import read_tracker_config, tracker_kind
from library.training.saving.names import Names, state_folder

logger = logging.getLogger(__name__)

FILE_OF_STATE = f".training.{'0' * 12}.safetensors"  # while it is written
SQUARES_IN_DTYPE_OF_WEIGHTS = (
    "torch.optim.Adam", "torch.optim.NAdam", "torch.optim.RAdam", "torch.optim.RMSprop", "prodigyopt.",
    "schedulefree.AdamW", "schedulefree.RAdam",
)  # fmt: skip


def check(options: TrainOptions) -> None:
    """Raise UserError naming every unsupported flag, else the first contradiction, with what to do."""
    check_options(options)  # values first: the other checks read them
    check_output(options)
    check_precision(options.precision, options.network, options.dataset.only_looks)
    if options.precision.full_fp16:
        check_full_fp16(resolve_optimizer_type(options.optimizer))
    check_class_packages(options)
    if not options.dataset.only_looks:
        check_format(options.precision.denoiser_format)
    if options.network.training_adapter:
        check_training_adapter(options.network.training_adapter, options.network.base_weights or [])
    if options.fit.fit not in (None, "auto"):
        parse_size("--fit", str(options.fit.fit))
    check_compiling(options.compiling)
    check_previews(options.preview)
    if tracker_kind(options.trackers) is not None:
        read_tracker_config(options.trackers.log_tracker_config)


def check_class_packages(options: TrainOptions) -> None:
    """Raise UserError for several optimizers, an unknown one, and a class that cannot be imported."""
    optimizer_type = resolve_optimizer_type(options.optimizer)
    if options.dataset.only_looks:
        return
    import_class(class_path(optimizer_type)[0], "--optimizer_type", optimizer_type)
    others = {
        "--lr_scheduler_type": options.schedule.lr_scheduler_type,
        "--dataset_class": options.dataset.dataset_class,
    }
    for flag, path in others.items():
        if path and "." in path:  # else a class of torch
            import_class(path, flag, path)


def ignored_for_concepts(kind: type[Options], draws_previews: bool) -> Mapping[str, str]:
    """Return the options that have no effect without images, each with the reason."""
    ignored = list_ignored_by_leco(kind)
    if draws_previews:
        return ignored
    return {**ignored, **dict.fromkeys(("vae", "no_half_vae"), "images are neither encoded nor drawn")}


def report_unused(options: TrainOptions, ignores: Mapping[str, str]) -> None:
    """Warn of every given option that has no effect; `ignores` lists those without effect for the base model."""
    if options.concepts is not None:
        ignores = {**ignores, **ignored_for_concepts(type(options), bool(options.preview.sample_prompts))}
    for line in (
        *find_unused(options, ignores),
        *doubtful.find_doubtful_schedule(options.noise, options.model),
        *doubtful.find_doubtful_precision(options.precision),
        *doubtful.find_lost_metadata(options.metadata, options.saving.save_model_as),
        *doubtful.find_doubtful_rates(options.network, options.optimizer),
        *doubtful.find_weak_alpha(options.network, options.optimizer),
    ):
        logger.warning("%s", line)


def check_output(options: TrainOptions) -> None:
    """Raise UserError for output folders and names that cannot be written, or that are inputs."""
    saving = options.saving
    if options.dataset.audit_only and saving.output_dir:
        check_folder("output_dir", Path(saving.output_dir))
    if options.dataset.only_looks:
        return
    for flag, folder in (("output_dir", saving.output_dir), ("logging_dir", options.trackers.logging_dir)):
        if folder:
            check_folder(flag, Path(folder))
    check_output_name(saving.output_name or "")
    # Read now, because a wrong path would otherwise fail at the first save and lose the training.
    thumbnail_url(options.metadata.metadata_thumbnail)
    if options.metadata.metadata_reso:
        modelspec_resolution("metadata_reso", options.metadata.metadata_reso)
    names = Names.build(saving)
    check_lengths(names)
    check_targets(options, names)
    path = names.of_end()
    if path.exists() and not options.state.may_resume and not options.diagnostics.dry_run:
        logger.warning("%s already exists and will be overwritten when the run ends", path)


def check_output_name(name: str) -> None:
    """Raise UserError for a name with folders, because resuming and rotation look only in the output folder."""
    if "/" in name or "\\" in name or PureWindowsPath(name).drive:
        raise about("--output_name")(
            f"{name} holds a path, but all files of a run lie in --output_dir itself",
            f"put the folder into --output_dir and give only a name, such as {PureWindowsPath(name).name or 'my_cat'}",
        )
    if name and not name.strip(". "):
        raise about("--output_name")(f"is {name!r}", "give a name with letters or digits, such as my_cat")


def check_lengths(names: Names) -> None:
    """Raise UserError if file names or paths would exceed the system's limits; a state being written has the
    longest."""
    longest_name, longest_path = path_limits(nearest_folder(names.folder))
    state = state_folder(names.of_step(0)).name
    name_length = path_length(state) + ADDED_TO_NAMES
    if name_length > longest_name:
        raise about("--output_name")(
            f"{names.output_name} is too long: files of the run would have names of {name_length}, but {longest_name} "
            f"are possible, in {'characters' if os.name == 'nt' else 'bytes'}",
            "use a shorter one",
        )
    # The 2 are the separators before the state's folder and before its file.
    length = path_length(os.path.abspath(names.folder)) + name_length + len(FILE_OF_STATE) + 2
    if length > longest_path:
        raise about("--output_dir", names.folder)(
            f": files of the run would have paths of {length} characters, but this system takes {longest_path}",
            "use a shorter --output_dir or --output_name, or on Windows enable long paths (docs/windows.md)",
        )


def path_length(text: str) -> int:
    """Return the length of a path in the system's unit: characters on Windows, else bytes."""
    return len(text) if os.name == "nt" else len(os.fsencode(text))


def path_limits(folder: Path) -> tuple[int, int]:
    """Return the maximum lengths of a name and of a path in a folder."""
    if sys.platform == "win32":
        return 255, 32_000 if has_long_paths() else LONGEST_ON_WINDOWS
    # PATH_MAX counts the terminating null byte.
    return os.pathconf(folder, "PC_NAME_MAX"), os.pathconf(folder, "PC_PATH_MAX") - 1


def has_long_paths() -> bool:
    """Return True if Windows is configured for long paths."""
    if sys.platform != "win32":
        return True
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:  # Windows without that setting
        return False


def nearest_folder(folder: Path) -> Path:
    """Return a folder, or its nearest existing parent."""
    while not os.path.exists(folder) and folder != folder.parent:  # also False for a path that is too long
        folder = folder.parent
    return folder


def check_folder(flag: str, folder: Path) -> None:
    """Raise UserError if a folder is a file, or cannot be created or written to."""
    nearest = nearest_folder(folder)
    if not nearest.is_dir():
        raise about(f"--{flag}", folder)(f": {nearest} is a file, not a folder", "name another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise about(f"--{flag}", folder)(
            f": nothing can be written in {nearest}", "change its permissions or name another place"
        )


def check_precision(precision: PrecisionOptions, network: NetworkOptions, only_looks: bool = False) -> None:
    """Raise UserError for a precision that does not suit the weights or, unless nothing is computed, this machine."""
    check_arithmetic(precision, bool(network.base_weights))
    if precision.mixed_precision == "fp16" and not only_looks and not has_accelerator():
        raise about("--mixed_precision", cause="needs")(
            "fp16 needs a GPU and none is found", "use --mixed_precision bf16 or no on the CPU"
        )


def check_arithmetic(precision: PrecisionOptions, merges: bool) -> None:
    """Raise UserError for 8-bit products if the weights are not stored in 8 bits."""
    if not precision.multiplies_codes:
        return
    name = precision.denoiser_format
    supported = [other for other in BASE_FORMATS if load_format(other).supports_8bit_matmul]
    if name not in (None, *supported):
        raise about("--base_arithmetic", cause="needs")(
            f"8bit multiplies weights that are stored in 8 bits, and --base_format {name} has none",
            f"use --base_format {' or '.join(supported)}, or leave out --base_arithmetic",
        )
    if name is None and merges:
        raise about("--base_arithmetic", cause="needs")(
            "8bit needs weights in 8 bits, and those that --base_weights are merged into are whole again",
            "add --base_format int8_rotated",
        )


def check_full_fp16(optimizer_type: str) -> None:
    """Raise UserError for optimizers that store squared gradients in fp16, whose smallest number is 6e-8."""
    path, _ = class_path(optimizer_type)
    if path.startswith(SQUARES_IN_DTYPE_OF_WEIGHTS):
        raise about("--full_fp16")(
            f"makes {optimizer_type} keep squared gradients in fp16, where they vanish: weights become NaN or jump",
            "leave out --full_fp16, or use --optimizer_type AdamW8bit or Lion",
        )
    if path == "transformers.optimization.Adafactor":
        logger.warning(
            "--full_fp16 rounds the weights after each step, and the steps of Adafactor are so small that many are "
            "lost; leave out --full_fp16"
        )


def check_compiling(compiling: CompileOptions) -> None:
    """Raise UserError for an unknown compiler backend, or a mode that it does not have."""
    if not compiling.is_on:
        return
    from torch._dynamo import list_backends

    flag = "compile_backend" if compiling.compile else "dynamo_backend"
    # By default torch leaves out debug backends such as eager, which the options accept.
    backend, known = getattr(compiling, flag), list_backends(exclude_tags=())
    if backend not in known:
        raise about(f"--{flag}")(
            f"{backend}: this torch has no such compiler", f"use one of {', '.join(sorted(known))}"
        )
    if compiling.compile_mode != "default" and backend != "inductor":
        raise about("--compile_mode")(f"{compiling.compile_mode} is for inductor", f"leave it out for {backend}")


def warn_of_fp16_vae(model: ModelOptions, mixed_precision: str) -> None:
    """Warn of a VAE that is known to overflow in fp16; otherwise only the NaN would show it."""
    if mixed_precision == "fp16" and not model.no_half_vae:
        logger.warning(
            "the VAE of this base model is known to give NaN in fp16; add --no_half_vae unless --vae or the checkpoint "
            "holds one that was made for fp16"
        )


def has_accelerator() -> bool:
    """Return True if torch finds a device other than the CPU."""
    return torch.accelerator.is_available()


def check_training_adapter(text: str, merged: Sequence[str]) -> None:
    """Raise UserError for a training adapter that is merged too, or that changes a text encoder."""
    file, _ = parse_adapter(text, TRAINING_ADAPTER)
    for path in merged:
        if file.samefile(file_in_folder(Path(path), path)):
            raise about(TRAINING_ADAPTER)(
                f"{file} is also a file of --base_weights, so it would act twice",
                "leave it out of --base_weights, which previews keep",
            )
    if keys := keys_of_text_encoders(file):
        raise about(TRAINING_ADAPTER)(
            f"{file} changes a text encoder ({keys[0]} and others), and a training adapter acts on the denoiser alone",
            "merge the file with --base_weights",
        )


def check_previews(preview: PreviewOptions) -> None:
    """Raise UserError if previews are requested and the prompts cannot be read or the sampler is unknown."""
    if not PreviewSchedule.build(preview).is_empty and preview.sample_prompts:
        read_value(preview.sample_sampler, SAMPLER, "--sample_sampler")
        read_prompts(Path(preview.sample_prompts))

"""Convert Stable Diffusion 1.x and 2.x between a single file and a diffusers folder, or change the precision of either.

A target that ends in .safetensors, .ckpt, .pt or .sft is written as a file, one without an extension as a folder. The
type of the input is recognised.
"""

import argparse
import ast
import json
import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import torch
from torch import Tensor
from tqdm import tqdm

from library.architectures.sd import layouts
from library.architectures.sd.load import TITLES, single_file_parts
from library.base.command_parser import make_parser
from library.base.errors import about
from library.base.terminal import print_line
from library.checkpoints import model_lookup
from library.checkpoints.base_files import check_variant
from library.checkpoints.files import load_pickle
from library.checkpoints.folders import atomic_folder
from library.checkpoints.headers import holds_safetensors, is_safetensors
from library.checkpoints.marks import mark_folder, mark_of
from library.checkpoints.saving import save_pickle_state_dict, save_safetensors
from library.checkpoints.weights import Weights
from library.commands.base_models import find_base
from library.commands.command import SUFFIXES, check_output, check_output_folder, command, parse_dtype
from library.memory.devices import SAVE_DTYPES
from library.models.clip.clip import clip_of_folder
from library.models.loading import Component
from library.models.vae.vae import vae_of_checkpoint, vae_of_folder

logger = logging.getLogger(__name__)

SOURCE, TARGET = "model_to_load", "model_to_save"
REFERENCES = {"sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2": "stabilityai/stable-diffusion-2-1"}
COUNTS = ("epoch", "global_step")
WRITER = "tools/convert_stable_diffusion.py"
EXAMPLES = """\
  python3 tools/convert_stable_diffusion.py sd15_folder sd15.safetensors --fp16
  python3 tools/convert_stable_diffusion.py sd15.safetensors sd15_folder --reference_model other_sd15"""


@dataclass(frozen=True)
class Opened:
    """A model opened for conversion."""

    path: Path
    base: str  # "sd1" or "sd2"
    parts: Mapping[str, Component]
    whole: Weights | None  # the single file; None for a folder


def open_source(name: str, required: str | None, variant: str | None) -> Opened:
    """Open the model; only file headers are read. Raises UserError if it is not the required base model."""
    path, spec = find_base(SOURCE, name, *layouts.PARTS)
    if spec.name not in TITLES:
        raise about(SOURCE)(f"{path}: this is {spec.called} model; this command supports only SD 1.x and SD 2.x")
    if required not in (None, spec.name):
        raise about(SOURCE)(f"{path}: this is {spec.called} model", f"remove --{'v1' if required == 'sd1' else 'v2'}")
    if not path.is_dir():
        if variant is not None:
            raise about("--variant")(f"selects files in a diffusers folder, but {SOURCE} {path} is a file", "remove it")
        weights = model_lookup.open_file(SOURCE, path)
        parts = {**single_file_parts(SOURCE, weights, spec.name), "vae": vae_of_checkpoint(SOURCE, weights)}
        return Opened(path, spec.name, parts, weights)
    check_variant(path, layouts.PARTS, variant)
    unet, vae, text = (model_lookup.open_part(SOURCE, path / part, part, variant) for part in layouts.PARTS)
    parts = {"unet": Component(*unet), "vae": vae_of_folder(*vae), "text_encoder": clip_of_folder(*text)}
    return Opened(path, spec.name, parts, None)


# --- one file ---


def write_file(model: Opened, args: argparse.Namespace, dtype: torch.dtype | None) -> int:
    """Write all parts into one file. Return the number of weights."""
    num_weights = sum(len(part.weights.shapes) for part in model.parts.values())
    # sd-scripts writes 32 bits unless told otherwise, whatever the input has.
    named_tensors = tqdm(
        layouts.to_single_file(model.base, model.parts, dtype or torch.float32), "converting", num_weights
    )
    tensors: dict[str, Tensor] = dict(named_tensors)
    if model.whole is not None:
        tensors.update(layouts.other_weights(model.whole, tensors))
    elif model.base == "sd2":
        # A diffusers folder lacks tensors by which programs recognise a single file of SD 2.x.
        tensors.update(layouts.build_unused_tensors(tensors, dtype))
    mark = mark_of(WRITER, args.model_to_save)
    if is_safetensors(args.model_to_save):
        if args.epoch or args.global_step:
            logger.warning("--epoch and --global_step have no effect: a .safetensors file cannot store them")
        save_safetensors(args.model_to_save, tensors, parse_metadata(args.metadata), mark)
    else:
        if args.metadata is not None:
            logger.warning("--metadata has no effect: only a .safetensors file can store it")
        old_counts = read_counts(model.path)
        save_pickle_state_dict(
            args.model_to_save, tensors, {n: getattr(args, n) + old_counts.get(n, 0) for n in COUNTS}, mark
        )
    return len(tensors)


def parse_metadata(text: str | None) -> dict[str, str]:
    """Parse --metadata to a mapping of strings. Raises UserError for anything else."""
    try:
        metadata = {} if text is None else ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        metadata = None
    if not isinstance(metadata, dict) or not all(
        isinstance(string, str) for item in metadata.items() for string in item
    ):
        raise about("--metadata")(f"{text} is not a mapping of strings", """write it as '{"name": "my model"}'""")
    return metadata


def read_counts(path: Path) -> dict[str, int]:
    """Return the epochs and steps that a training program recorded in a pickled checkpoint."""
    content = {} if path.is_dir() or holds_safetensors(path) else load_pickle(path, mmap=True)
    counts = {name: content.get(name) for name in COUNTS} if isinstance(content, Mapping) else {}
    return {name: value for name, value in counts.items() if isinstance(value, int)}


# --- a diffusers folder ---


def find_reference(model: Opened, name: str | None) -> Path:
    """Return the folder that provides scheduler and tokenizer. Raises UserError if it lacks them."""
    if name is None and model.whole is None:
        path = model.path
    elif name is not None and Path(name).expanduser().exists():
        path = Path(name).expanduser()
    else:
        try:
            patterns = ("scheduler/*.json", "tokenizer/*", "unet/config.json")
            path = model_lookup.fetch_snapshot(name or REFERENCES[model.base], patterns)
        except ConnectionError as error:
            raise about("--reference_model", cause="missing")(
                f"{name or 'is not set'}: a file has neither scheduler nor tokenizer, and "
                f"{name or REFERENCES[model.base]} cannot be downloaded ({error})",
                f"use a diffusers folder of {TITLES[model.base]}",
            ) from error
    missing = [part for part in ("scheduler/scheduler_config.json", "tokenizer") if not (path / part).exists()]
    if missing:
        raise about("--reference_model", path)(f"has no {missing[0]}", "use a diffusers folder of the same model")
    return path


def write_folder(model: Opened, args: argparse.Namespace, dtype: torch.dtype | None, reference: Path) -> int:
    """Write the folder, with the scheduler and tokenizer of `reference`. Return the number of weights."""
    reference_config = model_lookup.read_json(reference / "unet" / "config.json")
    is_linear = model.parts["unet"].config.get("use_linear_projection", False)
    if model.whole is not None and model.base == "sd2":  # a single file of SD 2.x always stores matrices
        is_linear = args.unet_use_linear_projection or bool(reference_config.get("use_linear_projection"))
    num_weights = 0
    with atomic_folder(args.model_to_save) as folder:
        for part, component in model.parts.items():
            (folder / part).mkdir()
            config = layouts.folder_config(part, component.config, reference_config, is_linear)
            write_json(folder / part / "config.json", config)
            # Every part gets the requested precision; sd-scripts leaves the U-Net of a folder in 32 bits.
            named_tensors = layouts.to_folder(part, component, dtype or torch.float32, is_linear)
            tensors = dict(tqdm(named_tensors, part, len(component.weights.shapes)))
            formats = model_lookup.weight_files(part)
            if args.use_safetensors:
                save_safetensors(folder / part / formats[0][0], tensors, {"format": "pt"})
            else:
                save_pickle_state_dict(folder / part / formats[2][0], tensors)
            num_weights += len(tensors)
        shutil.copytree(reference / "tokenizer", folder / "tokenizer")
        write_scheduler(reference, folder)
        mark_folder(folder, mark_of(WRITER, args.model_to_save))
    return num_weights


def write_scheduler(reference: Path, folder: Path) -> None:
    """Write model_index.json and the reference's scheduler as diffusers' DDIMScheduler."""
    from diffusers import DDIMScheduler

    DDIMScheduler.from_pretrained(reference, subfolder="scheduler").save_pretrained(folder / "scheduler")
    parts = {
        "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), (None, None)),
    }  # fmt: skip
    header = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    write_json(folder / "model_index.json", {**header, **parts})


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- the command ---


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument(SOURCE, help="a single file, a diffusers folder or the name of one on the hub")
    parser.add_argument(TARGET, type=Path, help="the file or, without an extension, the folder to write")
    parser.add_argument("--v1", action="store_true", help="require SD 1.x; the version is recognised anyway")
    parser.add_argument("--v2", action="store_true", help="require SD 2.x; the version is recognised anyway")
    parser.add_argument("--unet_use_linear_projection", action="store_true", help="folder of SD 2.x: write matrices")
    precision = parser.add_mutually_exclusive_group()
    for name in SAVE_DTYPES:
        precision.add_argument(f"--{name}", action="store_const", const=name, dest="save_precision_as")
    precision.add_argument(
        "--save_precision_as", choices=tuple(SAVE_DTYPES), help="the same as one option (default: float)"
    )
    parser.add_argument("--epoch", type=int, default=0, help="epochs to record in a .ckpt, added to those of the input")
    parser.add_argument("--global_step", type=int, default=0, help="steps to record, added likewise")
    parser.add_argument("--metadata", help="""metadata of a .safetensors file, as '{"name": "my model"}'""")
    parser.add_argument("--variant", help="variant of a folder's files to read, such as fp16")
    parser.add_argument("--reference_model", help="folder or hub name of a model with scheduler and tokenizer")
    parser.add_argument("--use_safetensors", action="store_true", help="folder: write .safetensors, not .bin")
    return parser


def is_file_name(path: Path) -> bool:
    """Return True if the target is a file, False for a folder. Raises UserError for an unsupported extension."""
    if path.suffix and path.suffix.lower() not in SUFFIXES:
        raise about(TARGET)(
            f"{path} ends in {path.suffix}: a file ends in one of {', '.join(SUFFIXES)}, a folder's name has no dot"
        )
    return bool(path.suffix)


def convert(args: argparse.Namespace) -> None:
    if args.v1 and args.v2:
        raise about("--v1", cause="does not fit", others=["--v2"])(
            "and --v2 exclude each other; the model is recognised anyway"
        )
    to_file, dtype = is_file_name(args.model_to_save), parse_dtype(args.save_precision_as)
    parse_metadata(args.metadata)
    folder_only = {"--reference_model": args.reference_model, "--use_safetensors": args.use_safetensors}
    folder_only["--unet_use_linear_projection"] = args.unet_use_linear_projection
    file_only = {"--epoch": args.epoch, "--global_step": args.global_step, "--metadata": args.metadata}
    for flag in (flag for flag, value in (folder_only if to_file else file_only).items() if value):
        logger.warning("%s has no effect: %s is a %s", flag, args.model_to_save, "file" if to_file else "folder")
    if to_file:
        check_output(TARGET, args.model_to_save, WRITER, [Path(args.model_to_load)])
    else:
        check_output_folder(TARGET, args.model_to_save, WRITER)
    model = open_source(args.model_to_load, "sd1" if args.v1 else "sd2" if args.v2 else None, args.variant)
    if to_file:
        num_weights = write_file(model, args, dtype)
    else:
        num_weights = write_folder(model, args, dtype, find_reference(model, args.reference_model))
    print_line(f"{args.model_to_save}: {num_weights} weights of {TITLES[model.base]}")


main = command(setup_parser, convert)

if __name__ == "__main__":
    sys.exit(main())

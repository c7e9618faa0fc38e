"""The options of musubi-tuner's caching commands, which a script reads before it imports torch."""

import argparse
import logging
import re
from collections.abc import Collection

from library.base.errors import about
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.config_file import ConfigFileOptions
from library.options.dataset import DatasetOptions
from library.options.model import ModelOptions
from library.options.output.console import ConsoleOptions
from library.training.command_line.help import TrainingParser

logger = logging.getLogger(__name__)

NEVER_DELETED = "Has no effect: cache files are never deleted."
LISTED = "images are listed, and not drawn in the terminal"
DRAWING = ("console_width", "console_back", "console_num_images")
FILES = re.compile(r"--(?:vae|ae) \S+")
EXAMPLES = """\
Encode the {encoded} of a data set once, for the trainings that follow. Two commands to begin with:

  those that a dataset file names
    python3 %(prog)s --dataset_config dataset.toml {parts}

  those of a training whose options are kept in a file
    python3 %(prog)s --config_file train.toml

Every option of the training is taken too. --help shows those that matter here, --help_all all of them."""
SHOWN = {"mixed_precision", "no_half_vae", "cache_dir", "shared_cache_dir", "vae_batch_size", "skip_cache_check"}
SHOWN |= {"text_encoder_batch_size", "text_encoder_cpu", "text_cache_variants", "dit", "errors_json"}
BASE_EXAMPLE = "--pretrained_model_name_or_path model.safetensors"
COMMAND = {"batch_size", "num_workers", "device", "skip_existing", "keep_cache", "debug_mode", "disable_cudnn_backend"}
GROUPS = (ConsoleOptions, ConfigFileOptions, ModelOptions, DatasetOptions, CachingOptions, TextCachingOptions)


def show_for_caching(
    parser: argparse.ArgumentParser, encoded: str, parts: str, command: Collection[str] = COMMAND
) -> argparse.ArgumentParser:
    """Let --help of a training's parser say how the images or the captions are `encoded`; `parts` are the options of
    the base model's other files in the example of a training, `command` the command's own options."""
    files = FILES.findall(parts) if encoded == "images" else [FILES.sub("", parts)]
    usual = {n for kind in GROUPS for n, declared in kind.declarations().items() if declared.usual}
    usual |= SHOWN | {part.partition(" ")[0] for part in parts.split("--")} | {*command}
    examples = EXAMPLES.format(encoded=encoded, parts=" ".join(" ".join(files).split()) or BASE_EXAMPLE)
    if isinstance(parser, TrainingParser):
        parser.show_only(frozenset(usual), examples, f"What encoding the {encoded} needs")
    return parser


def add_command_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of musubi-tuner's caching commands; models run in bf16 by default, as there."""
    parser.add_argument("--batch_size", type=int, help="Images or captions that are encoded at a time.")
    parser.add_argument("--num_workers", type=int, help="Threads that read images: --max_data_loader_n_workers.")
    parser.add_argument(
        "--device", type=str, help="Device to encode on, such as cpu or cuda:1. Unset is the GPU if there is one."
    )
    parser.add_argument("--skip_existing", action="store_true", help="Trust files by name: --skip_cache_check.")
    parser.add_argument("--keep_cache", action="store_true", help=NEVER_DELETED)
    parser.add_argument(
        "--debug_mode",
        type=str,
        choices=["image", "console", "video"],
        help=f"List the images: --debug_dataset; {LISTED}.",
    )
    parser.add_argument("--console_width", type=int, default=80, help=f"Has no effect: {LISTED}.")
    parser.add_argument("--console_back", type=str, help=f"Has no effect: {LISTED}.")
    parser.add_argument("--console_num_images", type=int, help=f"Has no effect: {LISTED}.")
    parser.add_argument("--disable_cudnn_backend", action="store_true", help="Encode without cuDNN's kernels.")
    parser.set_defaults(mixed_precision="bf16", max_data_loader_n_workers=0)
    return parser


def with_command_options(args: argparse.Namespace, cached: str, batch_size: str) -> argparse.Namespace:
    """Translate the options of `add_command_options` for a command that fills the cache `cached`; `batch_size` is the
    name of that option. Raises UserError for a batch size below 1."""
    values = {"skip_cache_check": args.skip_existing or args.skip_cache_check, cached: True, f"{cached}_to_disk": True}
    if args.batch_size is not None:
        if args.batch_size < 1:
            raise about("--batch_size")(f"is {args.batch_size}, but must be at least 1")
        values[batch_size] = args.batch_size
    if args.debug_mode is not None:
        values["debug_dataset"] = True
    if args.num_workers is not None:
        values["max_data_loader_n_workers"] = args.num_workers
    return argparse.Namespace(**{**vars(args), **values})


def warn_of_drawing(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Warn of options that would draw the images in the terminal."""
    for name in DRAWING:
        if getattr(args, name) != parser.get_default(name):
            logger.warning("--%s has no effect: %s", name, LISTED)

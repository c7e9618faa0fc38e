"""Merge checkpoints of one base model: every weight becomes the sum of ratio * weight.

For a weight that another file lacks, the first file's value is used instead; weights that the first file lacks are
omitted. Integers, such as token positions, are copied from the first file.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import torch
from torch import Tensor
from tqdm import tqdm

from library.base.command_parser import make_parser
from library.base.errors import about, list_few
from library.base.terminal import print_line
from library.checkpoints import model_lookup
from library.checkpoints.headers import read_metadata
from library.checkpoints.marks import mark_of
from library.checkpoints.saving import save_weights
from library.checkpoints.weights import Weights
from library.commands.command import add_options, check_output, command, resolve_device, resolve_ratios
from library.memory.devices import SAVE_DTYPES
from tools.merge_adapters import modelspec

logger = logging.getLogger(__name__)

UNET = "model.diffusion_model."
KEPT = ("modelspec.sai_model_spec", "modelspec.architecture")  # metadata of the first file
WRITER = "tools/merge_models.py"
EXAMPLES = """\
  python3 tools/merge_models.py --models first.safetensors second.safetensors --ratios 0.7 0.3 \\
      --output merged.safetensors --saving_precision fp16"""


def merge_tensors(
    models: Sequence[Weights], ratios: Sequence[float], unet_only: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Merge every floating-point weight of the first file in `dtype`.

    Raises UserError for weights of different shapes.
    """
    first, tensors = models[0], {}
    for key in tqdm(first.shapes, desc="merging", unit="tensor"):
        value = first.read(key)
        if not value.is_floating_point() or (unet_only and not key.startswith(UNET)):
            tensors[key] = value
            continue
        total = torch.zeros_like(value, dtype=dtype, device=device)
        for model, ratio in zip(models, ratios, strict=True):
            if model.shapes.get(key, value.shape) != first.shapes[key]:
                raise about("--models")(
                    f": {key} has shape {first.shapes[key]} in {first.origin} and {model.shapes[key]} in "
                    f"{model.origin}",
                    "use checkpoints of one base model",
                )
            total += ratio * (model.read(key) if key in model.shapes else value).to(device, dtype)
        tensors[key] = total.cpu()
    return tensors


def log_differences(models: Sequence[Weights], show_skipped: bool) -> None:
    """Log the weights that the files do not share, by name if requested. Raises UserError if they share none."""
    first = models[0].shapes
    for model in models[1:]:
        skipped = [key for key in model.shapes if key not in first]
        missing = [key for key in first if key not in model.shapes]
        if len(missing) == len(first):
            raise about("--models")(
                f": {model.origin} and {models[0].origin} have no weight in common",
                "use checkpoints of one base model in one layout",
            )
        if skipped:
            names = f": {', '.join(skipped)}" if show_skipped else "; --show_skipped names them"
            logger.warning("%s: omitting %d weights that the first file lacks%s", model.origin, len(skipped), names)
        if missing:
            logger.warning("%s lacks %d weights; using the first file's", model.origin, len(missing))


def warn_of_nonfinite(output: Path, tensors: Mapping[str, Tensor]) -> None:
    """Warn about saved weights with NaN or infinity; some checkpoints contain them in unused weights."""
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        logger.warning(
            "%s: %d weights have values that are not finite, which ruin images unless they are unused: %s; --models "
            "have them too, or they exceed the range of --saving_precision",
            output, len(broken), list_few(broken),
        )  # fmt: skip


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    models = {"help": "checkpoints, each a single file"}
    ratios = {"help": "share of each file; unset: equal shares"}
    add_options(parser, "models", "ratios", "precision", "device", models=models, ratios=ratios)
    parser.add_argument("--output", type=Path, required=True, help="the file to write: .safetensors, .ckpt or .pt")
    parser.add_argument("--unet_only", action="store_true", help="keep the text encoders and the VAE of the first file")
    parser.add_argument(
        "--saving_precision", choices=tuple(SAVE_DTYPES), default="float", help="precision of the file (default: float)"
    )
    parser.add_argument("--show_skipped", action="store_true", help="name the weights that the first file lacks")
    return parser


def merge(args: argparse.Namespace) -> None:
    ratios = resolve_ratios(args, 1 / len(args.models))
    check_output("--output", args.output, WRITER, args.models)
    device = resolve_device(args.device)
    folders = [path for path in args.models if path.is_dir()]
    if folders:
        raise about("--models")(f"{folders[0]} is a folder", "use single-file checkpoints")
    models = [model_lookup.open_file("--models", model_lookup.find_model("--models", str(p), ())) for p in args.models]
    if args.unet_only and not any(key.startswith(UNET) for key in models[0].shapes):
        raise about("--unet_only")(f": {args.models[0]} has no {UNET}...", "remove it")
    log_differences(models, args.show_skipped)
    tensors = merge_tensors(models, ratios, args.unet_only, SAVE_DTYPES[args.precision], device)
    dtype = SAVE_DTYPES[args.saving_precision]
    saved = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    warn_of_nonfinite(args.output, saved)
    kept = {name: value for name, value in read_metadata(args.models[0]).items() if name in KEPT}
    save_weights(args.output, saved, {**kept, **modelspec(args.output, args.models)}, mark_of(WRITER, args.output))
    print_line(f"{args.output}: {len(tensors)} weights of {len(models)} files")


main = command(setup_parser, merge)

if __name__ == "__main__":
    sys.exit(main())

"""Combine the separate files of Stable Diffusion 3 or 3.5 into one file.

Every weight is copied as stored (8-bit weights with their scales), unless a precision is given. The parts are checked
first: text encoders that do not fit the transformer are rejected.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import torch
from tqdm import tqdm

from library.architectures.sd3.load import (
    DENOISER_PREFIX,
    TEXT_PREFIXES,
    check_widths,
    open_clip,
    open_t5,
    read_denoiser,
    text_weights,
)
from library.architectures.sd3.model import read_config
from library.architectures.sd3.options import Sd3TextOptions
from library.architectures.specs import list_specs
from library.base.command_parser import make_parser
from library.base.errors import about
from library.base.terminal import print_line
from library.checkpoints import model_lookup
from library.checkpoints.headers import read_metadata
from library.checkpoints.marks import mark_of
from library.checkpoints.saving import save_safetensors
from library.checkpoints.weights import Weights, configure, open_weights
from library.commands.command import add_file_precision, check_safetensors_output, command, dtype_of_file
from library.models.identify import base_of_file, refuse_other
from library.models.vae.checkpoint_keys import VAE_PREFIX
from library.models.vae.vae import vae_of_checkpoint

logger = logging.getLogger(__name__)

WHOLE = (DENOISER_PREFIX, VAE_PREFIX, *TEXT_PREFIXES.values())  # name prefixes in a file with several parts
LDM_VAE = "encoder.mid.block_1.conv1.weight"
WRITER = "tools/merge_sd3_safetensors.py"
EXAMPLES = """\
  python3 tools/merge_sd3_safetensors.py --dit sd3.5_large.safetensors --clip_l clip_l.safetensors \\
      --clip_g clip_g.safetensors --t5xxl t5xxl_fp16.safetensors --output sd3.5_large_all.safetensors"""


@dataclass(frozen=True)
class PartFile:
    """One input file, and the prefix for its weights if their names do not identify the part."""

    flag: str
    path: Path
    prefix: str

    def names(self, weights: Weights) -> dict[str, str]:
        """Map names in the combined file to names in this file."""
        return {key if key.startswith(WHOLE) else f"{self.prefix}{key}": key for key in weights.shapes}


def list_parts(args: argparse.Namespace) -> list[PartFile]:
    """Return the given files, the transformer first."""
    texts = [(f"--{name}", getattr(args, name), prefix) for name, prefix in TEXT_PREFIXES.items()]
    files = [("--dit", args.dit, DENOISER_PREFIX), ("--vae", args.vae, VAE_PREFIX), *texts]
    return [PartFile(flag, path, prefix) for flag, path, prefix in files if path is not None]


def collect_weights(parts: Sequence[PartFile], opened: Sequence[Weights]) -> dict[str, tuple[Weights, str]]:
    """Return the source of every weight of the combined file; if several files contain a part, the last one wins."""
    sources: dict[str, tuple[Weights, str]] = {}
    for part, weights in zip(parts, opened, strict=True):
        names = part.names(weights)
        replaced = [key for key in sources if key.startswith(part.prefix)]
        if replaced:
            logger.warning("%s replaces the same part in %s", part.flag, sources[replaced[0]][0].origin)
        sources = {key: source for key, source in sources.items() if key not in replaced}
        sources |= {new: (weights, old) for new, old in names.items()}
    return sources


def combine_weights(places: dict[str, tuple[Weights, str]], origin: str) -> Weights:
    """Return the combined weights, read on demand from their files."""

    def read(key: str) -> torch.Tensor:
        weights, name = places[key]
        return weights.read(name)

    return Weights(origin, {key: weights.shapes[name] for key, (weights, name) in places.items()}, read)


def check(parts: Sequence[PartFile]) -> None:
    """Raise UserError naming the wrong file unless all files are parts of one SD3 model."""
    opened = [model_lookup.open_file(part.flag, find_file(part)) for part in parts]
    dit = opened[0]
    specs = list_specs()
    # Other base models are recognised by prefixed names, which a file of the denoiser alone lacks.
    prefixed = {f"{DENOISER_PREFIX}{key}": shape for key, shape in dit.shapes.items()}
    spec = base_of_file(specs, {**prefixed, **dit.shapes})
    refuse_other(specs, "--dit", dit.origin, spec, "sd3", "transformer")
    if spec is None:
        raise about("--dit")(f"{dit.origin} has no joint_blocks, so it is not a transformer of SD3")
    for part, weights in zip(parts[1:], opened[1:], strict=True):
        if part.flag == "--vae" and not any(key.removeprefix(VAE_PREFIX) == LDM_VAE for key in weights.shapes):
            raise about("--vae", part.path)(
                f"has no {LDM_VAE}, so it is not a VAE in the original layout",
                "use the one next to the transformer's file instead of diffusers'",
            )
    combined = combine_weights(collect_weights(parts, opened), dit.origin)
    present = [name for name in TEXT_PREFIXES if text_weights(name, Sd3TextOptions(), combined) is not None]
    clips = [open_clip(name, Sd3TextOptions(), combined) for name in ("clip_l", "clip_g") if name in present]
    t5 = [open_t5(Sd3TextOptions(), combined)] if "t5xxl" in present else []
    check_widths(configure(read_denoiser(combined), read_config), clips if len(clips) == 2 else [], t5)
    missing = [f"--{name}" for name in TEXT_PREFIXES if name not in present]
    if not any(key.startswith(VAE_PREFIX) for key in combined.shapes):
        missing.append("--vae")
    else:
        vae_of_checkpoint("--vae", combined)
    if missing:
        logger.warning("the combined file will lack %s, which no input contains", ", ".join(missing))


def find_file(part: PartFile) -> Path:
    """Return the path of a file. Raises UserError if it does not exist or is a folder."""
    path = model_lookup.find_model(part.flag, str(part.path), ())
    if path.is_dir():
        raise about(part.flag, path)("is a folder", "use a weight file")
    return path


def merge(args: argparse.Namespace) -> None:
    """Check the parts and write them as one file."""
    parts = list_parts(args)
    check_safetensors_output("--output", args.output, WRITER, [part.path for part in parts])
    dtype = dtype_of_file(args.save_precision)
    check(parts)
    # Scales of 8-bit weights belong to their weights: either both are copied, or the weights are decoded.
    opened = [open_weights(p.path) if dtype is None else model_lookup.open_file(p.flag, p.path) for p in parts]
    combined = combine_weights(collect_weights(parts, opened), str(args.output))
    tensors = {}
    for key in tqdm(combined.shapes, desc="merging", unit="tensor"):
        tensor = combined.read(key)
        tensors[key] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    kept = {key: value for key, value in read_metadata(args.dit).items() if "hash" not in key}
    save_safetensors(args.output, tensors, kept or {"format": "pt"}, mark_of(WRITER, args.output))
    print_line(f"{args.output}: {len(tensors)} weights of {len(parts)} files")


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--dit", type=Path, required=True, help="file of the transformer, which may hold other parts")
    parser.add_argument("--vae", type=Path, help="file of the VAE in the original layout")
    parser.add_argument("--clip_l", type=Path, help="file of CLIP-L")
    parser.add_argument("--clip_g", type=Path, help="file of CLIP-G")
    parser.add_argument("--t5xxl", type=Path, help="file of T5-XXL")
    parser.add_argument("--output", type=Path, default=Path("merged_model.safetensors"), help="the file to write")
    parser.add_argument("--device", help="has no effect: weights are read one by one into main memory")
    add_file_precision(parser)
    return parser


main = command(setup_parser, merge)

if __name__ == "__main__":
    sys.exit(main())

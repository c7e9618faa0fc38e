"""Convert the transformer of FLUX.1 or Chroma from a diffusers folder to one file in the original layout.

The values stay the same. Tensors are renamed, and q, k and v, which diffusers stores separately, are stacked.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

from tqdm import tqdm

from library.architectures.flux.layers import DIFFUSERS_MARK, KEYS
from library.architectures.specs import list_specs
from library.base.command_parser import make_parser
from library.base.errors import about
from library.base.terminal import print_line
from library.checkpoints import model_lookup
from library.checkpoints.marks import mark_of
from library.checkpoints.saving import save_safetensors
from library.checkpoints.weights import Weights, list_first_names
from library.commands.command import add_file_precision, check_safetensors_output, command, dtype_of_file
from library.models.identify import base_of_file

FLAG = "--diffusers_path"
FOLDER = "transformer"
MODELS = ("flux", "chroma")
WRITER = "tools/convert_diffusers_to_flux.py"
EXAMPLES = """\
  python3 tools/convert_diffusers_to_flux.py --diffusers_path FLUX.1-dev --save_to flux1-dev.safetensors \\
      --save_precision bf16"""


def open_transformer(path: Path) -> Weights:
    """Open a transformer under its original names, from a diffusers folder, the transformer's folder, or its (first)
    file.

    Raises UserError if it is missing, incomplete or of another model.
    """
    path = model_lookup.find_model(FLAG, str(path), ((FOLDER, ""),))
    if path.is_dir():
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        weights = model_lookup.open_part(FLAG, folder, FOLDER)[1]
    else:
        weights = model_lookup.open_file(FLAG, path)
    if DIFFUSERS_MARK not in weights.shapes:
        first_names = list_first_names(weights)
        raise about(FLAG, path)(f"is not a FLUX.1 transformer in diffusers' layout (first names: {first_names})")
    original = KEYS.from_diffusers(weights)
    spec = base_of_file(list_specs(), original.shapes)
    if spec is None or spec.name not in MODELS:
        raise about(FLAG, path)(f"is {'of an unknown model' if spec is None else f'{spec.called} model'}")
    unknown = sorted(set(original.shapes) - set(KEYS.our_keys(weights.shapes)))
    if unknown:
        raise about(FLAG, path, cause="missing")(
            f": {unknown[0]} does not exist in the original layout; this is another variant"
        )
    return original


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument(FLAG, type=Path, required=True, help="a diffusers folder, its transformer's folder, or a file")
    parser.add_argument("--save_to", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--mem_eff_load_save", action="store_true", help="has no effect: this is always on")
    add_file_precision(parser)
    return parser


def convert(args: argparse.Namespace) -> None:
    check_safetensors_output("--save_to", args.save_to, WRITER, [args.diffusers_path])
    dtype = dtype_of_file(args.save_precision)
    weights = open_transformer(args.diffusers_path)
    keys = tqdm(weights.shapes, desc="converting", unit="tensor")
    tensors = {key: weights.read(key).to(dtype) if dtype is not None else weights.read(key) for key in keys}
    save_safetensors(args.save_to, tensors, {"format": "pt"}, mark_of(WRITER, args.save_to))
    print_line(f"{args.save_to}: {len(tensors)} weights")


main = command(setup_parser, convert)

if __name__ == "__main__":
    sys.exit(main())

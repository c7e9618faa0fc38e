"""Encode the images of a metadata file, and record the training size of each image in it.

The latents are stored next to the images, where training with --cache_latents_to_disk and the same sizes finds them.
This suite does not need the recorded sizes: training reads each size from the image's header.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.base.command_parser import make_parser
from library.base.errors import error_in
from library.base.terminal import print_line
from library.commands.base_models import find_base
from library.commands.command import command
from library.data.description.buckets import Size
from library.data.sources.folders.metadata_file import parse_entries, read_table
from library.data.sources.folders.metadata_listing import find_image
from library.memory.devices import DTYPES
from tools.cache_latents import cache_images
from tools.captions_to_metadata import check_name, check_table, list_images, write_table

logger = logging.getLogger(__name__)

LATENT_STEP = 8  # image pixels per latent cell
FORWARDED_OPTIONS = (
    "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale", "mixed_precision", "flip_aug",
    "alpha_mask", "skip_existing",
)  # fmt: skip
WRITER = "tools/prepare_metadata.py"
EXAMPLES = """\
  python3 tools/prepare_metadata.py pictures pictures.json prepared.json sd15.safetensors --max_resolution 512,512"""


def resolve_options(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options of tools/cache_latents.py. Raises UserError for a base model without a U-Net."""
    name = args.model_name_or_path
    path, spec = find_base("model_name_or_path", name, "unet", "vae")
    if not spec.folders:
        raise error_in(path=name, cause="does not fit")(
            f"{name} is {spec.called} model",
            "encode its images with its training script and --cache_latents_to_disk, or with tools/make_shards.py",
        )
    values: dict[str, Any] = {key: getattr(args, key) for key in FORWARDED_OPTIONS}
    values |= {
        "pretrained_model_name_or_path": str(path),
        "sdxl": spec.name == "sdxl",
        "v2": spec.script_flag == "--v2",
    }
    values |= {"train_data_dir": str(args.train_data_dir), "in_json": str(args.in_json), "enable_bucket": True}
    values |= {"resolution": args.max_resolution, "vae_batch_size": args.batch_size}
    if args.max_data_loader_n_workers is not None:
        values["max_data_loader_n_workers"] = args.max_data_loader_n_workers
    return argparse.Namespace(**values)


def record_sizes(table: dict[str, Any], folder: Path, sizes: dict[str, Size]) -> None:
    """Write the bucket size of each image into its entry, in pixels, rounded down to whole latent cells."""
    listings: dict[str, dict[str, str]] = {}
    for key, entry in table.items():
        size = sizes.get(find_image(key, str(folder), listings) or "")
        if size is not None:
            entry["train_resolution"] = [side - side % LATENT_STEP for side in size]


def prepare(args: argparse.Namespace) -> None:
    """Encode the images and write the metadata file."""
    check_name(args.out_json)
    table = read_table(str(args.in_json))
    check_table(args.out_json, table, WRITER, args.in_json)  # encoding takes long
    images = list_images(args.train_data_dir, args.recursive)
    # The plan gets the entries instead of reading the file again, so that the images that are encoded and the entries
    # that are written agree even if the file changes meanwhile.
    plan = cache_images(resolve_options(args), parse_entries(table))
    sizes = {sample.image.key: sample.shape.bucket for sample in plan.samples}
    without_entry = [path for path in images if str(path) not in sizes]
    if without_entry:
        logger.warning(
            "skipping %d of %d images without an entry in %s; the first is %s; "
            "tools/captions_to_metadata.py creates entries",
            len(without_entry), len(images), args.in_json, without_entry[0],
        )  # fmt: skip
    record_sizes(table, args.train_data_dir, sizes)
    write_table(args.out_json, table, WRITER, args.in_json)
    print_line(f"{args.out_json}: sizes of {len(sizes)} images, {len(table)} entries")


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("train_data_dir", type=Path, help="the folder of images")
    parser.add_argument("in_json", type=Path, help="the metadata file to read")
    parser.add_argument("out_json", type=Path, help="the metadata file to write")
    parser.add_argument("model_name_or_path", help="the base model whose VAE encodes")
    parser.add_argument("--v2", action="store_true", help="has no effect: checkpoints are recognised")
    parser.add_argument("--batch_size", type=int, default=1, help="images per batch")
    parser.add_argument("--max_data_loader_n_workers", type=int, help="processes that read images")
    parser.add_argument(
        "--max_resolution", default="512,512", help="width,height; their product is the area of buckets"
    )
    parser.add_argument("--min_bucket_reso", type=int, default=256, help="shortest side of a bucket")
    parser.add_argument("--max_bucket_reso", type=int, default=1024, help="longest side of a bucket")
    parser.add_argument("--bucket_reso_steps", type=int, default=64, help="sides of buckets are multiples of this")
    parser.add_argument("--bucket_no_upscale", action="store_true", help="never enlarge an image")
    parser.add_argument("--mixed_precision", choices=tuple(DTYPES), default="no", help="precision of the VAE")
    parser.add_argument("--full_path", action="store_true", help="has no effect: both kinds of keys are found")
    parser.add_argument("--flip_aug", action="store_true", help="encode mirrored copies too")
    parser.add_argument("--alpha_mask", action="store_true", help="keep the alpha channel as a mask")
    parser.add_argument("--skip_existing", action="store_true", help="trust existing latents by name")
    parser.add_argument("--recursive", action="store_true", help="also include images in subfolders")
    return parser


main = command(setup_parser, prepare)

if __name__ == "__main__":
    sys.exit(main())

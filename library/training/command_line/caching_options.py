"""The options of musubi-tuner's caching commands, which a script reads before it imports torch."""

import argparse

from library.base.errors import about

NEVER_DELETED = "Has no effect: cache files are never deleted."


def add_command_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of musubi-tuner's caching commands; models run in bf16 by default, as there."""
    parser.add_argument("--batch_size", type=int, help="Images or captions that are encoded at a time.")
    parser.add_argument("--num_workers", type=int, help="Threads that read images: --max_data_loader_n_workers.")
    parser.add_argument(
        "--device", help="Device to encode on, such as cpu or cuda:1. Unset is the GPU if there is one."
    )
    parser.add_argument("--skip_existing", action="store_true", help="Trust files by name: --skip_cache_check.")
    parser.add_argument("--keep_cache", action="store_true", help=NEVER_DELETED)
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
    if args.num_workers is not None:
        values["max_data_loader_n_workers"] = args.num_workers
    return argparse.Namespace(**{**vars(args), **values})

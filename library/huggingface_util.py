"""What programs that import sd-scripts' library call by these names; nothing here calls it."""

import argparse
from pathlib import Path


def upload(args: argparse.Namespace, src: str | Path, dest_suffix: str = "", force_sync_upload: bool = False) -> None:
    """Send a file or a folder to --huggingface_repo_id; an error is logged. The upload is always waited for."""
    from library.options.output.saving import HubOptions
    from library.training.saving import hub

    options = HubOptions.from_args(argparse.Namespace(**{**HubOptions.defaults(), **vars(args)}))
    path = Path(src)
    place = f"{options.huggingface_path_in_repo or ''}{dest_suffix}".strip("/")
    hub.upload(options, path, place or ("" if path.is_dir() else path.name))


AS_IMPORTED = dict(globals())  # by which it is told what a program puts here that nothing uses

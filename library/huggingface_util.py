"""Functions of sd-scripts' library.huggingface_util for programs that import it; nothing here calls them."""

import argparse
from pathlib import Path


def upload(args: argparse.Namespace, src: str | Path, dest_suffix: str = "", force_sync_upload: bool = False) -> None:
    """Upload a file or a folder to `huggingface_repo_id`, waiting until it is done; errors are logged."""
    from library.options.output.saving import HubOptions
    from library.training.saving import hub

    options = HubOptions.from_args(argparse.Namespace(**{**HubOptions.defaults(), **vars(args)}))
    path = Path(src)
    path_in_repo = f"{options.huggingface_path_in_repo or ''}{dest_suffix}".strip("/")
    hub.upload(options, path, path_in_repo or ("" if path.is_dir() else path.name))


AS_IMPORTED = dict(globals())  # detects names that a program patches, which has no effect

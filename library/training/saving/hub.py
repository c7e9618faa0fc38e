"""Uploads to a Hugging Face repository, and downloads of states from one.

A failed upload is logged and training continues, because the files are still on disk.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.base.errors import about
from library.options.output.saving import HubOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Uploads:
    """Uploads files and folders to Hugging Face; does nothing without a repository."""

    options: HubOptions
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="upload"))
    waiting: list["Future[None]"] = field(default_factory=list)

    def send(self, path: Path, is_last: bool) -> None:
        """Upload a file or folder, in the background if requested; the last upload is waited for."""
        if not self.options.huggingface_repo_id:
            return
        folder = self.options.huggingface_path_in_repo
        path_in_repo = f"{folder}/{path.name}" if folder else path.name
        self.waiting.append(self.pool.submit(upload, self.options, path, path_in_repo))
        if is_last or not self.options.async_upload:
            for future in self.waiting:
                future.result()
            self.waiting.clear()

    def afterwards(self, action: Callable[[], None]) -> None:
        """Call `action`, such as a deletion, now or after the pending background uploads."""
        # The pool has one thread, so an action that is submitted now runs after the uploads before it.
        if all(future.done() for future in self.waiting):
            action()
        else:
            self.waiting.append(self.pool.submit(action))


def upload(options: HubOptions, path: Path, path_in_repo: str) -> None:
    """Upload a file or folder to `path_in_repo` in the repository ("" for its root); log errors."""
    repo = options.huggingface_repo_id
    kind = {"repo_id": repo, "repo_type": options.huggingface_repo_type}
    try:
        api = client(options)
        make_repository(api, options)
        if path.is_dir():
            api.upload_folder(folder_path=str(path), path_in_repo=path_in_repo, **kind)
        else:
            api.upload_file(path_or_fileobj=str(path), path_in_repo=path_in_repo, **kind)
    except Exception as error:  # the network and the server may raise anything; the file on disk is safe
        logger.error("%s could not be uploaded to %s: %s: %s", path, repo, type(error).__name__, error)
    else:
        logger.info("uploaded %s to %s as %s", path, repo, path_in_repo or "its top folder")


def client(options: HubOptions) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=options.huggingface_token)


def make_repository(api: Any, options: HubOptions) -> None:
    """Create the repository if it is missing, private unless the options make it public."""
    kind = {"repo_id": options.huggingface_repo_id, "repo_type": options.huggingface_repo_type}
    if not api.repo_exists(**kind):
        api.create_repo(**kind, private=options.huggingface_repo_visibility != "public", exist_ok=True)


def check_repository(options: HubOptions) -> None:
    """Contact the repository before training begins. Raises UserError if that fails."""
    if not options.huggingface_repo_id:
        return
    try:
        make_repository(client(options), options)
    except Exception as error:
        raise about("--huggingface_repo_id")(
            f"{options.huggingface_repo_id} cannot be reached or made ({type(error).__name__}: {error})",
            "check the name, --huggingface_token and the network, or leave it out",
        ) from error


def fetch_state(name: str, options: HubOptions) -> Path:
    """Download the state named owner/repo/path[:revision[:type]].

    Raises UserError for another form of name, or if nothing is found there.
    """
    location, _, suffix = name.partition(":")
    revision, _, kind = suffix.partition(":")
    owner, _, tail = location.partition("/")
    repo, _, folder = tail.partition("/")
    if not (owner and repo and folder):
        raise about("--resume")(
            f"{name} does not name a state on Hugging Face",
            "write owner/repository/path, and :revision and :type behind it if needed",
        )
    folder = folder.strip("/")
    try:
        root = client(options).snapshot_download(
            repo_id=f"{owner}/{repo}",
            revision=revision or None,
            repo_type=kind or options.huggingface_repo_type,
            allow_patterns=[f"{folder}/*"],
        )
    except Exception as error:
        raise about("--resume")(
            f"{name} cannot be fetched from Hugging Face ({type(error).__name__}: {error})",
            "check the name, --huggingface_token and the network",
        ) from error
    path = Path(root) / folder
    if not path.is_dir():
        raise about("--resume")(f"{name}: {owner}/{repo} has no folder {folder}")
    return path

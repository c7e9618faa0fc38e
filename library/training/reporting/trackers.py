"""Charts in TensorBoard and Weights & Biases, through accelerate's trackers."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from library.base.errors import about
from library.environment.packages import import_needed, is_missing
from library.options.base import Options
from library.options.config_file import read_toml
from library.options.output.trackers import TrackerOptions
from library.training.reporting.sample_images import Drawn

logger = logging.getLogger(__name__)


def tracker_kind(options: TrackerOptions) -> str | None:
    """Return accelerate's name of the requested tracker; None without one.

    Raises UserError if TensorBoard has no folder, or if a package is missing or cannot be imported.
    """
    kind = options.log_with
    if kind is None:
        # sd-scripts, too, takes TensorBoard where only a folder is given.
        kind = "tensorboard" if options.logging_dir else None
    if kind in ("tensorboard", "all") and not options.logging_dir:
        raise about("--log_with", cause="needs")(f"{kind} needs --logging_dir, the folder for tensorboard's files")
    for package in ("tensorboard", "wandb"):
        # "all" means those that are installed.
        if kind == package or (kind == "all" and not is_missing(package)):
            require_tracker(import_needed(package, "--log_with", kind))
    return kind


def require_tracker(module: ModuleType) -> None:
    """Raise UserError if a module is only a folder of that name, such as the one that wandb writes its runs into."""
    if getattr(module, "__file__", None) is None and hasattr(module, "__path__"):
        folder = next(iter(module.__path__))
        raise about("--log_with", path=folder, cause="not installed")(
            f"needs the package {module.__name__}, but Python finds only the folder {folder}",
            f"pip install {module.__name__}",
        )


def run_folder(options: TrackerOptions) -> str | None:
    """Return `<logging_dir>/<log_prefix><YYYYmmddHHMMSS>`."""
    if not options.logging_dir:
        return None
    return str(Path(options.logging_dir) / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}")


def read_tracker_config(path: str | None) -> dict[str, Any]:
    """Read the file of --log_tracker_config, if there is one. Raises UserError if it cannot be read."""
    return read_toml(Path(path), "--log_tracker_config") if path else {}


def start_trackers(accelerator: Any, trackers: TrackerOptions, config: Mapping[str, Any]) -> None:
    """Start the accelerator's trackers, with `config` if the user requests it. Raises UserError if wandb refuses."""
    uses_wandb = trackers.log_with == "wandb" or (trackers.log_with == "all" and not is_missing("wandb"))
    init = read_tracker_config(trackers.log_tracker_config)
    if trackers.wandb_run_name:
        init.setdefault("wandb", {})["name"] = trackers.wandb_run_name
    logged_config = dict(config) if trackers.log_config else None
    silence_tensorboard_thread()
    try:
        if trackers.log_with in ("wandb", "all") and trackers.logging_dir:
            # By default wandb writes into the working folder; it takes no folder that does not exist.
            Path(accelerator.logging_dir).mkdir(parents=True, exist_ok=True)
            init.setdefault("wandb", {}).setdefault("dir", str(accelerator.logging_dir))
        if uses_wandb and trackers.wandb_api_key is not None:
            import wandb

            wandb.login(key=trackers.wandb_api_key)
        # The default name is sd-scripts', and part of the path of TensorBoard's files.
        accelerator.init_trackers(trackers.log_tracker_name or "network_train", config=logged_config, init_kwargs=init)
    except Exception as error:
        if isinstance(error, OSError) and (error.errno is not None or not uses_wandb):  # wandb's of a network
            logger.warning("--logging_dir %s: charts are off, it cannot be written: %s", trackers.logging_dir, error)
            accelerator.trackers = []
            return
        if not uses_wandb:
            raise
        why = f"{type(error).__name__}: {(str(error).strip() or 'without a message').splitlines()[0]}"
        raise about("--log_with")(
            f"{trackers.log_with}: wandb does not start ({why})",
            "run `wandb login`, set the environment variable WANDB_MODE=offline, or remove --log_with",
        ) from error


def loggable_options(options: Options) -> dict[str, int | float | str | bool]:
    """Return the options that charts may show, without secrets and paths."""
    values = options.flat()
    logged = [name for name, declared in type(options).declarations().items() if declared.logged]
    return {n: values[n] if isinstance(values[n], (int, float, str, bool)) else str(values[n]) for n in logged}


def silence_tensorboard_thread() -> None:
    """Suppress the traceback of TensorBoard's writer thread: `Charts` receives the same error and reports it."""
    plain = threading.excepthook

    def report(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            plain(failure)

    threading.excepthook = report


class Charts:
    """Sends a step's values to the trackers; does nothing without any.

    A failing tracker, on a full disk or without a network, is dropped with one warning: charts never end a run.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._failed: set[str] = set()  # names of dropped trackers

    @property
    def are_on(self) -> bool:
        return any(self._trackers())

    def _trackers(self) -> Iterator[Any]:
        return (tracker for tracker in self._accelerator.trackers if tracker.name not in self._failed)

    @contextmanager
    def _given_up_on_failure(self, tracker: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each tracker has its own errors, and none concerns training
            self._failed.add(tracker.name)
            logger.warning(
                "charts of %s are switched off, training continues: %s: %s", tracker.name, type(error).__name__, error
            )
            logger.debug("where it failed:", exc_info=error)

    def log_step(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        """Log values by optimizer step; wandb keeps its own axis and gets step and epoch as values."""
        self._log(values, step, step, epoch)

    def log_epoch(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        """Log values by epoch, counted from 1."""
        self._log(values, epoch, step, epoch)

    def _log(self, values: Mapping[str, float], x: int, step: int, epoch: int) -> None:
        for tracker in self._trackers():
            with self._given_up_on_failure(tracker):
                if tracker.name == "wandb":
                    # wandb drops values of a step before the last one that it got, so its own counter stays in use.
                    tracker.log({**values, "global_step": step, "epoch": epoch})
                else:
                    tracker.log(values, step=x)

    def log_images(self, images: Sequence[Drawn], step: int, epoch: int) -> None:
        """Log images as `sample_<index>` by step; wandb shows the prompt as caption."""
        for tracker in self._trackers() if images else ():
            with self._given_up_on_failure(tracker):
                if tracker.name == "wandb":
                    import wandb

                    wandb_images = {
                        f"sample_{preview.index}": wandb.Image(preview.image, caption=preview.prompt.text)
                        for preview in images
                    }
                    tracker.log({**wandb_images, "global_step": step, "epoch": epoch})
                else:
                    arrays = {f"sample_{preview.index}": np.asarray(preview.image)[None] for preview in images}
                    tracker.log_images(arrays, step=step, dataformats="NHWC")

    def close(self) -> None:
        """Flush the trackers and end their processes."""
        for tracker in self._trackers():
            with self._given_up_on_failure(tracker):
                tracker.finish()
        # They have ended above; accelerate would end them again, and let their errors through.
        self._accelerator.trackers = []
        self._accelerator.end_training()

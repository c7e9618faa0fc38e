"""The source dataset_name: a data set of the library datasets, on the hub or in a folder. No script of one is run."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from library.base.errors import about, error_in, of_file
from library.checkpoints.model_lookup import HUB_NAME, HUB_TIMEOUT_S, read_json
from library.data.description.schema import SubsetConfig
from library.data.description.source_keys import COMMIT
from library.data.description.source_keys import HUB_SOURCE as KEY
from library.data.scanned.subsets import ScannedSubset
from library.data.sources import parquet
from library.data.sources.indexed.arrow_files import ArrowRows
from library.data.sources.indexed.parquet_files import find_columns, pyarrow_parquet
from library.data.sources.storage.source import Source
from library.data.sources.storage.storage import Storage
from library.environment.packages import import_needed, version_of

logger = logging.getLogger(__name__)

KEYS = (KEY, "dataset_config_name", "dataset_split", *parquet.KEYS)
OLDEST = 4  # version of datasets; earlier ones run the script of a data set
SPLIT = "train"

T = TypeVar("T")


def check_packages(config: SubsetConfig) -> None:
    """Raise UserError for a missing or too old package."""
    pyarrow_parquet()
    if all(map(is_saved, config.patterns)):
        return
    import_needed("datasets", KEY, ", ".join(config.patterns))
    version = version_of("datasets") or "0"
    if int(version.partition(".")[0]) < OLDEST:
        raise error_in(KEY, cause="not installed")(
            f"{KEY}: datasets {version} runs scripts of data sets; version {OLDEST} does not",
            "pip install --upgrade datasets",
        )


def scan(config: SubsetConfig, storage: Storage, num_threads: int) -> ScannedSubset:
    """List the images in the order of the rows. Downloads what is not there. The result's names have the revision."""
    opened = [open_data_set(name, config) for name in config.patterns]
    names, files = tuple(name for name, _ in opened), tuple(file for _, files in opened for file in files)
    if not files:
        raise about(KEY, ", ".join(names))("has no images")
    read = replace(config, source_key="parquet", patterns=files)
    return replace(parquet.scan(read, storage, num_threads, ArrowRows), config=replace(config, patterns=names))


SOURCE = Source(KEYS, scan, check_packages)


def open_data_set(name: str, config: SubsetConfig) -> tuple[str, list[str]]:
    """Return the name with its commit, and the Arrow files of the split; the columns are checked before a download.
    Raises UserError naming the data set."""
    path = Path(name).expanduser()
    if is_saved(name):
        return name, files_of_saved(path, config)
    resolved, builder = (name, load_builder(name, str(path), config)) if path.exists() else find_on_hub(name, config)
    info = builder.info
    if info.features is not None:
        columns = config.image_column, config.caption_column, config.control_columns
        find_columns(info.features.arrow_schema, *columns, name)
    if info.splits:
        choose_split(name, config, {str(split): split for split in info.splits})
    call(name, builder.download_and_prepare)
    split = choose_split(name, config, {str(split): split for split in builder.info.splits or ()})
    files = call(name, builder.as_dataset, split=split).cache_files
    return resolved, [str(Path(file["filename"]).absolute()) for file in files]


def is_saved(name: str) -> bool:
    """Return True for a folder that save_to_disk wrote, which is read without the library."""
    return any((Path(name).expanduser() / file).is_file() for file in ("state.json", "dataset_dict.json"))


def files_of_saved(path: Path, config: SubsetConfig) -> list[str]:
    """Return the Arrow files in a folder that save_to_disk wrote, of one split or of several."""
    splits = read_json(path / "dataset_dict.json").get("splits")
    folder = path
    if splits is not None:
        folder = path / choose_split(str(path), config, {str(split): str(split) for split in splits})
    elif config.dataset_split is not None:
        raise about("dataset_split")(f"is {config.dataset_split!r}, but {path} is a single split", "remove it")
    state = read_json(folder / "state.json")
    try:
        return [str((folder / file["filename"]).absolute()) for file in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise of_file(folder / "state.json", cause="unreadable")("does not name the files of a data set") from error


def choose_split(name: str, config: SubsetConfig, splits: Mapping[str, T]) -> T:
    """Return the split that the subset names, "train" without a name; the only one if there is one."""
    wanted = config.dataset_split or (next(iter(splits)) if len(splits) == 1 else SPLIT)
    if wanted not in splits:
        raise about("dataset_split")(f"is {wanted!r}, but {name} has {', '.join(splits) or 'no split'}")
    return splits[wanted]


def load_builder(name: str, path: str, config: SubsetConfig, **place: Any) -> Any:
    from datasets import load_dataset_builder

    return call(name, load_dataset_builder, path, config.dataset_config_name, **place)


def find_on_hub(name: str, config: SubsetConfig) -> tuple[str, Any]:
    """Return the name with its commit, and what reads it; from the library's cache where the hub is out of reach."""
    if not re.fullmatch(HUB_NAME, name):
        raise about(KEY, name)("is neither a folder nor the name of a data set on the hub")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = name.partition("@")
    try:
        info: Any = HfApi().repo_info(repository, repo_type="dataset", revision=revision or None, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError as error:  # the hub has answered
        raise about(KEY, name)(
            f"cannot be read: {first_line(error)}", "check the name, or run `hf auth login`"
        ) from error
    except Exception as error:  # each network library of the hub client has its own errors
        return find_cached(repository, revision, config, first_line(error))
    return f"{repository}@{info.sha}", load_builder(name, repository, config, revision=info.sha)


def find_cached(repository: str, revision: str, config: SubsetConfig, reason: str) -> tuple[str, Any]:
    """Return what `find_on_hub` does, of the commit in the library's cache; without one, of the newest there."""
    from datasets import config as settings
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    lacks = about(KEY, f"{repository}@{revision}" if revision else repository)
    if revision and not re.fullmatch(COMMIT, revision):
        raise lacks(f"cannot be looked up on the hub ({reason})", "write the commit, 40 digits, behind the @")
    owner, _, own = repository.rpartition("/")
    folder = "___".join(filter(None, (owner, camelcase_to_snakecase(own))))
    pattern = f"{folder}/{config.dataset_config_name or '*'}/*/{revision or '*'}"
    found = [path for path in Path(settings.HF_DATASETS_CACHE).glob(pattern) if (path / "dataset_info.json").is_file()]
    if not found:
        raise lacks(f"is neither a folder nor in the cache, and cannot be downloaded ({reason})")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    logger.warning("%s cannot be looked up on the hub (%s); reading %s", repository, reason, newest)
    config_name, version, commit = newest.parts[-3:]
    cached = call(
        repository, Cache, dataset_name=own, repo_id=repository, config_name=config_name, version=version, hash=commit
    )
    return f"{repository}@{commit}", cached


def call(name: str, function: Callable[..., T], *args: Any, **keywords: Any) -> T:
    """Call a function of the library, which raises anything. Raises UserError naming the data set."""
    try:
        return function(*args, **keywords)
    except MemoryError:
        raise
    except Exception as error:
        raise about(KEY, name, cause="unreadable")(f"cannot be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

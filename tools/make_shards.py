"""Write the images of a dataset file as tar shards, with an index and a dataset file that reads them. On request
also cache latents and text features, so that training loads neither the VAE nor the text encoders."""

import argparse
import glob
import io
import json
import logging
import os
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import toml

from library.base.atomic_files import atomic_path, remove_temporary, write_whole
from library.base.errors import NoDataFound, about, error_in
from library.base.json_text import parse_json
from library.base.progress import Bar, progress_bar
from library.base.terminal import print_line
from library.checkpoints.hashes import digest_of_file
from library.checkpoints.marks import MARK_FIELD, mark_of, read_mark, seal_text
from library.checkpoints.overwriting import FileKind, check_target, judge, known_by_start, sealed
from library.commands.command import make_training_parser, training_command
from library.commands.counted_plan import read_training_options, spec_of_script
from library.data.decoding.images import open_image
from library.data.description.dataset_file import load_dataset_config, read_description
from library.data.description.image_extensions import image_extensions
from library.data.description.schema import ALL_KEYS, DatasetConfig, RunDataConfig, SubsetConfig
from library.data.description.source_keys import SOURCES
from library.data.plan.collect import check_packages, collect
from library.data.scanned.images import ScannedImage
from library.data.scanned.names import safe_name
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.indexed.parquet_files import pyarrow_parquet
from library.data.sources.storage.source import load_source
from library.data.sources.storage.storage import Storage
from library.options.train import TrainOptions
from library.training.command_line.caching import cache_captions, cache_images
from library.training.command_line.option_checks import check_data

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python3 tools/make_shards.py --dataset_config configs/examples/dataset.toml --resolution 512 --out shards
  python3 tools/make_shards.py --script train_network.py --pretrained_model_name_or_path base.safetensors \\
    --dataset_config configs/examples/dataset.toml --resolution 512 --out shards --cache_latents_to_disk"""
DESCRIPTION = "dataset.toml"
WRITER = "tools/make_shards.py"
JOURNAL = known_by_start("a list of shards", lambda start: start.startswith(b"["))
CACHES = ("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk")
ENDING = ".txt"
MEMBERS = ("caption_extension", "caption_column", "image_column", "control_dirs", "control_columns")  # keys of sources
JPEG = ".jpg"
JPEG_FORMATS = ("JPEG", "MPO")  # phones and stereo cameras add further pictures to a JPEG, which Pillow calls MPO
LONGEST_NAME = 90  # bytes; longer names do not fit into a ustar header


@dataclass(frozen=True)
class Packed:
    """An image as a member of a shard, with its caption."""

    image: ScannedImage
    stem: str
    caption: str | None  # None if there is no caption; class_tokens may replace it

    @property
    def text(self) -> bytes | None:
        """Return the caption as UTF-8; None without a caption. Raises UserError if it cannot be encoded."""
        try:
            return None if self.caption is None else self.caption.encode()
        except UnicodeEncodeError as error:
            raise error_in(path=self.image.key)(
                f"the caption of {self.image.key} contains an unpaired surrogate at position {error.start}, which "
                "text files cannot store",
                "fix it in the metadata file",
            ) from None


def choose_extension(image: ScannedImage, content: bytes) -> str:
    """Return an image's extension in the shard: that of its file, else that of its format.

    Raises UserError for a format that readers of shards do not look for.
    """
    ending = os.path.splitext(image.key)[1].lower()
    if ending in image_extensions():
        return ending
    with open_image(image.key, content) as opened:
        name = str(opened.format)
    ending = JPEG if name in JPEG_FORMATS else f".{name.lower()}"
    if ending not in image_extensions():
        raise error_in(path=image.key)(
            f"{image.key} is an image in the format {name}, which is not read from shards",
            "convert it to PNG, JPEG or WebP, or train this dataset without shards",
        )
    return ending


def setup_parser() -> argparse.ArgumentParser:
    others = "the training, such as --dataset_config"
    parser = make_training_parser(__doc__, EXAMPLES, None, others)
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards, the index and the dataset file")
    parser.add_argument("--shard_mb", type=float, default=1000.0, help="size of a full shard (default: %(default)g)")
    parser.add_argument("--script", help=f"training script; required for --{CACHES[0]} and --{CACHES[1]}")
    return parser


def digest_source(source: str) -> str:
    """Return a digest of a folder, file or address."""
    full = source if "://" in source else os.path.abspath(source)
    return blake2b(os.fsencode(full), digest_size=8).hexdigest()


def shard_kind(source: str, recorded: Iterable["Shard"]) -> FileKind:
    """Return the kind of a shard with images of `source`, so that no other source with this name replaces it, with the
    content that was `recorded`, if any."""
    by_name = {shard.name: shard for shard in recorded}

    def is_own(path: Path) -> bool:
        return read_mark(path) == make_mark(source, path) and (
            path.name not in by_name or by_name[path.name].is_content_of(path)
        )

    return FileKind(f"a shard that {WRITER} packed from {source}, unchanged", is_own)


def make_mark(source: str, path: Path) -> str:
    return mark_of(f"{WRITER} {digest_source(source)}", path)


def check_shards(out: Path, name: str, source: str) -> None:
    """Raise UserError if the folder has shards or a list of them that an earlier call for this source did not write,
    or that have changed since. Reads each shard once."""
    journal = Journal.of(out, name)
    check_target("--out", journal.path, JOURNAL)
    kind = shard_kind(source, journal.read())
    for path in list_shards(out, name):
        check_target("--out", path, kind)


def name_members(subset: ScannedSubset) -> Iterator[Packed]:
    """Yield the images of a subset with their names in the shard; plain and unique file names are kept."""
    uncaptioned, names = set(subset.without_caption), set[str]()
    digits = len(str(len(subset.images)))
    for number, image in enumerate(subset.images):
        file_stem = os.path.splitext(os.path.basename(image.key))[0]
        is_plain = (
            file_stem == safe_name(file_stem)
            and "." not in file_stem
            and len(file_stem) <= LONGEST_NAME
            and file_stem not in names
        )
        stem = file_stem if is_plain else f"{number:0{digits}}"
        while stem in names:
            stem += "_"
        names.add(stem)
        yield Packed(image, stem, None if image.key in uncaptioned else image.caption)


def write_shards(subset: ScannedSubset, source: str, out: Path, name: str, shard_bytes: float, storage: Storage) -> str:
    """Write the images of a subset with their captions. Return the brace pattern of the shard files.

    The leading shards of an earlier call are kept, as far as this call would write the same content. Raises UserError
    for a file of a shard's name that another program wrote meanwhile.
    """
    remove_temporary(out, lambda stem: re.fullmatch(rf"{re.escape(name)}-\d{{5}}", stem) is not None)
    journal, members = Journal.of(out, name), iter(name_members(subset))
    recorded = journal.read()
    kind = shard_kind(source, recorded)
    shards, members = find_kept_shards(recorded, members, len(subset.images), out, shard_bytes, storage)
    # A run that is killed behind a new shard leaves no record of the one that it replaced.
    journal.write(shards)
    with progress_bar(f"packing {name}", len(subset.images)) as bar:
        if shards:
            bar.update(sum(shard.num_pictures for shard in shards))
            logger.info("keeping %d shards of %s with %d images", len(shards), name, bar.done)
        while (first := next(members, None)) is not None:
            path = out / f"{name}-{len(shards):05}.tar"
            check_target("--out", path, kind)
            with atomic_path(path) as temporary:
                mark = make_mark(source, path)
                written, is_full = write_shard(temporary, mark, chain([first], members), shard_bytes, storage, bar)
                inputs = digest_inputs(written, shard_bytes, storage)
                size, digest = temporary.stat().st_size, digest_of_file(temporary)
            shards.append(Shard(path.name, size, digest, len(written), is_full, inputs))
            journal.write(shards)
    for path in list_shards(out, name):
        if path.name not in {shard.name for shard in shards} and judge(path, kind) == "ours":
            logger.info("deleted %s from an earlier call", path)
            path.unlink()
    return f"{name}-{{00000..{len(shards) - 1:05}}}.tar"


def list_shards(out: Path, name: str) -> list[Path]:
    """Return the shard files of a subset in order."""
    candidates = sorted(out.glob(f"{glob.escape(name)}-*.tar"))
    return [path for path in candidates if re.fullmatch(rf"{re.escape(name)}-\d{{5}}\.tar", path.name)]


def write_shard(
    path: Path, mark: str, members: Iterator[Packed], shard_bytes: float, storage: Storage, bar: Bar
) -> tuple[list[Packed], bool]:
    """Write the next images to one shard. Return those images, and whether the shard is full."""
    written: list[Packed] = []
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={MARK_FIELD: mark}) as archive:
        for member in members:
            content, text = storage.whole(member.image)[1], member.text
            add_member(archive, f"{member.stem}{choose_extension(member.image, content)}", content)
            if text is not None:
                add_member(archive, f"{member.stem}{ENDING}", text)
            for number, reference in enumerate(member.image.references):
                content = storage.whole(reference)[1]
                add_member(archive, f"{member.stem}.control_{number}{choose_extension(reference, content)}", content)
            written.append(member)
            bar.update(1)
            if archive.offset >= shard_bytes:
                return written, True
    return written, False


# Finished shards of earlier calls


@dataclass(frozen=True)
class Shard:
    """A complete shard and a digest of its inputs."""

    name: str
    num_bytes: int
    digest: str
    num_pictures: int
    is_full: bool
    inputs: str  # digest of images, captions and the shard size

    def is_content_of(self, path: Path) -> bool:
        return path.stat().st_size == self.num_bytes and digest_of_file(path) == self.digest


@dataclass(frozen=True)
class Journal:
    """The file next to a subset's shards that lists the complete ones."""

    path: Path

    @classmethod
    def of(cls, out: Path, name: str) -> "Journal":
        return cls(out / f".{name}-shards.json")

    def read(self) -> list[Shard]:
        """Read the list; return an empty one if the file is missing or damaged."""
        try:
            return [Shard(**row) for row in parse_json(self.path.read_text(encoding="utf-8"))]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError):
            logger.warning("%s is damaged; repacking its shards", self.path)
            return []

    def write(self, shards: Sequence[Shard]) -> None:
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps([asdict(shard) for shard in shards]), encoding="utf-8")


def find_kept_shards(
    recorded: Sequence[Shard],
    members: Iterator[Packed],
    num_pictures: int,
    out: Path,
    shard_bytes: float,
    storage: Storage,
) -> tuple[list[Shard], Iterator[Packed]]:
    """Return the leading shards that this call would also write, and the remaining images.

    `num_pictures` is the number of `members`.
    """
    kept: list[Shard] = []
    num_left = num_pictures
    for shard in recorded:
        shard_members = list(islice(members, shard.num_pictures))
        num_left -= len(shard_members)
        # Counted: taking the next image to see if there is one, and putting it back, would nest an iterator per shard.
        grows = num_left > 0 and not shard.is_full
        if grows or not is_kept(shard, shard_members, out / shard.name, shard_bytes, storage):
            return kept, chain(shard_members, members)
        kept.append(shard)
    return kept, members


def is_kept(shard: Shard, members: Sequence[Packed], path: Path, shard_bytes: float, storage: Storage) -> bool:
    """Return True if a shard, whose content `check_shards` has compared, would still be written from these images."""
    is_same = len(members) == shard.num_pictures and digest_inputs(members, shard_bytes, storage) == shard.inputs
    return is_same and path.is_file()


def digest_inputs(members: Sequence[Packed], shard_bytes: float, storage: Storage) -> str:
    digest = blake2b(f"{shard_bytes}".encode(), digest_size=16)
    for member in members:
        references = [(reference.key, tuple(storage.version(reference))) for reference in member.image.references]
        identity = (member.stem, member.image.key, tuple(storage.version(member.image)), member.text)
        digest.update(repr((*identity, references) if references else identity).encode())
    return digest.hexdigest()


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file without owner and time, so that equal images give equal shards."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def refuse_other_folders(dataset: DatasetConfig) -> None:
    """Raise UserError for separate folders of masks or opposite images, which shards do not support."""
    if dataset.style == "masked":
        source = dataset.subsets[0].conditioning_data_dir
        raise error_in("conditioning_data_dir")(
            f"conditioning_data_dir {source}: shards do not support mask files",
            "store masks as the images' alpha channel and set alpha_mask, or train this dataset from its folders",
        )
    for subset in dataset.subsets:
        if subset.opposite_dir:
            raise error_in("opposite_dir")(
                f"opposite_dir {subset.opposite_dir}: shards do not support opposite images",
                "train this dataset from its folders",
            )


def pack(config: RunDataConfig, out: Path, shard_bytes: float, storage: Storage) -> list[list[str]]:
    """Write each source once. Return the shard pattern of each subset, by dataset."""
    for dataset in config.datasets:
        # All datasets are checked before the first is packed, which can take long.
        refuse_other_folders(dataset)
    names = name_sources(config)
    for subset, name in names.values():
        check_shards(out, name, subset.source)
    patterns: dict[tuple[Any, ...], str] = {}
    for key, (subset, name) in names.items():
        scanned = load_source(subset.source_key).scan(subset, storage, 16)
        if not scanned.images:
            raise NoDataFound(
                f"there are no images in {subset.source}", "remove the subset", path=subset.source, cause="missing"
            )
        patterns[key] = write_shards(scanned, subset.source, out, name, shard_bytes, storage)
    return [
        [(out / patterns[make_key(subset)]).resolve().as_posix() for subset in dataset.subsets]
        for dataset in config.datasets
    ]


def make_key(subset: SubsetConfig) -> tuple[Any, ...]:
    """Return what subsets with the same shards have in common: their files, and the rules that change captions."""
    rules = subset.captions
    files = (subset.source, subset.caption_extension, subset.caption_column, subset.image_column)
    references = (subset.control_dirs, subset.control_columns)
    lines = (rules.enable_wildcard, rules.enable_multiline_caption)
    return (files, references, lines, rules.caption_separator)


def name_sources(config: RunDataConfig) -> dict[tuple[Any, ...], tuple[SubsetConfig, str]]:
    """Return the first subset of each source with the name of its shards, by `make_key`."""
    names: dict[tuple[Any, ...], tuple[SubsetConfig, str]] = {}
    taken: set[str] = set()
    for dataset in config.datasets:
        for subset in dataset.subsets:
            if (key := make_key(subset)) not in names:
                names[key] = subset, name_shards(subset, taken)
    return names


def name_shards(subset: SubsetConfig, taken: set[str]) -> str:
    """Return a unique shard name for a subset, derived from its folder."""
    base = safe_name(os.path.splitext(subset.base_name)[0].strip("*?[]{}")).replace("%", "_") or "pictures"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    taken.add(name)
    return name


def describe_shards(content: Mapping[str, Any], patterns: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return the dataset file with shards in place of its sources, without disabled subsets."""
    replaced_keys = (*SOURCES, *MEMBERS, "cache_info", "subsets")

    def kept(table: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in table.items() if name not in replaced_keys}

    datasets = []
    for dataset, subset_patterns in zip(content["datasets"], patterns, strict=True):
        subsets = [subset for subset in dataset["subsets"] if is_drawn(subset, dataset, content)]
        shards = [{"shards": pattern, **kept(subset)} for subset, pattern in zip(subsets, subset_patterns, strict=True)]
        datasets.append({**kept(dataset), "subsets": shards})
    return {"general": {**kept(content.get("general", {})), "caption_extension": ENDING}, "datasets": datasets}


def is_drawn(subset: Mapping[str, Any], dataset: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    """Return True unless `num_repeats = 0` disables the subset."""
    name, default = "num_repeats", ALL_KEYS["num_repeats"].default
    tables = (subset, dataset, content.get("general", {}))
    return int(next((table[name] for table in tables if name in table), default)) > 0


def read_options(args: argparse.Namespace, training: Sequence[str]) -> TrainOptions:
    """Return the training options. Raises UserError for missing or contradictory ones."""
    options: TrainOptions = read_training_options(args.script or "train_network.py", training)[1]
    if options.dataset.dataset_config is None:
        raise about("--dataset_config", cause="missing")("is missing; it lists the images to pack")
    if args.shard_mb <= 0:
        raise about("--shard_mb")(f"is {args.shard_mb:g}, but must be above 0")
    requested = [name for name in CACHES if options.flat().get(name)]
    if requested and args.script is None:
        raise about(f"--{requested[0]}")("requires --script, the training script of the base model")
    check_data(options)
    return options


def make_shards(args: argparse.Namespace, training: Sequence[str]) -> None:
    """Write shards, index and dataset file. Raises UserError for invalid options and unreadable images."""
    options = read_options(args, training)
    pyarrow_parquet()  # the index of the shards requires it, which is written last
    config, storage = load_dataset_config(options), Storage(options.caching.cache_dir)
    check_packages(config)
    path, source = args.out / DESCRIPTION, Path(str(options.dataset.dataset_config))
    # The digest tells the dataset files for the shards of several ones apart.
    first_line = f"# Written by {WRITER} from {digest_source(str(source))} and replaced by its next call."
    kind = sealed(f"a dataset file that {WRITER} wrote from {source}, unchanged", first_line)
    check_target("--out", path, kind, [source])
    patterns = pack(config, args.out, args.shard_mb * 1e6, storage)
    content = toml.dumps(describe_shards(read_description(str(options.dataset.dataset_config)), patterns))
    write_whole(path, seal_text(first_line, content))
    dataset, caching = replace(options.dataset, dataset_config=path), replace(options.caching, cache_dir=None)
    options = replace(options, dataset=dataset, caching=caching)
    count = sum(len(subset.images) for dataset in collect(load_dataset_config(options)) for subset in dataset.subsets)
    logger.info("%d images are in the shards of %s", count, args.out)
    caches_text = bool(options.flat().get(CACHES[1]))
    if options.caching.cache_latents_to_disk or caches_text:
        arch = spec_of_script(args.script).build(options)
        if options.caching.cache_latents_to_disk:
            cache_images(options, arch.codec, arch.load.vae)
        if caches_text:
            cache_captions(options, arch)
    print_line(str(path))


main = training_command(setup_parser, make_shards)

if __name__ == "__main__":
    sys.exit(main())

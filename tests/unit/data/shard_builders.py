"""Small tar shards and Parquet files made from a folder of images, and datasets that read them."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from library.data.plan.data_plan import DataPlan
from library.data.sources.storage.storage import Storage
from tests.unit.data.builders import plan_of, write_config

DATASET = "[[datasets]]\nresolution = 64\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 64\n"
DATASET += "max_bucket_reso = 128\n[[datasets.subsets]]\n"


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a tar file with these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def shards_of(folder: Path, target: Path, count: int, caption: str = "txt") -> list[Path]:
    """Pack the images of a folder and their captions into `count` shards, in order of their names."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
    size = -(-len(files) // count)
    paths = []
    for number in range(count):
        members = []
        for file in files[number * size : (number + 1) * size]:
            members.append((file.name, file.read_bytes()))
            caption_file = file.with_suffix(".txt")
            if caption_file.exists():
                text = (
                    caption_file.read_bytes()
                    if caption == "txt"
                    else json.dumps({"caption": caption_file.read_text()}).encode()
                )
                members.append((f"{file.stem}.{caption}", text))
        paths.append(write_tar(target / f"{number:04}.tar", members))
    return paths


def write_parquet(path: Path, columns: Mapping[str, list[object]], group: int = 3) -> Path:
    """Write a Parquet file with `group` rows in each row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(dict(columns)), path, row_group_size=group)
    return path


def open_subset(folder: Path, subset: str, *arguments: str) -> DataPlan:
    """Build the plan of one subset; {here} stands for the folder."""
    options = write_config(folder / "data.toml", DATASET + subset)
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    return plan_of(options.with_values({name: values[name] for name in values}))


class CountedReads:
    """A log of the ranges that are read from files."""

    def __init__(self, monkeypatch) -> None:
        self.reads: list[tuple[str, int, int]] = []
        plain = Storage.read_range

        def record_read(storage: Storage, file: str, start: int, num_bytes: int) -> bytes:
            self.reads.append((Path(file).name, start, num_bytes))
            return plain(storage, file, start, num_bytes)

        monkeypatch.setattr(Storage, "read_range", record_read)

    @property
    def num_bytes(self) -> int:
        return sum(count for _, _, count in self.reads)

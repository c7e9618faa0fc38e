"""Measure the cost of a run's images before its first step, as ratios within one run.

The measured part reaches from the dataset file to the order of the first batches: folders, captions, sizes, buckets,
samples, audit. Each figure comes from a separate process, excluding imports, with a warm page cache, as the median of
`--rounds`. The first run finds no index next to the images and leaves one; the second run finds it. The baselines take
turns with them:

    bare read   list the folder, read the head of every image and every caption
    bare stat   list the folder, get size and time of every image and caption

    python benchmarks/startup.py --folder /tmp/startup --sizes 1000 10000 100000

With --index the images are rows of a made-up index of tar shards without pixels. This measures a start with very many
images once their facts are known: first with caches as cold as they are, then again.

    python benchmarks/startup.py --folder /tmp/startup --index 1000000
"""

import argparse
import gc
import io
import json
import logging
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.data.plan.data_plan import DataPlan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

NUM_KINDS = 40
KINDS = ("bare read", "first run", "bare stat", "second run")


def tags_of(number: int) -> str:
    """Return the caption of an image."""
    return f"1girl, solo, long hair, smile, outdoors, blue sky, style {number % 997}, number {number}"


def build_folder(folder: Path, count: int) -> None:
    """Write small images of 40 sizes (three JPEG to one PNG), each with a line of tags; existing ones are kept."""
    import numpy as np
    from PIL import Image

    if folder.is_dir() and len(os.listdir(folder)) >= 2 * count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    contents = []
    for i in range(NUM_KINDS):
        width, height = (4 * int(side) for side in rng.integers(8, 40, 2))
        target, extension = io.BytesIO(), "jpg" if i % 4 else "png"
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(target, {"jpg": "JPEG", "png": "PNG"}[extension])
        contents.append((target.getvalue(), extension))
    for i in range(count):
        content, extension = contents[i % NUM_KINDS]
        (folder / f"{i:06}.{extension}").write_bytes(content)
        (folder / f"{i:06}.txt").write_text(tags_of(i))


def build_index(folder: Path, count: int) -> None:
    """Write an index of shards with 1,000 images each; the shards are empty files. An existing index is kept."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from library.data.description.dataset_file import load_dataset_config
    from library.data.sources.indexed.parquet_index import ABOUT, schema_of_rows
    from library.data.sources.indexed.scan import describe_files, index_path
    from library.data.sources.shards import SOURCE
    from library.data.sources.storage.storage import Storage

    num_files = -(-count // 1000)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        if not (path := folder / f"{number:06}.tar").exists():
            path.touch()
    config = load_dataset_config(options_for(str(folder), f'shards = "{folder}/{{000000..{num_files - 1:06}}}.tar"'))  # type: ignore[arg-type]
    (subset,) = config.datasets[0].subsets
    _, shown, known = describe_files(subset, Storage(), 16, SOURCE.keys)
    path = index_path(shown, known, Storage())
    if path.exists():
        return
    rng = np.random.default_rng(0)
    numbers = np.arange(count)
    sides = (4 * rng.integers(8, 40, (NUM_KINDS, 2)))[numbers % NUM_KINDS]
    columns = {
        "file": (numbers // 1000).astype(np.int32), "name": [f"{i:07}.jpg" for i in range(count)],
        "start": numbers % 1000 * 300_000, "num_bytes": rng.integers(50_000, 290_000, count),
        "width": sides[:, 0].astype(np.int32), "height": sides[:, 1].astype(np.int32),
        "caption": list(map(tags_of, range(count))),
        "digest": [rng.bytes(16) for _ in range(count)], "problem": [None] * count, "url": [None] * count,
    }  # fmt: skip
    table = pa.table(columns, schema=schema_of_rows()).replace_schema_metadata({ABOUT: known.about()})
    parquet.write_table(table, path, compression="zstd")


def bare_read(folder: str) -> None:
    """Do the least work of a first start: read every file's head."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        handle = os.open(f"{folder}/{name}", os.O_RDONLY)
        os.read(handle, 4096)
        os.close(handle)


def bare_stat(folder: str) -> None:
    """Do the least work of a later start that notices edits: stat every file."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        os.stat(f"{folder}/{name}")


def options_for(folder: str, subset: str | None = None) -> object:
    """Return the options of a run on the images of a folder, or on another subset."""
    import pyarrow.parquet  # noqa: F401, imports are not measured

    import library.data.training_data  # noqa: F401
    from library.options.train import TrainOptions

    parser = argparse.ArgumentParser()
    TrainOptions.add_to(parser)
    config = Path(folder).with_suffix(".toml")
    config.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 4\nenable_bucket = true\nmin_bucket_reso = 64\n"
        'max_bucket_reso = 128\ncaption_extension = ".txt"\n[[datasets.subsets]]\n'
        + (subset or f'image_dir = "{folder}"')
    )
    return TrainOptions.from_args(parser.parse_args(["--dataset_config", str(config)]))


def ready(options: object) -> "tuple[DataPlan, object]":
    """Run the measured part of a start: plan, audit and the order of the first batches."""
    from library.data.plan.data_plan import build_plan
    from library.data.training_data import open_batches
    from library.protocols import LatentSpec

    spec = LatentSpec(channels=4, downscale=8, bucket_step=64, cache_suffix="_sd.npz", had_keys_without_size=True)
    plan = build_plan(options, spec, 1, None, None)  # type: ignore[arg-type]
    plan.audit(logging.getLogger("audit"))
    return plan, open_batches(plan).iterate_epoch(1, range(plan.num_batches), int, 0, False)


def bytes_to_worker(plan: "DataPlan") -> int:
    """Return the bytes sent to each spawned worker process; a forked one gets none."""
    from library.data.batches.planned import build_batch_maker
    from library.data.batches.shared import SharedMaker
    from library.data.caching.stores import NO_LATENTS, NO_TEXTS

    return len(ForkingPickler.dumps(SharedMaker.of(build_batch_maker(plan, NO_LATENTS, NO_TEXTS))))


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(kind: str, folder: str) -> dict[str, float]:
    """Return the CPU and wall seconds and the memory of one kind of start, measured in this process."""
    if kind in ("first run", "second run", "index"):
        shards = f'shards = "{folder}/{{000000..{len(list(Path(folder).glob("*.tar"))) - 1:06}}}.tar"'
        options = options_for(folder, shards if kind == "index" else None)
        work: Callable[[], Any] = lambda: ready(options)  # noqa: E731
    else:
        work = lambda: {"bare read": bare_read, "bare stat": bare_stat}[kind](folder)  # noqa: E731
    gc.collect()
    blocks = sys.getallocatedblocks()
    memory, peak = resident_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cpu, wall = time.process_time(), time.perf_counter()
    kept = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    gc.collect()
    grown = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak)
    found = {"cpu": cpu, "wall": wall, "kept": max(0, resident_bytes() - memory), "peak": grown}
    found["objects"] = sys.getallocatedblocks() - blocks
    if kind == "index":
        found["sent"] = bytes_to_worker(kept[0])
    return found


def forget(folder: Path) -> None:
    """Delete the index that an earlier run left next to the images."""
    for path in folder.glob(".*"):
        path.unlink()


def measure_in_child(kind: str, folder: Path) -> dict[str, float]:
    """Measure one kind of start in a fresh process."""
    command = [sys.executable, __file__, "--measure", kind, "--folder", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(found.stdout.splitlines()[-1]))


def report(folder: Path, count: int, rounds: int) -> None:
    """Print the figures for one number of images."""
    build_folder(folder, count)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        forget(folder)
        for kind in KINDS:
            found[kind].append(measure_in_child(kind, folder))
    for kind, bare in (("first run", "bare read"), ("second run", "bare stat")):
        ours, floor = (
            {name: statistics.median(one[name] for one in found[k]) for name in found[k][0]} for k in (kind, bare)
        )
        print(
            f"{count:>7} images, {kind:<10}: {ours['cpu']:.3f} CPU s ({ours['cpu'] / floor['cpu']:.2f} x {bare}, "
            f"{floor['cpu']:.3f} s), {ours['wall']:.3f} s, {ours['kept'] / count / 1000:.2f} kB per image "
            f"(peak {ours['peak'] / count / 1000:.2f})",
            flush=True,
        )


def report_index(folder: Path, count: int, rounds: int) -> None:
    """Print the cost of a start with an index of `count` images."""
    build_index(folder, count)
    for start in ("first", "again"):
        found = [measure_in_child("index", folder) for _ in range(1 if start == "first" else rounds)]
        median = {name: statistics.median(one[name] for one in found) for name in found[0]}
        print(
            f"{count:>7} images of an index, {start}: {median['cpu']:.2f} CPU s, {median['wall']:.2f} s, "
            f"{median['kept'] / count / 1000:.3f} kB per image (peak {median['peak'] / count / 1000:.3f}), "
            f"{median['objects'] / count:.4f} objects per image, {median['sent'] / 1000:.1f} kB to a fresh worker",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    from library.checkpoints.overwriting import FileKind, check_target
    from library.errors import UserError

    parser.add_argument("--folder", help="folder for the images, which are kept; unset: a temporary folder")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--index", type=int, help="rows of a made-up index, in place of --sizes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=(*KINDS, "index"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folders = {size: Path(args.folder or temporary) / f"pictures_{size}" for size in args.sizes}
        if args.index:
            folders = {args.index: Path(args.folder or temporary) / f"index_{args.index}"}
        try:
            kind = FileKind("a folder of this benchmark", is_of_benchmark, is_folder=True)
            for folder in folders.values():
                check_target("--folder", folder, kind)
        except UserError as error:
            parser.error(str(error))
        for size, folder in folders.items():
            (report_index if args.index else report)(folder, size, args.rounds)


def is_of_benchmark(folder: Path) -> bool:
    """Return True if a folder has only files of the names that this benchmark, and the suite's indices, have."""
    return all(re.fullmatch(r"\d{6}\.(jpg|png|txt|tar)|\..*", path.name) for path in folder.iterdir())


if __name__ == "__main__":
    main()

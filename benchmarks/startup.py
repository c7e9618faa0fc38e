"""What the pictures of a run cost before its first step, as ratios within one run.

Measured from the dataset file to the order of the first batches: folders, captions, sizes, buckets, draws, audit. Each
figure comes from a process of its own, imports excluded, page cache warm, the median of `--rounds`. The first run finds
no index beside the pictures and leaves one, the second run finds it. Baselines, taken in turn with them:

    bare read   list the folder, read the head of every picture and every caption
    bare look   list the folder, ask for size and time of every picture and caption

    python benchmarks/startup.py --folder /tmp/startup --sizes 1000 10000 100000
"""

import argparse
import gc
import io
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

NUM_KINDS = 40
KINDS = ("bare read", "first run", "bare look", "second run")


def build_folder(folder: Path, count: int) -> None:
    """Small pictures of forty sizes, three JPEG to one PNG, with a line of tags each; kept if they are there."""
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
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.save(target, {"jpg": "JPEG", "png": "PNG"}[extension])
        contents.append((target.getvalue(), extension))
    for i in range(count):
        content, extension = contents[i % NUM_KINDS]
        (folder / f"{i:06}.{extension}").write_bytes(content)
        tags = f"1girl, solo, long hair, smile, outdoors, blue sky, style {i % 997}, number {i}"
        (folder / f"{i:06}.txt").write_text(tags)


def bare_read(folder: str) -> None:
    """The least that a first start does."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        handle = os.open(f"{folder}/{name}", os.O_RDONLY)
        os.read(handle, 4096)
        os.close(handle)


def bare_look(folder: str) -> None:
    """The least that a later start does which notices edits."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        os.stat(f"{folder}/{name}")


def options_for(folder: str) -> object:
    """The options of a run on the pictures of a folder."""
    import library.data.batches.dataset  # noqa: F401, imports are not measured
    from library.options.train import TrainOptions

    parser = argparse.ArgumentParser()
    TrainOptions.add_to(parser)
    config = Path(folder).with_suffix(".toml")
    config.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 4\nenable_bucket = true\nmin_bucket_reso = 64\n"
        f'max_bucket_reso = 128\n[[datasets.subsets]]\nimage_dir = "{folder}"\ncaption_extension = ".txt"\n'
    )
    return TrainOptions.from_args(parser.parse_args(["--dataset_config", str(config)]))


def ready(options: object) -> object:
    """The measured part of a start."""
    from library.data.batches.dataset import TrainingSet
    from library.protocols import LatentSpec

    spec = LatentSpec(channels=4, downscale=8, bucket_step=64, cache_suffix="_sd.npz", had_keys_without_size=True)
    training_set = TrainingSet.build(options, spec, 1, None, None)  # type: ignore[arg-type]
    training_set.audit(logging.getLogger("audit"))
    return training_set, training_set.batches(1, range(training_set.num_batches), lambda i: i, 0, False)


def resident_bytes() -> int:
    """Memory of this process that lies in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(kind: str, folder: str) -> dict[str, float]:
    """CPU and wall seconds and memory of one kind, in this process."""
    if kind in ("first run", "second run"):
        options = options_for(folder)
        work: Callable[[], object] = lambda: ready(options)  # noqa: E731
    else:
        work = lambda: {"bare read": bare_read, "bare look": bare_look}[kind](folder)  # noqa: E731
    gc.collect()
    memory, peak = resident_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cpu, wall = time.process_time(), time.perf_counter()
    kept = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    gc.collect()
    grown = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak)
    found = {"cpu": cpu, "wall": wall, "kept": max(0, resident_bytes() - memory), "peak": grown}
    del kept
    return found


def forget(folder: Path) -> None:
    """Remove what an earlier run has left beside the pictures."""
    for path in folder.glob(".*"):
        path.unlink()


def measured(kind: str, folder: Path) -> dict[str, float]:
    """The figures of one kind from a fresh process."""
    command = [sys.executable, __file__, "--measure", kind, "--folder", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(found.stdout.splitlines()[-1]))


def report(folder: Path, count: int, rounds: int) -> None:
    """Print the figures of one size."""
    build_folder(folder, count)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        forget(folder)
        for kind in KINDS:
            found[kind].append(measured(kind, folder))
    for kind, bare in (("first run", "bare read"), ("second run", "bare look")):
        ours, floor = (
            {name: statistics.median(one[name] for one in found[k]) for name in found[k][0]} for k in (kind, bare)
        )
        print(
            f"{count:>7} pictures, {kind:<10}: {ours['cpu']:.3f} CPU s ({ours['cpu'] / floor['cpu']:.2f} x {bare}, "
            f"{floor['cpu']:.3f} s), {ours['wall']:.3f} s, {ours['kept'] / count / 1000:.2f} kB a picture "
            f"(peak {ours['peak'] / count / 1000:.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the pictures are made and kept; a temporary folder if not given")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        for size in args.sizes:
            report(Path(args.folder or temporary) / f"pictures_{size}", size, args.rounds)


if __name__ == "__main__":
    main()

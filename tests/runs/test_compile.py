"""Compilations of a whole run: as many as there are kinds of blocks, regardless of captions and sizes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.running import ROOT, Finished, make_images, small_run
from tests.tiny.bases import BASES

TOGETHER = (
    "--gradient_checkpointing", "--network_args", "dora_wd=True", "--base_format", "int8", "--base_arithmetic", "8bit",
    "--compile", "--compile_backend", "eager", "--no_report", "--train_batch_size", "1",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("zimage", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in BASES if name != "zimage"),
    ],
)
def test_captions_and_buckets_add_no_compilation(name: str, train: Callable[..., Finished], tmp_path: Path) -> None:
    from torch import _dynamo

    base = BASES[name]
    model, graphs = base.build(tmp_path / "model"), []
    for folder, lengths, sizes in (("one", [3], [(64, 64)]), ("many", [1, 70], [(64, 64), (128, 64)])):
        images = make_images(tmp_path / folder / "1_thing", len(lengths) * len(sizes))
        for number, path in enumerate(sorted(images.glob("*.png"))):
            Image.open(path).resize(sizes[number % len(sizes)]).save(path)
            path.with_suffix(".txt").write_text("red " * lengths[number // len(sizes)])
        _dynamo.reset()
        _dynamo.utils.counters.clear()
        # The first step of each shape is uncompiled, because its operations are counted.
        words = small_run(tmp_path / folder, tmp_path, base.module, str(2 * len(lengths) * len(sizes)))
        train([*model, *words, *TOGETHER, "--enable_bucket", "--min_bucket_reso", "64"], script=base.script).ok()
        graphs.append(_dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] <= graphs[0]


@pytest.mark.nightly
def test_compiling_the_blocks_of_sdxl_leaves_few_generated_kernels() -> None:
    words = [sys.executable, "-m", "benchmarks", "compiled_blocks"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    rows = [[int(cell) for cell in line.split("|")[2:6]] for line in lines]
    *kinds, (num_blocks, eager, generated, called) = rows
    assert num_blocks == 87 and all(row[1] > row[2] + row[3] for row in kinds)
    assert generated < called < generated + called < 0.8 * eager

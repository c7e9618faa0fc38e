"""Columnar storage of images, and flat dataset files of musubi-tuner."""

import gc
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from library.base.errors import UserError
from library.base.randomness import random_for
from library.data.description.buckets import BucketRules, Shape
from library.data.description.dataset_file import load_dataset_config
from library.data.description.schema import DatasetConfig, RunDataConfig, SubsetConfig
from library.data.plan import data_plan
from library.data.plan.order import Bucket, epoch_batches
from library.data.plan.samples import Sample, build_draws, build_samples
from library.data.scanned.columns import BLOCK, Texts
from library.data.scanned.images import ImageLocation, ImageLocations, ScannedImage, ScannedImages
from library.data.scanned.subsets import ScannedDataset, ScannedSubset
from library.options.train import TrainOptions
from tests.unit.data.builders import options_of, plan_of, write_config, write_folder

ALPHABETS = {"ascii": "ab ,1", "wide": "aé猫\U0001f431", "bytes of a file name": "a\udc80\udcff"}


def random_texts(alphabet: str, count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.choice([0, 1, 7, 40]))) for _ in range(count)]


@pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=list(ALPHABETS))
@pytest.mark.parametrize("count", [0, 1, 300, BLOCK + 3])
def test_a_text_column_survives_a_round_trip(alphabet: str, count: int) -> None:
    texts = random_texts(alphabet, count, seed=count)
    column = Texts.of(texts)
    places = random.Random(count).choices(range(-count, count), k=min(count, 50))
    rows = np.array(places, dtype=np.int64) % max(count, 1)
    assert list(column) == texts and len(column) == count and column == Texts.of(texts)
    assert [column[place] for place in places] == [texts[place] for place in places]
    assert list(column.take(rows)) == [texts[row] for row in rows]
    assert column[1:4] == texts[1:4]
    with pytest.raises(IndexError):
        column[count]


def test_text_columns_with_different_boundaries_are_not_equal() -> None:
    assert Texts.of(["ab", "c"]) != Texts.of(["a", "bc"])


def make_images(count: int, seed: int) -> ScannedImages:
    """Build images in three files, the last of which means that each image is a separate file."""
    rng = np.random.default_rng(seed)
    return ScannedImages(
        names=Texts.of(f"{i:07}.jpg" for i in range(count)),
        captions=Texts.of(f"an image, number {i}, of {i % 97}" for i in range(count)),
        sizes_N2=rng.integers(40, 200, (count, 2), dtype=np.int32),
        locations=ImageLocations(
            ("a/one.tar?key", "two.tar", ""),
            ("a/one.tar", "two.tar", ""),
            np.sort(rng.integers(0, 3, count, dtype=np.int32)),
            rng.integers(0, 1 << 40, count),
            rng.integers(0, 1 << 20, count),
            rng.integers(0, 256, (count, 16), dtype=np.uint8),
        ),
    )


def test_images_are_equal_however_they_are_accessed() -> None:
    images = make_images(50, seed=3)
    listed = list(images)
    rows = np.array([4, 49, 4, 0])
    assert listed == [images[i] for i in range(50)]
    assert list(images.take(rows)) == [listed[row] for row in rows]
    assert list(images.keys_at(rows)) == [listed[row].key for row in rows]
    assert listed[0].key == "a/one.tar/0000000.jpg" and listed[49].key == "0000049.jpg"
    assert listed[0].location.file == "a/one.tar?key"
    assert listed[49].location == ImageLocation(
        "",
        "0000049.jpg",
        int(images.locations.start_N[49]),
        int(images.locations.bytes_N[49]),
        bytes(images.locations.digest_N16[49].tolist()).hex(),
    )


RULES = BucketRules((96, 96), True, 64, 128, 32, False, 32).checked()


def dataset_of(images: ScannedImages, **changed: object) -> ScannedDataset:
    values = {name: None for name in SubsetConfig.__dataclass_fields__}
    subset = SubsetConfig(**values | {"style": "dreambooth", "num_repeats": 2, "is_reg": False} | changed)
    values = {name: None for name in DatasetConfig.__dataclass_fields__}
    config = DatasetConfig(**values | {"batch_size": 3, "subsets": (subset,), "style": "dreambooth"})
    return ScannedDataset(config, (ScannedSubset(subset, images),))


def test_samples_are_equal_however_they_are_accessed() -> None:
    datasets = [dataset_of(make_images(20, seed=1)), dataset_of(make_images(30, seed=2), num_repeats=5)]
    samples = build_samples(datasets, [RULES, RULES])
    listed = list(samples)
    assert listed == [samples[i] for i in range(50)] == samples[:50] and listed[-1] == samples[-1]
    assert [sample.subset for sample in listed] == samples.subset_of_each().tolist() == [0] * 20 + [1] * 30
    assert [sample.num_draws for sample in listed] == [2] * 20 + [5] * 30
    assert [list(sample.image.size) for sample in listed] == samples.sizes().tolist()
    shape = Shape((64, 64), (70, 64))
    draws_N = np.arange(50, dtype=np.int32)
    changed = samples.changed({7: shape}, draws_N)
    assert list(changed) == [
        sample._replace(num_draws=i, shape=shape if i == 7 else sample.shape) for i, sample in enumerate(listed)
    ]
    with pytest.raises(IndexError):
        samples[50]


def test_every_draw_is_in_the_bucket_of_its_sample() -> None:
    datasets = [dataset_of(make_images(40, seed=5)), dataset_of(make_images(25, seed=6), num_repeats=3)]
    samples = build_samples(datasets, [RULES, RULES])
    draws = build_draws(samples, [dataset.config for dataset in datasets], {0, 1})
    expected: dict[tuple[int, tuple[int, int]], list[Sample]] = {}
    for sample in samples:
        expected.setdefault((sample.dataset, sample.shape.bucket), []).extend([sample] * sample.num_draws)
    assert [(bucket.dataset, bucket.size) for bucket in draws.buckets] == sorted(expected)
    for bucket in draws.buckets:
        drawn = [samples[int(draws.sample_of_draw[draw])] for draw in bucket.draws]
        assert drawn == expected[bucket.dataset, bucket.size]


@pytest.mark.parametrize("seed", [1, 88])
def test_the_order_of_an_epoch_matches_shuffled_lists(seed: int) -> None:
    buckets = [
        Bucket(0, (64, 64), 4, range(0, 23)),
        Bucket(0, (96, 64), 3, range(23, 30)),
        Bucket(1, (64, 64), 1, [30]),
    ]
    expected = []
    for number, bucket in enumerate(buckets):
        draws = list(bucket.draws)
        random_for(seed, "draw order", 6, number).shuffle(draws)
        expected += [tuple(draws[i : i + bucket.batch_size]) for i in range(0, len(draws), bucket.batch_size)]
    random_for(seed, "batch order", 6).shuffle(expected)
    actual = epoch_batches(buckets, seed, 6)
    assert list(actual) == expected and actual[2:4] == expected[2:4] and len(actual) == len(expected)


def test_the_plan_and_order_of_many_images_take_few_objects() -> None:
    count = 20_000
    images = make_images(count, seed=9)
    gc.collect()
    before = sys.getallocatedblocks()
    samples = build_samples([dataset_of(images)], [RULES])
    draws = build_draws(samples, [dataset_of(images).config], {0})
    order = epoch_batches(draws.buckets, 1, 1)
    gc.collect()
    assert (sys.getallocatedblocks() - before) / count < 0.2, "an object for each image would be 1 and more"
    assert len(order) >= 2 * count / 3 and isinstance(samples[5].image, ScannedImage)


def test_a_folder_of_images_takes_few_objects(tmp_path) -> None:
    """Compare two folder sizes, since what a run allocates apart from its images is constant."""
    num_blocks = []
    for count in (20, 220):
        write_folder(tmp_path / f"pictures{count}", count)
        config = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{{here}}/pictures{count}"\n'
        options = write_config(tmp_path / f"{count}.toml", config + 'caption_extension = ".txt"\n')
        plan_of(options)  # allocate what a process allocates only once
        gc.collect()
        before = sys.getallocatedblocks()
        plan = plan_of(options)
        gc.collect()
        num_blocks.append(sys.getallocatedblocks() - before)
        del plan
    assert (num_blocks[1] - num_blocks[0]) / 200 < 0.2


def test_the_collector_pauses_while_a_plan_is_built(tmp_path, monkeypatch) -> None:
    """Among the objects of many images, its searches take longer than the rest of the start."""
    states: list[bool] = []
    check = data_plan.check_images
    monkeypatch.setattr(data_plan, "check_images", lambda scanned: (states.append(gc.isenabled()), check(scanned)))
    plan_of(options_of("--resolution 64", "--train_data_dir", str(write_folder(tmp_path / "1_a", 1).parent)))
    assert states == [False] and gc.isenabled()


def private_bytes() -> int:
    """Return the number of bytes in this process's private dirty pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells")
def test_a_forked_worker_copies_no_memory_of_the_images_it_reads() -> None:
    """Python objects would be copied with their pages, since reading one changes its reference count."""
    count = 300_000
    samples = build_samples([dataset_of(make_images(count, seed=4))], [RULES])
    gc.collect()
    ours, theirs = os.pipe()
    if (worker := os.fork()) == 0:
        gc.disable()
        before = private_bytes()
        keys = sum(len(samples[number].image.key) for number in range(0, count, 5))
        os.write(theirs, f"{private_bytes() - before} {keys}".encode())
        os._exit(0)
    os.waitpid(worker, 0)
    grown, keys = map(int, os.read(ours, 100).split())
    os.close(ours)
    os.close(theirs)
    columns = samples.subsets[0].captions.content.nbytes + samples.subsets[0].names.content.nbytes
    assert keys > count and columns > 10e6 and grown < columns / 4


# Dataset files of musubi-tuner, where each dataset is a folder or a JSONL file.


def read_config(path: Path, text: str) -> RunDataConfig:
    path.write_text(text)
    return load_dataset_config(TrainOptions().with_values({"dataset_config": str(path)}))


GENERAL = """
[general]
resolution = [960, 544]
caption_extension = ".txt"
batch_size = 2
enable_bucket = true
bucket_no_upscale = false
"""


def test_a_dataset_that_is_a_folder_has_one_subset(tmp_path: Path) -> None:
    config = read_config(
        tmp_path / "data.toml",
        f"""{GENERAL}
[[datasets]]
image_directory = "images"
cache_directory = "cache"
num_repeats = 3

[[datasets]]
image_jsonl_file = "more.jsonl"
resolution = 512
bucket_no_upscale = true
""",
    )
    first, second = config.datasets
    assert (first.resolution, first.batch_size, first.enable_bucket) == ((960, 544), 2, True)
    assert (first.min_bucket_reso, first.max_bucket_reso, first.bucket_reso_steps) == (0, 3840, 0)
    (subset,) = first.subsets
    assert (subset.image_dir, subset.num_repeats, subset.caption_extension) == ("images", 3, ".txt")
    assert subset.cache_directory == "cache"
    (subset,) = second.subsets
    assert (subset.metadata_file, subset.num_repeats, subset.style) == ("more.jsonl", 1, "metadata")
    assert second.bucket_no_upscale and second.resolution == (512, 512)


def test_a_flat_dataset_equals_one_with_a_subset(tmp_path: Path) -> None:
    flat = read_config(tmp_path / "a.toml", f'{GENERAL}[[datasets]]\nimage_directory = "images"\nflip_aug = true\n')
    steps = "bucket_reso_steps = 0\nmin_bucket_reso = 0\nmax_bucket_reso = 3840\nflip_aug = true\n"
    nested = f'{GENERAL}[[datasets]]\n{steps}[[datasets.subsets]]\nimage_dir = "images"\n'
    assert flat == read_config(tmp_path / "b.toml", nested)


def test_json_files_may_be_flat(tmp_path: Path) -> None:
    content = {"datasets": [{"image_directory": "images", "resolution": 256}]}
    config = read_config(tmp_path / "data.json", json.dumps(content))
    assert config.datasets[0].subsets[0].image_dir == "images"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[datasets]]\nvideo_directory = "v"\n', r"\['subsets'\] must be an array of tables"),
        ('[[datasets]]\nimage_directory = "a"\nmultiple_target = true\n', r"\['multiple_target'\] is not a key"),
        ("[[datasets]]\nimage_directory = 3\n", r"\['image_dir'\] is 3, but must be text in quotes"),
        (
            '[[datasets]]\nimage_directory = "a"\n[[datasets.subsets]]\nimage_dir = "b"\n',
            r"\['image_directory'\] is not a key",
        ),
    ],
)
def test_invalid_keys_raise_errors_that_name_them(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "data.toml", text)

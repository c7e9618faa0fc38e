"""The validation set, which is identical in every validation."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from library.data.caching.latents import cache_latents
from library.data.plan.data_plan import DataPlan
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from tests.unit.data.builders import (
    averaging_vae,
    batches_of,
    content_of,
    plan_of,
    validation_of,
    write_config,
    write_folder,
)

AUGMENTED = """
[general]
enable_bucket = true
min_bucket_reso = 64
caption_extension = ".txt"
shuffle_caption = true
caption_dropout_rate = 0.5
caption_tag_dropout_rate = 0.3
caption_dropout_every_n_epochs = 1
token_warmup_step = 50
flip_aug = true
[[datasets]]
resolution = 96
batch_size = 2
validation_split = 0.5
  [[datasets.subsets]]
  image_dir = "{here}/wide"
  num_repeats = 4
  random_crop = CROP
  color_aug = CROP
  caption_prefix = "photo,"
  [[datasets.subsets]]
  image_dir = "{here}/tall"
"""


def open_augmented(tmp_path: Path, crop: bool = True) -> DataPlan:
    write_folder(tmp_path / "wide", 6, (130, 64), "a, b, c, d", seed=1)
    write_folder(tmp_path / "tall", 6, (64, 130), "{e|f|g|h}, i", seed=2)
    return plan_of(write_config(tmp_path / "data.toml", AUGMENTED.replace("CROP", str(crop).lower())))


def contents(plan: DataPlan, num_threads: int = 0) -> list[tuple[object, ...]]:
    images = validation_of(plan)
    return [content_of(batch) for batch in images.batches(images.select_batches(None), num_threads)]


def test_validation_images_are_not_augmented(tmp_path):
    plan = open_augmented(tmp_path)
    batches = list(validation_of(plan).batches(validation_of(plan).select_batches(None), 0))
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == 6 and Counter(os.path.basename(os.path.dirname(key)) for key in keys) == {"wide": 3, "tall": 3}
    for batch in batches:
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            number = os.path.basename(key)[1]
            expected = f"photo, a, b, c, d {number}" if "wide" in key else f"{{e|f|g|h}}, i {number}"
            assert caption == expected
        assert batch.loss_weights_B.tolist() == [1.0] * len(batch.keys)
    plain = contents_without_augmentation(tmp_path)
    assert contents(plan) == plain == contents(plan)


def contents_without_augmentation(tmp_path: Path) -> list[tuple[object, ...]]:
    """Return the samples of a dataset file without augmentation."""
    text = AUGMENTED[AUGMENTED.index("[[datasets]]") :].replace("CROP", "false")
    head = '[general]\nenable_bucket = true\nmin_bucket_reso = 64\ncaption_extension = ".txt"\n'
    return contents(plan_of(write_config(tmp_path / "plain.toml", head + text)))


def test_wildcards_are_drawn_once_with_the_validation_seed(tmp_path):
    write_folder(tmp_path / "a", 20, caption="{e|f|g|h}")
    text = "[[datasets]]\nresolution = 64\nvalidation_split = 0.9\nenable_wildcard = true\ncaption_extension = '.txt'\n"
    options = write_config(tmp_path / "data.toml", text + "[[datasets.subsets]]\nimage_dir = '{here}/a'\n")
    plan = plan_of(options)

    def captions(plan: DataPlan) -> list[str]:
        return [batch.captions[0] for batch in validation_of(plan).batches(range(18), 0)]

    drawn = captions(plan)
    list(batches_of(plan))
    assert captions(plan) == drawn and len({caption[0] for caption in drawn}) == 4


def test_threads_do_not_change_the_batches(tmp_path):
    plan = open_augmented(tmp_path)
    alone = contents(plan)
    assert len(alone) == 4
    for num_threads in (1, 3):
        assert contents(plan, num_threads) == alone


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_damaged_image_is_replaced_by_another_held_out_one(tmp_path, num_threads, caplog):
    plan = open_augmented(tmp_path)
    aside = {key for batch in validation_of(plan).batches(range(4), 0) for key in batch.keys}
    path = Path(next(iter(validation_of(plan).batches([0], 0))).keys[0])
    path.write_bytes(path.read_bytes()[:2000])
    measured = {key for batch in validation_of(plan).batches(range(4), num_threads) for key in batch.keys}
    assert measured == aside - {str(path)} and f"{path} is damaged" in caplog.text


def test_a_limit_selects_batches_evenly(tmp_path):
    images = validation_of(open_augmented(tmp_path))
    assert images.select_batches(None) == images.select_batches(9) == [0, 1, 2, 3]
    assert images.select_batches(2) == [0, 2] and images.select_batches(1) == [0]


def test_identities_and_order_depend_on_the_contents_and_not_on_file_names(tmp_path):
    first = validation_of(open_augmented(tmp_path / "one"))
    (tmp_path / "two").mkdir()
    numbers = iter(reversed(range(100)))
    for folder in ("wide", "tall"):
        (tmp_path / "two" / folder).mkdir()
        for image in (tmp_path / "one" / folder).glob("*.png"):
            target = tmp_path / "two" / folder / f"other{next(numbers):02}.png"
            target.write_bytes(image.read_bytes())
            target.with_suffix(".txt").write_bytes(image.with_suffix(".txt").read_bytes())
    second = validation_of(plan_of(write_config(tmp_path / "two" / "data.toml", AUGMENTED.replace("CROP", "true"))))
    assert [first.identify_images(i) for i in range(4)] == [second.identify_images(i) for i in range(4)]
    assert len({name for i in range(4) for name in first.identify_images(i)}) == 6
    captions = [[batch.captions for batch in images.batches(range(4), 0)] for images in (first, second)]
    assert captions[0] == captions[1]
    assert {label.split("/")[0] for i in range(4) for label in first.labels(i)} == {"'wide", "'tall"}


def test_copies_of_an_image_have_the_same_identity(tmp_path):
    write_folder(tmp_path / "a", 2, seed=1)
    write_folder(tmp_path / "b", 2, seed=1)
    text = "[[datasets]]\nresolution = 64\nbatch_size = 4\nvalidation_split = 1.0\n"
    text += "".join(f"[[datasets.subsets]]\nimage_dir = '{{here}}/{name}'\n" for name in "ab")
    text += "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/c'\n"
    write_folder(tmp_path / "c", 1, seed=2)
    images = validation_of(plan_of(write_config(tmp_path / "data.toml", text)))
    names = images.identify_images(0)
    assert names[0] == names[1] != names[2] == names[3]


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_latents_are_used_for_training_and_validation(tmp_path, to_disk):
    plan = open_augmented(tmp_path, crop=False)
    calls: list[int] = []
    options = CachingOptions(cache_latents=True, cache_latents_to_disk=to_disk)
    validation = open_batches(plan, cache_latents(plan, averaging_vae(calls), lambda: "vae", options, 1)).validation
    assert sum(calls) == 6 * 2 + 6  # only trained images have mirrored copies
    batches = list(validation.batches(validation.select_batches(None), 2))
    assert all(batch.latents_BCHW is not None and batch.pixels_BCHW is None for batch in batches)
    plan = reopen_augmented(tmp_path)
    again = open_batches(plan, cache_latents(plan, averaging_vae(calls), lambda: "vae", options, 1)).validation
    assert sum(calls) == 18 * (1 if to_disk else 2)
    for batch, other in zip(batches, again.batches(again.select_batches(None), 0), strict=True):
        assert batch.latents_BCHW is not None and other.latents_BCHW is not None
        assert torch.equal(batch.latents_BCHW, other.latents_BCHW)


def reopen_augmented(tmp_path: Path) -> DataPlan:
    return plan_of(write_config(tmp_path / "data.toml", AUGMENTED.replace("CROP", "false")))


def test_trained_images_can_be_measured_like_held_out_ones(tmp_path):
    """Measure the requested number of trained images with full captions, and mirrored copies of their exact pixels."""
    plan = open_augmented(tmp_path)
    aside = {key for batch in validation_of(plan).batches([0, 1, 2, 3], 0) for key in batch.keys}
    limited, numbers = plan.limited_to_measured(4, list(validation_of(plan).iterate_samples([0])))
    remaining = {sample.image.key for sample in limited.samples if sample.num_draws}
    assert len(numbers) == 4 and len(remaining) == 6 and len(remaining & aside) == 2  # one batch of two
    plain, mirrored = (open_batches(limited).measured(numbers, is_mirrored) for is_mirrored in (False, True))
    batch_indices = plain.select_batches(None)
    assert plain.num_images == 4
    assert [plain.identify_images(i) for i in batch_indices] == [mirrored.identify_images(i) for i in batch_indices]
    for plain_batch, mirrored_batch in zip(
        plain.batches(batch_indices, 0), mirrored.batches(batch_indices, 0), strict=True
    ):
        assert (
            plain_batch.keys == mirrored_batch.keys
            and not aside & set(plain_batch.keys)
            and plain_batch.captions == mirrored_batch.captions
        )
        assert plain_batch.pixels_BCHW is not None and mirrored_batch.pixels_BCHW is not None
        assert torch.equal(plain_batch.pixels_BCHW.flip(-1), mirrored_batch.pixels_BCHW)
        for key, caption in zip(plain_batch.keys, plain_batch.captions, strict=True):
            start = "photo, a, b, c, d" if "wide" in key else "{e|f|g|h}, i"
            assert caption == f"{start} {os.path.basename(key)[1]}"

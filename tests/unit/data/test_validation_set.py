"""The validation set, which is identical in every validation, and how images are split off for it."""

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.caching.latents import cache_latents
from library.data.plan.data_plan import DataPlan
from library.data.plan.validation_split import SplitSpec, choose, hash_file
from library.data.sources.folders import image_index
from library.data.sources.storage.index_places import IndexPlaces
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from tests.unit.data.builders import (
    averaging_vae,
    batches_of,
    content_of,
    options_of,
    plan_of,
    validation_of,
    write_config,
    write_folder,
    write_image,
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


# The validation split: no image is both trained and held out.


def short_names(paths) -> set[str]:
    return {f"{os.path.basename(os.path.dirname(path))}/{os.path.basename(path)}" for path in paths}


def trained_names(plan: DataPlan) -> set[str]:
    return short_names(key for batch in batches_of(plan) for key in batch.keys)


def held_out(plan: DataPlan) -> list[str]:
    images = validation_of(plan)
    return [key for batch in images.batches(images.select_batches(None), 0) for key in batch.keys]


# The choice of images


SPLITS = st.lists(
    st.builds(
        SplitSpec,
        st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=12),
        st.floats(0.01, 1.0),
        st.integers(-(2**63), 2**63),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(SPLITS, st.sets(st.sampled_from("abcdefghijklmnop"), max_size=3))
def test_no_image_is_ever_both_trained_and_held_out(split_specs, always_trained):
    aside = choose(split_specs, always_trained)
    assert not aside & always_trained
    assert aside <= {identity for wish in split_specs for identity in wish.identities}
    for wish in split_specs:
        num_aside = sum(identity in aside for identity in wish.identities)
        if wish.share == 1:  # larger splits choose first, so only regularisation images are excluded
            assert num_aside == sum(identity not in always_trained for identity in wish.identities)


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(-5, 2**64))
def test_a_single_subset_gets_its_share_rounded_to_the_nearest_image(count, share, seed):
    identities = [f"picture {i}" for i in range(count)]
    aside = choose([SplitSpec(identities, share, seed)], set())
    assert len(aside) == min(round(count * share), count - 1)
    assert choose([SplitSpec(identities[::-1], share, seed)], set()) == aside  # the order does not matter


def test_seeds_choose_differently_and_all_images_are_equally_likely():
    identities = [str(i) for i in range(20)]
    chosen = [frozenset(choose([SplitSpec(identities, 0.25, seed)], set())) for seed in range(400)]
    assert len(set(chosen)) > 350
    counts = Counter(identity for aside in chosen for identity in aside)
    # Binomial(400, 0.25) has mean 100 and standard deviation 8.7; allow five standard deviations.
    assert set(counts) == set(identities) and all(57 < count < 143 for count in counts.values())


def test_a_larger_share_contains_the_images_of_a_smaller_one():
    identities = [str(i) for i in range(30)]
    small, large = (choose([SplitSpec(identities, share, 7)], set()) for share in (0.1, 0.5))
    assert small < large


def test_subsets_with_other_seeds_agree_about_images_they_share():
    shared = [str(i) for i in range(10)]
    aside = choose([SplitSpec(shared, 0.3, 1), SplitSpec(shared, 0.3, 2)], set())
    assert len(aside) == 3


# From files


def test_both_sides_of_a_split_make_up_the_folder(tmp_path):
    write_folder(tmp_path / "3_a", 10)
    arguments = ["--train_data_dir", str(tmp_path), "--caption_extension", ".txt", "--validation_split", "0.3"]
    plan = plan_of(options_of("--resolution 64 --train_batch_size 2", *arguments))
    aside = held_out(plan)
    assert len(aside) == 3 == validation_of(plan).num_images  # repeats do not count
    assert plan.num_train_images == 7 * 3 == len(batches_of(plan)) * 2 - 1
    assert trained_names(plan) | short_names(aside) == {f"3_a/p{i}.png" for i in range(10)}
    assert not trained_names(plan) & short_names(aside)
    other = plan_of(options_of("--resolution 64", *arguments), seed=2)
    assert held_out(other) != aside
    fixed = [plan_of(options_of("--resolution 64 --validation_seed 3", *arguments), seed=seed) for seed in (1, 2)]
    assert held_out(fixed[0]) == held_out(fixed[1])


def test_the_choice_does_not_depend_on_the_path_of_the_data(tmp_path):
    write_folder(tmp_path / "here/1_a", 12)
    shutil.copytree(tmp_path / "here/1_a", tmp_path / "there/5_b")
    arguments = "--resolution 64 --validation_split 0.25"
    here, there = (plan_of(options_of(arguments, "--train_data_dir", str(tmp_path / n))) for n in ("here", "there"))
    assert [os.path.basename(p) for p in held_out(here)] == [os.path.basename(p) for p in held_out(there)]


COPIES = """
[general]
resolution = 64
[[datasets]]
validation_split = 0.4
validation_seed = 1
  [[datasets.subsets]]
  image_dir = "{here}/a"
[[datasets]]
  [[datasets.subsets]]
  image_dir = "{here}/b"
  validation_split = 0.2
  validation_seed = 2
  [[datasets.subsets]]
  image_dir = "{here}/c"
[[datasets]]
  [[datasets.subsets]]
  image_dir = "{here}/reg"
  is_reg = true
  [[datasets.subsets]]
  image_dir = "{here}/d"
"""


@pytest.fixture
def copies(tmp_path: Path) -> DataPlan:
    """Write three folders with the same ten images under other names, two of which are also regularisation images."""
    write_folder(tmp_path / "a", 10)
    for folder in ("b", "c"):
        (tmp_path / folder).mkdir()
        for i in range(10):
            shutil.copy(tmp_path / f"a/p{i}.png", tmp_path / folder / f"{folder}{9 - i}.png")
    (tmp_path / "reg").mkdir()
    for i in (3, 4):
        shutil.copy(tmp_path / f"a/p{i}.png", tmp_path / f"reg/r{i}.png")
    write_folder(tmp_path / "d", 2, seed=5)
    return plan_of(write_config(tmp_path / "data.toml", COPIES))


def test_copies_under_other_names_are_on_the_same_side(copies, tmp_path):
    images = short_names(sample.image.key for sample in copies.samples)
    assert len(images) == 34 - 4  # c has no split, so images held out elsewhere are excluded from it
    aside, trained_side = short_names(held_out(copies)), trained_names(copies)
    contents = [{(tmp_path / name).read_bytes() for name in side} for side in (aside, trained_side)]
    assert not contents[0] & contents[1]
    assert len(contents[0]) == 4 and len(aside) == 8
    assert {"reg/r3.png", "reg/r4.png", "a/p3.png", "a/p4.png"} <= trained_side


def test_the_log_reports_held_out_and_excluded_images(copies, caplog):
    with caplog.at_level(logging.INFO):
        copies.audit(logging.getLogger("audit"))
    assert "a: 4 of 10 images are held out for validation" in caplog.text
    assert "b: 4 of 10 images are held out for validation" in caplog.text
    assert "c: 4 of 10 images are not trained: another subset holds them out" in caplog.text


def test_a_share_that_holds_out_no_image_is_warned_about(tmp_path, caplog):
    write_folder(tmp_path / "1_a", 4)
    plan = plan_of(options_of("--resolution 64 --validation_split 0.1", "--train_data_dir", str(tmp_path)))
    plan.audit(logging.getLogger("audit"))
    assert "validation_split 0.1 holds out no image: 0.1 of 4 images rounds to none" in caplog.text
    assert validation_of(plan).num_batches == 0 and plan.num_train_images == 4


def test_a_whole_subset_can_be_held_out_but_not_all_data(tmp_path):
    write_folder(tmp_path / "1_a", 2)
    write_folder(tmp_path / "1_b", 3, seed=1)
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/1_a'\n[[datasets]]\n"
    text += "resolution = 128\nvalidation_split = 1.0\n[[datasets.subsets]]\nimage_dir = '{here}/1_b'\n"
    plan = plan_of(write_config(tmp_path / "data.toml", text))
    assert short_names(held_out(plan)) == {f"1_b/p{i}.png" for i in range(3)}
    assert plan.batch_sizes == [1] and plan.num_batches == 2
    with pytest.raises(ValueError, match=r"every image, so nothing is left to train on; use less than 1\.0"):
        plan_of(options_of("--resolution 64 --validation_split 1.0", "--train_data_dir", str(tmp_path)))


def test_metadata_files_and_masks_are_split_too(tmp_path):
    write_folder(tmp_path / "a", 8, caption=None)
    (tmp_path / "m.json").write_text(json.dumps({f"p{i}": {"caption": f"picture {i}"} for i in range(8)}))
    text = "[[datasets]]\nresolution = 64\nvalidation_split = 0.25\n[[datasets.subsets]]\n"
    text += "image_dir = '{here}/a'\nmetadata_file = '{here}/m.json'\nnum_repeats = 3\n"
    plan = plan_of(write_config(tmp_path / "data.toml", text))
    assert len(held_out(plan)) == 2 and plan.num_train_images == 18
    assert not short_names(held_out(plan)) & trained_names(plan)

    for i in range(8):
        write_image(tmp_path / f"masks/p{i}.png", seed=50 + i)
    text = text.replace("metadata_file = '{here}/m.json'", "conditioning_data_dir = '{here}/masks'")
    write_config(tmp_path / "masked.toml", text)
    masked = plan_of(options_of("--masked_loss", "--dataset_config", str(tmp_path / "masked.toml")))
    batches = list(validation_of(masked).batches([0, 1], 0))
    assert all(batch.masks_B1HW is not None for batch in batches)


def test_the_index_of_a_folder_contains_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(image_index, "MIN_FILES", 1)
    write_folder(tmp_path / "1_a", 6)
    arguments = "--resolution 64 --validation_split 0.5 --caption_extension .txt"
    first, second = (plan_of(options_of(arguments, "--train_data_dir", str(tmp_path))) for _ in range(2))
    assert len(image_index.open_index(str(tmp_path / "1_a"), IndexPlaces()).sizes.names) == 6
    captions = [
        {
            key: caption
            for batch in validation_of(s).batches(range(3), 0)
            for key, caption in zip(batch.keys, batch.captions, strict=True)
        }
        for s in (first, second)
    ]
    assert captions[0] == captions[1]
    assert all(caption == f"a tag {os.path.basename(key)[1]}" for key, caption in captions[0].items())


def test_files_have_equal_hashes_only_if_their_content_is_equal(tmp_path):
    first = write_image(tmp_path / "one.png", (200, 200), seed=1)
    second = write_image(tmp_path / "two.png", (200, 200), seed=2)
    copy = Path(shutil.copy(first, tmp_path / "copy.png"))
    assert hash_file(str(first)) == hash_file(str(copy)) != hash_file(str(second))
    copy.write_bytes(first.read_bytes() + b"\0")
    assert hash_file(str(first)) != hash_file(str(copy))
    with pytest.raises(ValueError, match=r"none\.png cannot be read"):
        hash_file(str(tmp_path / "none.png"))

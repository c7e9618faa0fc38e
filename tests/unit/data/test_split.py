"""The validation split: no image is both trained and held out."""

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.plan.data_plan import DataPlan
from library.data.plan.validation_split import SplitSpec, choose, hash_file
from library.data.sources.folders import image_index
from library.data.sources.storage.index_places import IndexPlaces
from tests.unit.data.builders import (
    batches_of,
    options_of,
    plan_of,
    validation_of,
    write_config,
    write_folder,
    write_image,
)


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

"""The audit of the dataset and of its pixels, before any model is loaded."""

import itertools
import json
import logging
import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from library.base.errors import NoDataFound
from library.data.plan import dataset_metadata
from library.data.plan.audit_findings import BLURRED, EMPTY, MOST_BITS, collect_findings
from library.data.plan.audit_pixels import (
    HASH_BITS,
    PixelMeasures,
    connect_groups,
    measure_pixels,
    measure_sharpness,
    similar_pairs,
)
from library.data.plan.data_plan import build_plan
from tests.unit.data.builders import SPEC, options_of, plan_of, write_config, write_folder, write_image


def audit_log(options, caplog, count_tokens=None, max_tokens=None) -> str:
    plan = build_plan(options, SPEC, 1, count_tokens, max_tokens)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        plan.audit(logging.getLogger("audit"))
    return caplog.text


def write_one_subset(tmp_path: Path, subset: str, dataset: str = "", more: str = ""):
    head = f"[[datasets]]\nresolution = 64\nbatch_size = 2\n{dataset}\n[[datasets.subsets]]\nimage_dir = '{{here}}/a'\n"
    return write_config(tmp_path / "data.toml", f"{head}caption_extension = '.txt'\n{subset}\n{more}")


def test_images_repeats_draws_and_buckets_are_counted(tmp_path, caplog):
    write_folder(tmp_path / "a", 2, (64, 64))
    write_image(tmp_path / "a/wide.png", (140, 30))
    text = audit_log(
        write_one_subset(
            tmp_path, "num_repeats = 3", "enable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 64"
        ),
        caplog,
    )
    assert "dataset 1: area of 64x64 in buckets of 64 to 1024 by 64, batch size 2" in text
    assert "3 images x 3 repeats, 9 draws per epoch" in text
    assert "bucket 64x64: 9 draws, 5 batches" in text


def test_missing_and_empty_captions_are_counted_with_examples(tmp_path, caplog):
    write_folder(tmp_path / "a", 7, caption=None)
    (tmp_path / "a/p0.txt").write_text("")
    text = audit_log(write_one_subset(tmp_path, ""), caplog)
    assert "6 images without a caption file, trained with an empty prompt: p1.png, p2.png, p3.png and 3 more" in text
    assert "1 empty caption: " in text and text.count("WARNING") == 2


@pytest.mark.parametrize("key", ["is_forgetting_probe = true", "validation_split = 1.0"])
def test_files_of_subsets_that_are_only_measured_are_checked_too(tmp_path, caplog, key):
    write_folder(tmp_path / "a", 2)
    write_folder(tmp_path / "held_out", 2, seed=1)
    (tmp_path / "held_out/bad.png").write_bytes(b"")
    more = f"[[datasets.subsets]]\nimage_dir = '{{here}}/held_out'\ncaption_extension = '.cap'\n{key}\n"
    text = audit_log(write_one_subset(tmp_path, "validation_split = 0.5", more=more), caplog)
    assert "held_out: 1 image skipped: bad.png is empty" in text
    assert "images without a caption file, measured with an empty prompt: " in text
    assert "held_out: 2 of the missing captions exist as .txt files" in text and text.count("WARNING") == 3


def test_face_crops_without_a_face_in_any_name_are_warned_about(tmp_path, caplog):
    write_folder(tmp_path / "a", 1)
    line = "face_crop_aug_range has no effect: no file name ends in a face's _cx_cy_w_h"
    assert line in audit_log(write_one_subset(tmp_path, "face_crop_aug_range = [1.0, 3.0]"), caplog)
    write_image(tmp_path / "a/q_32_32_20_20.png", seed=5)
    caplog.clear()
    assert line not in audit_log(write_one_subset(tmp_path, "face_crop_aug_range = [1.0, 3.0]"), caplog)


def test_images_outside_of_their_source_are_named_by_their_whole_path(tmp_path, caplog):
    path = write_image(tmp_path / "a/p.png")
    (tmp_path / "m.json").write_text(json.dumps({str(path): {}}))
    config = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = '{here}/m.json'\n"
    text = audit_log(write_config(tmp_path / "data.toml", config), caplog)
    assert f"1 image without a caption file, trained with an empty prompt: {path}" in text


def test_missing_captions_replaced_by_class_tokens_give_no_warning(tmp_path, caplog):
    write_folder(tmp_path / "a", 2, caption=None)
    text = audit_log(write_one_subset(tmp_path, "class_tokens = 'a cat'"), caplog)
    assert "2 images without a caption file, using 'a cat'" in text and "WARNING" not in text


def test_skipped_images_are_reported_with_the_reason(tmp_path, caplog):
    write_folder(tmp_path / "a", 1)
    (tmp_path / "a/bad.png").write_bytes(b"")
    assert "1 image skipped: " in audit_log(write_one_subset(tmp_path, ""), caplog)
    assert "bad.png is empty" in caplog.text


def test_captions_beyond_the_token_limit_are_counted_with_all_affixes(tmp_path, caplog):
    write_folder(tmp_path / "a", 2, caption="x" * 90)
    (tmp_path / "a/p1.txt").write_text("one two three four")
    options = write_one_subset(tmp_path, "caption_prefix = 'zero'\nkeep_tokens_separator = '|||'")

    def count_words(caption: str) -> int:
        return len(caption.split())

    text = audit_log(options, caplog, count_words, 4)
    assert "1 caption longer than the model's 4 tokens" in text and "p1.png (5)" in text
    assert "longer" not in audit_log(options, caplog, count_words, 5)


def test_many_captions_are_counted_in_the_background(tmp_path, caplog, monkeypatch):
    write_folder(tmp_path / "a", 40, caption="one two three four")
    may_count, threads = threading.Event(), []

    def count_words(caption: str) -> int:
        assert may_count.wait(60)
        threads.append(threading.current_thread().name)
        return len(caption.split())

    monkeypatch.setattr("library.data.plan.data_plan.MOST_COUNTED_AT_START", 39)
    text = audit_log(write_one_subset(tmp_path, ""), caplog, count_words, 4)
    assert "40 images" in text and "in the background" in text and "are longer" not in text
    (counter,) = (thread for thread in threading.enumerate() if thread.name == "count tokens")
    may_count.set()
    counter.join(60)
    assert "40 captions longer than the model's 4 tokens" in caplog.text and set(threads) == {"count tokens"}


def test_images_that_share_a_caption_file_are_reported(tmp_path, caplog):
    write_folder(tmp_path / "a", 1)
    write_image(tmp_path / "a/p0.bmp")
    text = audit_log(write_one_subset(tmp_path, ""), caplog)
    assert "1 image with the caption file of another: " in text and "p0.bmp and " in text


def test_without_buckets_images_of_another_size_are_reported(tmp_path, caplog):
    write_folder(tmp_path / "a", 1, (80, 64))
    assert "1 image not of 64x64, scaled or cropped to it" in audit_log(write_one_subset(tmp_path, ""), caplog)


def test_nested_braces_are_reported(tmp_path, caplog):
    write_folder(tmp_path / "a", 1, caption="{a|{b|c}}")
    assert "1 captions have nested braces" in audit_log(write_one_subset(tmp_path, "enable_wildcard = true"), caplog)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("keep_tokens = 1", "keep_tokens has no effect: no tag moves"),
        (
            "caption_separator = ';'\nshuffle_caption = true",
            "shuffle_caption has no effect: no caption has the caption_s",
        ),
        ("keep_tokens_separator = '|||'", "keep_tokens_separator has no effect: no caption has '|||'"),
        ("secondary_separator = ';;;'", "secondary_separator has no effect: no caption has ';;;'"),
        ("enable_wildcard = true", "enable_wildcard has no effect: no caption has braces or several lines"),
        ("enable_wildcard = true\ncaption_prefix = '{a|the}'", ""),
        ("shuffle_caption = true\nkeep_tokens = 1", ""),
        ("keep_tokens_separator = 'ca'\nsecondary_separator = 'ca'", ""),
    ],
)
def test_keys_that_change_no_caption_are_named(tmp_path, caplog, keys, line):
    write_folder(tmp_path / "a", 2, caption="a cat, sitting")
    text = audit_log(write_one_subset(tmp_path, keys), caplog)
    assert line in text and text.count("WARNING") == bool(line)


@pytest.mark.parametrize(("modes", "is_named"), [(["RGB", "RGB"], True), (["RGB", "RGBA"], False)])
def test_alpha_masks_of_opaque_images_alone_are_named(tmp_path, caplog, modes, is_named):
    for number, mode in enumerate(modes):
        write_image(tmp_path / "a" / f"{number}.png", mode=mode).with_suffix(".txt").write_text("a tag")
    text = audit_log(write_one_subset(tmp_path, "alpha_mask = true"), caplog)
    assert ("alpha_mask has no effect: no image has an alpha channel" in text) == is_named


def test_surplus_regularisation_images_are_counted(tmp_path, caplog):
    write_folder(tmp_path / "a", 1)
    write_folder(tmp_path / "r", 3)
    more = "[[datasets.subsets]]\nimage_dir = '{here}/r'\nis_reg = true\nclass_tokens = 'x'\n"
    assert "2 regularisation images are not needed and unused" in audit_log(
        write_one_subset(tmp_path, "", more=more), caplog
    )


# Metadata of the saved file


def test_metadata_of_training_folders_has_the_keys_of_sd_scripts(tmp_path):
    write_folder(tmp_path / "train/3_cat", 2, (64, 64), "a cat, Grass")
    write_folder(tmp_path / "reg/1_animal", 1, (64, 64), None)
    arguments = "--resolution 64 --enable_bucket --min_bucket_reso 64 --max_bucket_reso 128 --caption_extension .txt"
    options = options_of(
        f"{arguments} --train_batch_size 2 --gradient_accumulation_steps 3 --keep_tokens 1",
        "--train_data_dir",
        f"{tmp_path}/train",
        "--reg_data_dir",
        f"{tmp_path}/reg",
    )
    metadata = build_plan(options, SPEC, 1, None, None).metadata(options.dataset, batches_per_step=2 * 3)
    assert metadata == {
        "ss_batch_size_per_device": 2,
        "ss_total_batch_size": 12,
        "ss_resolution": "(64, 64)",
        "ss_color_aug": False,
        "ss_flip_aug": False,
        "ss_random_crop": False,
        "ss_shuffle_caption": False,
        "ss_enable_bucket": True,
        "ss_bucket_no_upscale": False,
        "ss_min_bucket_reso": 64,
        "ss_max_bucket_reso": 128,
        "ss_keep_tokens": 1,
        "ss_dataset_dirs": {"3_cat": {"n_repeats": 3, "img_count": 2}},
        "ss_reg_dataset_dirs": {"1_animal": {"n_repeats": 1, "img_count": 1}},
        "ss_tag_frequency": {"3_cat": {"a cat": 2, "grass 0": 1, "grass 1": 1}, "1_animal": {"animal": 1}},
        "ss_bucket_info": {"buckets": {"0": {"resolution": [64, 64], "count": 12}}, "mean_img_ar_error": 0.0},
    }


@pytest.mark.parametrize("has_buckets", [True, False])
def test_metadata_of_a_dataset_file_describes_every_dataset(tmp_path, has_buckets):
    write_folder(tmp_path / "a", 2, (96, 64), "x, y")
    bucket = "enable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 128\n" if has_buckets else ""
    subset = "[[datasets.subsets]]\nimage_dir = '{here}/a/'\ncaption_extension = '.txt'\n"
    dataset = f"[[datasets]]\nresolution = 64\n{bucket}{subset}"
    options = write_config(
        tmp_path / "data.toml", dataset + "num_repeats = 2\nclass_tokens = 'c'\n" + dataset.replace("64", "128", 1)
    )
    metadata = build_plan(options, SPEC, 1, None, None).metadata(options.dataset)
    assert metadata.keys() == {"ss_datasets", "ss_tag_frequency", "ss_dataset_dirs"}
    assert metadata["ss_tag_frequency"] == {"a": {"x": 2, "y 0": 1, "y 1": 1}}
    assert metadata["ss_dataset_dirs"] == {
        "a": {"n_repeats": 2, "img_count": 2},
        "a (2)": {"n_repeats": 1, "img_count": 2},
    }
    first, second = metadata["ss_datasets"]
    info = {"buckets": {"0": {"resolution": [64, 64], "count": 4}}, "mean_img_ar_error": 0.5} if has_buckets else None
    assert first == {
        "is_dreambooth": True,
        "batch_size_per_device": 1,
        "num_train_images": 4,
        "num_reg_images": 0,
        "resolution": [64, 64],
        "enable_bucket": has_buckets,
        "min_bucket_reso": 64 if has_buckets else None,
        "max_bucket_reso": 128 if has_buckets else None,
        "tag_frequency": {"a": {"x": 2, "y 0": 1, "y 1": 1}},
        "bucket_info": info,
        "skip_image_resolution": None,
        "resize_interpolation": None,
        "subsets": [
            {
                "img_count": 2,
                "num_repeats": 2,
                "color_aug": False,
                "flip_aug": False,
                "random_crop": False,
                "shuffle_caption": False,
                "keep_tokens": 0,
                "keep_tokens_separator": "",
                "secondary_separator": None,
                "enable_wildcard": False,
                "caption_prefix": None,
                "caption_suffix": None,
                "resize_interpolation": None,
                "image_dir": "a",
                "class_tokens": "c",
                "is_reg": False,
            }
        ],
    }
    assert second["resolution"] == [128, 128] and second["subsets"][0]["class_tokens"] is None


def test_tags_of_metadata_files_are_counted_without_captions(tmp_path):
    write_folder(tmp_path / "a", 1)
    (tmp_path / "meta.json").write_text('{"p0": {"caption": "words", "tags": "x, Y, x"}}')
    options = options_of("--resolution 64", "--train_data_dir", f"{tmp_path}/a", "--in_json", f"{tmp_path}/meta.json")
    metadata = build_plan(options, SPEC, 1, None, None).metadata(options.dataset)
    assert metadata["ss_tag_frequency"] == {"meta.json": {"x": 1, "y": 1}}
    assert metadata["ss_dataset_dirs"] == {"meta.json": {"n_repeats": 1, "img_count": 1}}
    assert metadata["ss_bucket_info"] == "null"


def test_captions_with_another_extension_are_counted_with_the_key_to_set(tmp_path, caplog):
    write_folder(tmp_path / "a", 3)
    text = audit_log(write_config_with_default_extension(tmp_path), caplog)
    assert "3 of the missing captions exist as .txt files, but caption_extension is .caption: set " in text
    assert 'caption_extension = ".txt"' in text


def write_config_with_default_extension(tmp_path: Path):
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/a'\n"
    return write_config(tmp_path / "data.toml", text)


def test_captions_without_problems_give_no_warning(tmp_path, caplog):
    write_folder(tmp_path / "a", 3)
    assert "WARNING" not in audit_log(write_one_subset(tmp_path, ""), caplog)


def test_images_with_unsupported_extensions_are_reported(tmp_path, caplog):
    write_folder(tmp_path / "a", 1)
    for name in ("b.Jpeg", "c.gif", "d.tiff", "notes.md"):
        (tmp_path / "a" / name).write_bytes(b"x")
    (tmp_path / "a" / "folder.tiff").mkdir()
    text = audit_log(write_one_subset(tmp_path, ""), caplog)
    assert "3 images have unsupported extensions" in text and "b.Jpeg, c.gif, d.tiff" in text


def test_captions_without_an_image_are_reported(tmp_path, caplog):
    write_folder(tmp_path / "a", 1)
    (tmp_path / "a/lost.txt").write_text("a cat")
    (tmp_path / "a/p0_1_2_3_4.txt").write_text("a face")
    write_image(tmp_path / "a/face_1_2_3_4.png", seed=9)
    (tmp_path / "a/face.txt").write_text("of the cutting")
    text = audit_log(write_one_subset(tmp_path, ""), caplog)
    assert "2 captions without an image: lost.txt, p0_1_2_3_4.txt" in text


def test_duplicate_images_are_reported(tmp_path, caplog):
    write_folder(tmp_path / "a", 2)
    (tmp_path / "a/q.png").write_bytes((tmp_path / "a/p1.png").read_bytes())
    (tmp_path / "a/q.txt").write_text("a tag")
    assert "1 duplicate image, each trained twice: q.png = p1.png" in audit_log(write_one_subset(tmp_path, ""), caplog)


def test_strongly_upscaled_images_are_reported(tmp_path, caplog):
    write_image(tmp_path / "a/tiny.png", (8, 8)).with_suffix(".txt").write_text("a")
    write_image(tmp_path / "a/large.png", (44, 44)).with_suffix(".txt").write_text("a")
    text = audit_log(write_one_subset(tmp_path, "", "enable_bucket = true\nmin_bucket_reso = 64"), caplog)
    assert "1 image upscaled more than 1.5x" in text and "tiny.png (8x8)" in text


@pytest.mark.parametrize(("count", "is_reported"), [(9, True), (8, False)])
def test_one_caption_for_many_images_is_reported(tmp_path, caplog, count, is_reported):
    for number in range(count):
        write_image(tmp_path / f"a/p{number}.png", (64, 64)).with_suffix(".txt").write_text("a photo of sks")
    text = audit_log(write_one_subset(tmp_path, ""), caplog)
    assert ("all 9 captions are the same" in text and "'a photo of sks'" in text) is is_reported


def test_one_caption_for_many_pairs_is_not_reported(tmp_path, caplog):
    for number in range(9):
        write_image(tmp_path / f"b/p{number}.png", (64, 64), seed=1)
        write_image(tmp_path / f"a/p{number}.png", (64, 64)).with_suffix(".txt").write_text("make it red")
    options = write_one_subset(tmp_path, f"opposite_dir = '{(tmp_path / 'b').as_posix()}'")
    text = audit_log(options.with_values({"preference_loss": "dpo"}), caplog)
    assert "captions are the same" not in text


def test_class_tokens_for_all_images_are_not_reported(tmp_path, caplog):
    write_folder(tmp_path / "a", 12, caption=None)
    assert "captions are the same" not in audit_log(write_one_subset(tmp_path, "class_tokens = 'sks'"), caplog)


def test_captions_that_contain_their_file_name_are_reported(tmp_path, caplog):
    for stem, caption in (("IMG_0815", "img_0815, a cat"), ("IMG_0816", "a cat"), ("cats", "two cats"), ("a1", "a1")):
        write_image(tmp_path / f"a/{stem}.png", (64, 64)).with_suffix(".txt").write_text(caption)
    assert "captions that contain their own file name: 1: " in (
        text := audit_log(write_one_subset(tmp_path, ""), caplog)
    )
    assert "IMG_0815.png" in text.partition("contain their own file name")[2].splitlines()[0]


def test_images_in_subfolders_are_counted_if_the_folder_has_none(tmp_path):
    write_folder(tmp_path / "a" / "more" / "deep", 3)
    with pytest.raises(NoDataFound, match=r"no training images in .*; 3 are in its subfolders, .*deep \(3\)"):
        build_plan(write_one_subset(tmp_path, ""), SPEC, 1, None, None)


def test_the_tag_frequency_keeps_only_the_most_common_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "pictures", 12, caption="a cat, it sat on the mat of number")
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{here}/pictures"\n'
    options = write_config(tmp_path / "data.toml", text + 'caption_extension = ".txt"\n')
    all_tags = plan_of(options).metadata(options.dataset)["ss_tag_frequency"]["pictures"]
    assert len(all_tags) == 13 and all_tags["a cat"] == 12
    monkeypatch.setattr(dataset_metadata, "MOST_TAGS", 3)
    few = plan_of(options).metadata(options.dataset)["ss_tag_frequency"]["pictures"]
    assert len(few) == 3 and few["a cat"] == 12 and all(all_tags[tag] == count for tag, count in few.items())


def test_unused_files_are_reported_by_kind(tmp_path, caplog):
    """Report unsupported extensions, including other cases of supported ones, but not the captions of such images."""
    write_folder(tmp_path / "a", 2)
    for name in ("b.GIF", "c.Png", "b.txt", "d.TXT", "e.json", "txt", "f.npz", "lost.txt"):
        (tmp_path / "a" / name).write_text("x")
    text = audit_log(write_one_subset(tmp_path, ""), caplog)
    assert "2 images have unsupported extensions; convert or rename them to .png or .jpg: b.GIF, c.Png" in text
    assert "1 caption without an image: lost.txt" in text


# The audit of pixels: near-duplicates, blur, single colours and damage.

TRAINED = (256, 256)


def scene(seed: int, side: int = 400) -> Image.Image:
    """Draw an image with coarse and fine structure and a few shapes with sharp edges."""
    rng = np.random.default_rng(seed)
    summed = np.zeros((side, side, 3))
    for cells, strength in ((4, 110), (12, 60), (40, 30), (200, 20)):
        small = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        summed += np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)) / 255 * strength
    image = Image.fromarray(summed.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = (int(v) for v in rng.integers(0, side, 2))
        draw.rectangle((x, y, x + side // 8, y + side // 6), fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
    return image


def measure_image(image: Image.Image, path: Path, **save_options: int) -> PixelMeasures:
    image.save(path, **save_options)
    return measure_pixels(str(path), TRAINED)


def bits_between(a: PixelMeasures, b: PixelMeasures) -> int:
    return (a.hash ^ b.hash).bit_count()


@pytest.mark.slow
def test_copies_have_similar_hashes_and_other_images_do_not(tmp_path: Path) -> None:
    scenes = [scene(seed) for seed in range(610, 618)]
    looks = [measure_image(image, tmp_path / f"{n}.png") for n, image in enumerate(scenes)]
    assert min(bits_between(a, b) for a, b in itertools.combinations(looks, 2)) > 2 * MOST_BITS
    for n, (image, look) in enumerate(zip(scenes, looks, strict=True)):
        smaller = measure_image(image.resize((300, 300)), tmp_path / f"{n}s.png")
        poorer = measure_image(image, tmp_path / f"{n}q.jpg", quality=35)
        brighter = measure_image(image.point(lambda v: min(255, v * 1.15)), tmp_path / f"{n}b.png")
        assert max(bits_between(look, other) for other in (smaller, poorer, brighter)) <= MOST_BITS


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_blur_is_distinguished_from_a_blurred_background(tmp_path: Path, suffix: str) -> None:
    image = scene(77)
    blurred = image.filter(ImageFilter.GaussianBlur(5))
    subject = blurred.copy()
    subject.paste(image.crop((0, 0, 120, 120)), (150, 150))
    sharpness = [
        measure_image(i, tmp_path / f"x{n}{suffix}").sharpness for n, i in enumerate((image, subject, blurred))
    ]
    assert sharpness[0] > 2 * BLURRED and sharpness[1] > 2 * BLURRED and sharpness[2] < BLURRED / 2


def test_sharpness_is_the_variance_of_the_laplacian_of_the_sharpest_tile() -> None:
    pixels = np.random.default_rng(9).integers(0, 255, (37, 50), dtype=np.uint8)
    padded = np.pad(pixels.astype(np.float64), 1, mode="reflect")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * padded[1:-1, 1:-1]
    tiles = [tile for row in np.array_split(laplacian, 4) for tile in np.array_split(row, 4, axis=1)]
    assert measure_sharpness(pixels) == pytest.approx(max(tile.var() for tile in tiles), rel=1e-9)


def test_similar_pairs_match_an_exhaustive_comparison() -> None:
    rng = random.Random(31)
    hashes = [rng.getrandbits(HASH_BITS) for _ in range(150)]
    for value in hashes[:60]:
        flipped = rng.sample(range(HASH_BITS), rng.randint(0, 10))
        hashes.append(value ^ sum(1 << bit for bit in flipped))
    pairs = list(similar_pairs(hashes, MOST_BITS))
    near = {
        (a, b)
        for a, b in itertools.combinations(range(len(hashes)), 2)
        if (hashes[a] ^ hashes[b]).bit_count() <= MOST_BITS
    }
    assert len(pairs) == len(set(pairs)) and {tuple(sorted(pair)) for pair in pairs} == near
    assert len(near) > 20


def test_connected_pairs_form_one_group() -> None:
    assert connect_groups([(5, 2), (7, 8), (2, 9), (8, 7)]) == [[2, 5, 9], [7, 8]]


def test_findings_list_exactly_the_conspicuous_images() -> None:
    fine = {"sharpness": 4 * BLURRED, "contrast": 5 * EMPTY}
    rng = random.Random(82)
    first, second, third, fourth = (rng.getrandbits(HASH_BITS) for _ in range(4))
    looks = [
        PixelMeasures("a", first, **fine), PixelMeasures("b", first ^ 0b11, **fine), PixelMeasures("c", second, **fine),
        PixelMeasures("v", second ^ 4, **fine), PixelMeasures("alone", third, **fine),
        PixelMeasures("red", 0, 0.0, 0.5), PixelMeasures("blue", 0, 0.0, 0.5),
        PixelMeasures("soft", fourth, BLURRED / 2, 5 * EMPTY), PixelMeasures("cut", problem="image file is truncated"),
    ]  # fmt: skip
    findings = {
        f.text.partition("image")[2].removeprefix("s").strip()[:16]: [path for path, _ in f.images]
        for f in collect_findings(looks, {"a", "b", "c"})
    }
    assert findings == {
        "cannot be decode": ["cut"],
        "of a single colo": ["red", "blue"],
        "near-duplicated ": ["c", "v"],
        "near-duplicated;": ["a", "b"],
        "blurred all over": ["soft"],
    }
    (line,) = [f.line for f in collect_findings(looks[2:4], {"c"})]
    assert line.endswith("c (group 1, trained), v (group 1, validation)")
    assert list(collect_findings([looks[4]], {"alone"})) == []


def test_16_bit_and_rotated_images_are_measured_as_they_are_trained(tmp_path: Path) -> None:
    """Pillow alone would turn the first image white and not rotate the second one."""
    image = scene(41).convert("L")
    plain = measure_image(image, tmp_path / "plain.png")
    deep = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    assert measure_image(deep, tmp_path / "deep.png") == replace(plain, path=str(tmp_path / "deep.png"))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    assert bits_between(measure_pixels(str(tmp_path / "turned.jpg"), TRAINED), plain) <= MOST_BITS


@pytest.mark.parametrize("at", [45, 60, 400])
def test_any_damage_is_reported(tmp_path: Path, at: int) -> None:
    path = tmp_path / "broken.png"
    scene(4).save(path)
    content = bytearray(path.read_bytes())
    content[at : at + 60] = bytes(60)
    path.write_bytes(bytes(content))
    assert measure_pixels(str(path), TRAINED).problem


def test_a_truncated_image_is_reported_without_raising(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    scene(3).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert "truncated" in (measure_pixels(str(path), TRAINED).problem or "")

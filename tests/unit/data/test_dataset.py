"""Batches are determined by the seed, the epoch and their index, also of a user's own dataset."""

import dataclasses
import logging
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.base.errors import NoDataFound, UserError
from library.data.batches.batches import BatchMaker, BatchOrder, PartialBatch
from library.data.batches.own_dataset import OwnDataset, build_batch, open_own_dataset
from library.data.batches.planned import build_batch_maker
from library.data.caching.stores import NO_LATENTS, NO_TEXTS
from library.data.debug_dataset import show_batches
from library.data.plan.data_plan import DataPlan
from library.data.training_data import open_batches
from library.options.dataset import DatasetOptions
from library.options.train import TrainOptions
from library.protocols import LatentSpec
from tests.unit.data.builders import (
    SPEC,
    batches_of,
    content_of,
    options_of,
    plan_of,
    write_config,
    write_folder,
    write_image,
)

ONLY_FORKED = pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="only forked workers see a patched class"
)
RICH = """
[general]
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 192
caption_extension = ".txt"
shuffle_caption = true
caption_dropout_rate = 0.2
token_warmup_step = 50
flip_aug = true
[[datasets]]
resolution = 128
batch_size = 2
  [[datasets.subsets]]
  image_dir = "{here}/wide"
  num_repeats = 2
  random_crop = true
  color_aug = true
  [[datasets.subsets]]
  image_dir = "{here}/tall"
  custom_attributes = {diff_output_preservation = true}
  [[datasets.subsets]]
  image_dir = "{here}/reg"
  is_reg = true
[[datasets]]
resolution = 64
batch_size = 3
  [[datasets.subsets]]
  image_dir = "{here}/wide"
"""


@pytest.fixture
def rich(tmp_path: Path):
    write_folder(tmp_path / "wide", 3, (100, 70), "a, b, c, d", seed=1)
    write_folder(tmp_path / "tall", 2, (60, 130), "e, f, g", seed=2)
    write_folder(tmp_path / "reg", 2, (70, 70), "h", seed=3)
    options = write_config(tmp_path / "data.toml", RICH)
    data = dataclasses.replace(options.dataset, prior_loss_weight=0.25)
    return dataclasses.replace(options, dataset=data)


def test_batches_do_not_depend_on_the_number_of_workers(rich):
    plan = plan_of(rich)
    alone = [content_of(batch) for batch in batches_of(plan, epoch=2)]
    for workers in (1, 2):
        assert [content_of(batch) for batch in batches_of(plan, epoch=2, workers=workers)] == alone


def test_an_epoch_can_start_in_the_middle_without_reading_earlier_batches(rich, monkeypatch):
    plan = plan_of(rich)
    all_batches = [content_of(batch) for batch in batches_of(plan, epoch=3)]
    read = []
    original = BatchMaker.draft
    monkeypatch.setattr(BatchMaker, "draft", lambda self, order: read.append(order) or original(self, order))
    assert [content_of(batch) for batch in batches_of(plan, epoch=3, first=4)] == all_batches[4:]
    assert len(read) == len(all_batches) - 4
    assert batches_of(plan, epoch=3, first=len(all_batches)) == []


def test_persistent_workers_give_correct_epochs_even_after_one_is_left_early(rich):
    plan = plan_of(rich)
    lasting = open_batches(plan)
    plain = {epoch: [content_of(batch) for batch in batches_of(plan, epoch)] for epoch in (1, 2)}
    early = iter(lasting.iterate_epoch(1, range(plan.num_batches), lambda i: i, 2, True))
    assert content_of(next(early)) == plain[1][0]
    children = {child.pid for child in multiprocessing.active_children()}
    early.close()
    again = [content_of(b) for b in batches_of(lasting, 2, workers=2, persistent=True)]
    assert again == plain[2]
    assert len(children) == 2 and {child.pid for child in multiprocessing.active_children()} == children
    lasting.close()
    assert wait_for(lambda: not multiprocessing.active_children())


def wait_for(condition, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_no_worker_remains_after_an_epoch_is_aborted(rich):
    plan = plan_of(rich)
    batches = iter(open_batches(plan).iterate_epoch(1, range(plan.num_batches), lambda i: i, 2, False))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert wait_for(lambda: not multiprocessing.active_children())


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=ONLY_FORKED)])
def test_an_unexpected_error_while_building_a_batch_keeps_its_traceback(rich, monkeypatch, workers):
    """Only a UserError is reported without a traceback, even if a worker process raises it."""

    def fail(error):
        def draft(self, order):
            raise error

        monkeypatch.setattr(BatchMaker, "draft", draft)
        return batches_of(plan_of(rich), epoch=1, workers=workers)

    with pytest.raises(UserError, match=r"^a.png cannot be read$"):
        fail(UserError("a.png cannot be read"))
    with pytest.raises(ValueError, match="too many values to unpack") as raised:
        fail(ValueError("too many values to unpack"))
    assert not isinstance(raised.value, UserError)


def test_a_batch_maker_can_be_pickled_for_spawned_workers(rich):
    plan = plan_of(rich)
    maker = build_batch_maker(plan, NO_LATENTS, NO_TEXTS)
    order = BatchOrder(2, 7, (0, 1))
    draft, expected = pickle.loads(pickle.dumps(maker))[order], maker[order]
    assert isinstance(draft, PartialBatch) and content_of(draft.batch) == content_of(expected.batch)


def test_workers_import_no_heavy_packages():
    heavy = "('transformers', 'diffusers', 'cv2')"
    code = f"import sys, library.data.batches.batches; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_image_is_drawn_once_per_repeat_and_epochs_differ(rich):
    plan = plan_of(rich)
    epochs = [batches_of(plan, epoch) for epoch in (1, 2)]
    counts = [Counter(os.path.basename(os.path.dirname(k)) for b in batches for k in b.keys) for batches in epochs]
    # Eight training draws in the first dataset, so two regularisation images are drawn eight times.
    assert counts[0] == counts[1] == {"wide": 3 * 2 + 3, "tall": 2, "reg": 8}
    assert [content_of(b) for b in epochs[0]] != [content_of(b) for b in epochs[1]]
    assert plan.num_batches == len(epochs[0])
    assert (plan.num_train_images, plan.num_reg_images) == (11, 2)


def test_each_batch_has_one_size_and_one_dataset(rich):
    sizes = Counter()
    for batch in batches_of(plan_of(rich)):
        assert batch.pixels_BCHW is not None
        count, _, height, width = batch.pixels_BCHW.shape
        assert {tuple(row[4:]) for row in batch.sizes_B6.tolist()} == {(height, width)}
        assert count <= (3 if (height, width) == (64, 64) else 2)
        sizes[width, height] += count
    assert sum(sizes.values()) == 19 and sizes[64, 64] == 3


def test_prior_loss_weight_and_custom_attributes_apply_to_their_subsets(rich):
    seen = set()
    for batch in batches_of(plan_of(rich)):
        for key, weight, attributes in zip(batch.keys, batch.loss_weights_B.tolist(), batch.attributes, strict=True):
            folder = os.path.basename(os.path.dirname(key))
            assert weight == (0.25 if folder == "reg" else 1.0)
            assert dict(attributes) == ({"diff_output_preservation": True} if folder == "tall" else {})
            seen.add(folder)
    assert seen == {"wide", "tall", "reg"}


def test_draws_of_one_epoch_are_randomised_independently(tmp_path):
    write_folder(tmp_path / "60_a", 2, caption="a, b, c, d, e, f")
    options = "--caption_extension .txt --shuffle_caption --caption_dropout_rate 0.5 --flip_aug --train_batch_size 8"
    batches = batches_of(open_folder(tmp_path, options))
    captions = [caption for batch in batches for caption in batch.captions]
    dropped = captions.count("")
    assert 40 < dropped < 80 and len(set(captions)) > 0.9 * (len(captions) - dropped)
    corners = {corner for batch in batches for corner in batch.pixels_BCHW[:, :, 0, 0].sum(1).tolist()}
    assert len(corners) == 4  # two images, each plain and mirrored


def test_another_seed_gives_other_batches(rich):
    assert [content_of(b) for b in batches_of(plan_of(rich, 1))] != [
        content_of(b) for b in batches_of(plan_of(rich, 2))
    ]


def test_tag_warm_up_follows_the_step(tmp_path):
    write_folder(tmp_path / "a", 1, caption="a,b,c,d,e")
    options = options_of("--caption_extension .txt --resolution 64 --token_warmup_step 0.5 --max_train_steps 16")
    options = with_folders(options, tmp_path, "a")
    plan = plan_of(options)
    for step, count in ((0, 1), (4, 3), (8, 5)):
        (batch,) = open_batches(plan).iterate_epoch(1, [0], lambda i, step=step: step, 0, False)
        assert batch.captions[0].count(",") == count - 1


def test_max_train_epochs_determines_the_steps_of_tag_warm_up(tmp_path):
    write_folder(tmp_path / "a", 4, caption="a,b,c,d,e")
    options = with_folders(
        options_of("--resolution 64 --max_train_epochs 3 --gradient_accumulation_steps 3"), tmp_path, "a"
    )
    assert plan_of(options).max_train_steps == 6


def with_folders(options, tmp_path: Path, *names: str):
    """Return options that train these folders in tmp_path, each once."""
    for name in names:
        (tmp_path / "train").mkdir(exist_ok=True)
        os.rename(tmp_path / name, tmp_path / "train" / f"1_{name}")
    data = dataclasses.replace(options.dataset, train_data_dir=str(tmp_path / "train"))
    return dataclasses.replace(options, dataset=data)


def open_folder(tmp_path: Path, arguments: str):
    return plan_of(options_of(f"--resolution 64 {arguments}", "--train_data_dir", str(tmp_path)))


def test_pixels_are_the_image_scaled_to_minus_one_to_one(tmp_path):
    path = write_image(tmp_path / "1_a/p.png", seed=8)
    (batch,) = batches_of(open_folder(tmp_path, ""))
    expected = np.asarray(Image.open(path)).astype(np.float64).transpose(2, 0, 1) / 255 * 2 - 1
    assert batch.pixels_BCHW is not None and batch.pixels_BCHW.dtype == torch.float32
    assert np.abs(batch.pixels_BCHW[0].numpy() - expected).max() < 1e-6


def test_half_of_the_draws_are_mirrored(tmp_path):
    path = write_image(tmp_path / "200_a/p.png", (64, 96), seed=9)
    pixels = torch.from_numpy(np.array(Image.open(path))[16:80]).permute(2, 0, 1) / 127.5 - 1
    count = 0
    for batch in batches_of(open_folder(tmp_path, "--flip_aug --train_batch_size 50")):
        for image in batch.pixels_BCHW:
            is_plain, is_mirrored = torch.allclose(image, pixels), torch.allclose(image, pixels.flip(-1))
            assert is_plain != is_mirrored
            count += is_mirrored
    assert 70 < count < 130


def test_size_conditioning_is_height_first_and_mirrored_with_the_image(tmp_path):
    write_image(tmp_path / "8_a/p.png", (101, 70))
    rows = {tuple(row) for b in batches_of(open_folder(tmp_path, "--flip_aug")) for row in b.sizes_B6.tolist()}
    # 101x70 fitted inside 64x64 is 64 wide and 44.356 high: top 9, left 0, right 64.
    assert rows == {(70.0, 101.0, 9.0, 0.0, 64.0, 64.0)}
    write_image(tmp_path / "8_a/p.png", (70, 101))
    rows = {
        tuple(round(v, 3) for v in r)
        for b in batches_of(open_folder(tmp_path, "--flip_aug"))
        for r in b.sizes_B6.tolist()
    }
    # Fitted it is 44.356 wide: left 9, right 53.356, mirrored left 10.644.
    assert rows == {(101, 70, 0, 9, 64, 64), (101, 70, 0, 10.644, 64, 64)}


def test_crop_offsets_match_the_pixels_for_random_and_mirrored_crops(tmp_path):
    """The red value of each pixel is its column, the green value its row."""
    width, height = 101, 90
    columns, rows = np.meshgrid(np.arange(width, dtype=np.uint8), np.arange(height, dtype=np.uint8))
    (tmp_path / "40_a").mkdir()
    Image.fromarray(np.stack([columns, rows, rows], -1)).save(tmp_path / "40_a" / "p.png")
    seen = set()
    for batch in batches_of(open_folder(tmp_path, "--flip_aug --random_crop --train_batch_size 8")):
        for image, (top, left) in zip(batch.pixels_BCHW, batch.crops_B2.tolist(), strict=True):
            first, last, row = ((image[c, 0, x] + 1) * 127.5 for c, x in ((0, 0), (0, -1), (1, 0)))
            is_mirrored = first > last
            assert left == round(float(width - 1 - first if is_mirrored else first))
            assert top == round(float(row))
            seen.add((bool(is_mirrored), left, top))
    assert len(seen) > 20 and {is_mirrored for is_mirrored, *_ in seen} == {True, False}


def test_crop_offsets_of_resized_images_refer_to_the_resized_image(tmp_path):
    write_image(tmp_path / "8_a/p.png", (101, 70))
    rows = {tuple(row) for b in batches_of(open_folder(tmp_path, "")) for row in b.crops_B2.tolist()}
    # Covering 64x64 the image is 64 high and 92.34 wide, so 92: (92 - 64) // 2 columns are cut off at the left.
    assert rows == {(0.0, 14.0)}


def test_random_crops_without_buckets_do_not_resize_the_image(tmp_path):
    (tmp_path / "20_a").mkdir()
    ys, xs = np.mgrid[0:80, 0:90].astype(np.uint8)
    Image.fromarray(np.stack([xs, ys, xs], 2)).save(tmp_path / "20_a/p.png")
    corners = set()
    for batch in batches_of(open_folder(tmp_path, "--random_crop")):
        lefts_HW, tops_HW, _ = (batch.pixels_BCHW[0] + 1) * 127.5
        left, top = round(lefts_HW[0, 0].item()), round(tops_HW[0, 0].item())
        assert torch.allclose(lefts_HW[5], torch.arange(left, left + 64.0), atol=1e-3)
        assert torch.allclose(tops_HW[:, 7], torch.arange(top, top + 64.0), atol=1e-3)
        corners.add((left, top))
    assert len(corners) > 10


def test_face_crops_follow_the_face_position_in_the_file_name(tmp_path):
    pixels = np.zeros((200, 200, 3), dtype=np.uint8)
    pixels[140:160, 30:50] = 255
    (tmp_path / "1_a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "1_a/p_40_150_20_20.png")
    (batch,) = batches_of(open_folder(tmp_path, "--face_crop_aug_range 2.0,2.0"))
    bright = (batch.pixels_BCHW[0, 0] > 0).nonzero().float().mean(0)
    # An image is not upscaled, so the face stays 20 wide, in the middle.
    assert torch.allclose(bright, torch.tensor([31.5, 31.5]), atol=1.5)


# Masks


def test_alpha_masks_are_cropped_and_mirrored_and_opaque_images_get_ones(tmp_path):
    path = write_image(tmp_path / "10_a/p.png", (96, 64), seed=11, mode="RGBA")
    write_image(tmp_path / "10_a/q.png", (96, 64), seed=12)
    expected = torch.from_numpy(np.array(Image.open(path))[:, 16:80, 3]) / 255
    mirrored = set()
    for batch in batches_of(open_folder(tmp_path, "--alpha_mask --flip_aug --train_batch_size 20")):
        assert batch.masks_B1HW is not None and batch.masks_B1HW.shape == (20, 1, 64, 64)
        for key, mask in zip(batch.keys, batch.masks_B1HW[:, 0], strict=True):
            if key.endswith("q.png"):
                assert torch.equal(mask, torch.ones(64, 64))
            else:
                is_mirrored = torch.allclose(mask, expected.flip(-1))
                assert is_mirrored or torch.allclose(mask, expected)
                mirrored.add(is_mirrored)
    assert mirrored == {True, False}


def test_without_alpha_mask_transparency_is_ignored(tmp_path):
    write_image(tmp_path / "1_a/p.png", mode="RGBA")
    (batch,) = batches_of(open_folder(tmp_path, ""))
    assert batch.masks_B1HW is None


def open_masked(tmp_path: Path, keys: str = ""):
    path = tmp_path / "data.toml"
    path.write_text(
        f"[[datasets]]\nresolution = 64\n{keys}\n[[datasets.subsets]]\nimage_dir = '{tmp_path.as_posix()}/a'\n"
        f"conditioning_data_dir = '{tmp_path.as_posix()}/m'\n"
    )
    return plan_of(options_of("--masked_loss", "--dataset_config", str(path)))


def test_masks_are_the_red_channel_cropped_like_the_image(tmp_path):
    write_image(tmp_path / "a/p.png", (96, 64))
    mask = write_image(tmp_path / "m/p.png", (96, 64), seed=13)
    (batch,) = batches_of(open_masked(tmp_path, "enable_bucket = true\nmin_bucket_reso = 64\nbucket_no_upscale = true"))
    assert batch.masks_B1HW is not None and batch.masks_B1HW.shape == (1, 1, 64, 64)
    assert torch.allclose(batch.masks_B1HW[0, 0], torch.from_numpy(np.array(Image.open(mask))[:, 16:80, 0]) / 255)


def test_a_mask_of_another_size_is_refused_with_buckets_and_resized_without(tmp_path):
    write_image(tmp_path / "a/p.png", (96, 64))
    write_image(tmp_path / "m/p.png", (32, 32), seed=14)
    with pytest.raises(ValueError, match=r"p\.png is 32x32, its image 96x64"):
        open_masked(tmp_path, "enable_bucket = true\nmin_bucket_reso = 64")
    (batch,) = batches_of(open_masked(tmp_path))
    assert batch.masks_B1HW is not None and batch.masks_B1HW.shape == (1, 1, 64, 64)


# Errors and damaged images


def test_a_damaged_image_without_a_replacement_is_named_with_and_without_workers(tmp_path):
    path = write_image(tmp_path / "1_a/p.png", (90, 90))
    path.write_bytes(path.read_bytes()[:9000])
    plan = open_folder(tmp_path, "")
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^\S*p\.png is damaged: [^\n]*; no other image of its size can"):
            batches_of(plan, workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_replaced_by_one_of_its_size_and_reported(tmp_path, caplog, workers):
    damaged = write_image(tmp_path / "2_a/p1.png", (90, 90))
    for name, size in (("2_a/p2.png", (90, 90)), ("1_b/p3.png", (90, 90)), ("1_b/p4.png", (90, 90))):
        write_image(tmp_path / name, size, seed=3)
    expected = [key for batch in batches_of(open_folder(tmp_path, "")) for key in batch.keys]
    damaged.write_bytes(damaged.read_bytes()[:9000])
    batches = open_batches(open_folder(tmp_path, ""))
    actual = [key for batch in batches_of(batches, workers=workers) for key in batch.keys]
    assert actual == [key.replace("p1.png", "p2.png") for key in expected], "of its own folder, in its place"
    assert caplog.text.count("p1.png is damaged") == 1
    batches.report_skipped(logging.getLogger())
    assert "skipped 1 damaged image (2 draws)" in caplog.text


def test_an_image_that_changes_its_size_during_the_run_is_refused_by_name(tmp_path):
    path = write_image(tmp_path / "1_a/p.png")
    plan = open_folder(tmp_path, "")
    write_image(path, (70, 70))
    with pytest.raises(ValueError, match=r"p\.png is 70x70, but was"):
        batches_of(plan)


@pytest.mark.parametrize("flag", ["--random_crop", "--color_aug", "--brightness_aug 0.1", "--saturation_aug 0.1"])
@pytest.mark.parametrize("cache", ["--cache_latents", "--cache_latents_to_disk"])
def test_random_crop_and_color_aug_cannot_be_combined_with_latent_caches(tmp_path, flag, cache):
    write_image(tmp_path / "1_a/p.png")
    with pytest.raises(ValueError, match=rf"{flag.split()[0]} .*--cache_latents"):
        open_folder(tmp_path, f"{flag} {cache}")


@pytest.mark.parametrize("reason", ["enable_bucket", "cache_latents"])
def test_face_crops_are_ignored_with_buckets_and_caches_like_in_sd_scripts(tmp_path, caplog, reason):
    write_image(tmp_path / "1_a/p_10_20_5_5.png")
    plan = open_folder(tmp_path, f"--face_crop_aug_range 1,2 --min_bucket_reso 64 --{reason}")
    assert [subset.face_crop_aug_range for subset in plan.subsets] == [None]
    assert f"face_crop_aug_range has no effect with {reason}: {tmp_path / '1_a'}" in caplog.text


def test_debug_dataset_lists_every_image_once_with_its_samples(rich, caplog):
    with caplog.at_level(logging.INFO):
        show_batches(plan_of(rich))
    lines = [line for line in caplog.messages if "loss weight" in line]
    times = [int(match[1]) if (match := re.search(r", (\d+) times", line)) else 1 for line in lines]
    assert len({line.split(": ")[0] for line in lines}) == len(lines) and sum(times) == 19
    assert "x pixels (3, 3, 64, 64)" in caplog.text and "loss weight 0.25" in caplog.text


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        (dataclasses.replace(SPEC, patch=2), "[72, 64]", "needs multiples of 16; use 64x64, or set enable_bucket"),
        (dataclasses.replace(SPEC, patch=2), "[102, 84]", None),  # 96x80 after the VAE
        (dataclasses.replace(SPEC, downscale=32), "[72, 64]", "needs multiples of 32; use 64x64, or set enable_bucket"),
        (SPEC, "[72, 64]", None),
        (SPEC, "[4, 64]", "needs multiples of 8; use 8x64, or set enable_bucket"),
    ],
)
def test_a_resolution_that_the_base_model_cannot_divide_is_refused(tmp_path, spec, size, message):
    write_folder(tmp_path / "a", 1)
    options = write_config(
        tmp_path / "data.toml", f"[[datasets]]\nresolution = {size}\n[[datasets.subsets]]\nimage_dir = '{{here}}/a'\n"
    )
    if message is None:
        assert len(plan_of(options, spec=spec).samples) == 1
    else:
        with pytest.raises(UserError, match=message):
            plan_of(options, spec=spec)


def test_a_resolution_that_is_not_a_multiple_of_a_latent_is_warned_about_once(tmp_path, caplog):
    """Held-out images have the same rules as the trained ones of their dataset."""
    write_folder(tmp_path / "a", 4)
    dataset = "[[datasets]]\nresolution = 70\nenable_bucket = false\nvalidation_split = 0.5\n"
    subset = "[[datasets.subsets]]\nimage_dir = '{here}/a'\n"
    with caplog.at_level(logging.WARNING):
        plan_of(write_config(tmp_path / "data.toml", dataset + subset))
    message = "resolution 70x70 is not a multiple of 8, the pixels of one latent: images are trained at 64x64"
    assert caplog.text.count(message) == 1


# Batches from a user-defined class (--dataset_class).

OWN_SPEC = LatentSpec(channels=4, downscale=8, bucket_step=8, cache_suffix="_sd.npz", had_keys_without_size=True)


def item(seed: int = 1, count: int = 2, **changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 3, 16, 24, generator=g) * 2 - 1
    return {"images": pixels, "captions": [f"caption {seed} {n}" for n in range(count)], "input_ids": None, **changes}


class UserDataset:
    batch_size = 2
    num_train_images = 7

    def __init__(self, tokenizer: None, max_token_length: int | None, resolution: Any, debug_dataset: bool) -> None:
        self.arguments = (tokenizer, max_token_length, resolution, debug_dataset)
        self.epochs: list[int] = []

    def set_current_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict[str, Any]:
        return item(seed=10 + number)


DATA = DatasetOptions(dataset_class="my.Pictures", resolution="512,768")


def captions(data: OwnDataset, epoch: int, batch_indices: range) -> list[str]:
    return [batch.captions[0] for batch in data.iterate_epoch(epoch, batch_indices, lambda index: 0, 0, False)]


def test_a_dataset_class_is_called_like_in_sd_scripts() -> None:
    data = open_own_dataset(UserDataset, DATA, 150, OWN_SPEC, seed=3)
    assert data._source.arguments == (None, 150, (512, 768), False)
    assert (data.num_batches, data.batch_sizes, data.num_train_images, data.num_reg_images) == (4, [2], 7, 0)
    first, second = captions(data, 1, range(4)), captions(data, 2, range(4))
    assert sorted(first) == sorted(second) == [f"caption {10 + n} 0" for n in range(4)]
    assert first != second
    assert captions(data, 2, range(2, 4)) == second[2:]  # a resumed run continues at its batch
    assert data._source.epochs[-1] == 2
    assert data.validation.num_batches == 0


def test_all_parts_of_a_batch_are_used() -> None:
    entry = item(
        count=2, loss_weights=torch.tensor([1.0, 0.5]), alpha_masks=torch.rand(2, 16, 24), image_keys=["a", 7],
        original_sizes_hw=torch.tensor([[30, 40], [50, 60]]), crop_top_lefts=torch.tensor([[1, 2], [3, 4]]),
        custom_attributes=[{"diff_output_preservation": True}, {}],
    )  # fmt: skip
    batch = build_batch(entry, "batch 0", OWN_SPEC)
    assert batch.pixels_BCHW is not None and torch.equal(batch.pixels_BCHW, entry["images"])
    assert batch.latents_BCHW is None and batch.keys == ["a", "7"]
    assert batch.loss_weights_B.tolist() == [1.0, 0.5]
    assert batch.masks_B1HW is not None and batch.masks_B1HW.shape == (2, 1, 16, 24)
    assert batch.sizes_B6.tolist() == [[30, 40, 1, 2, 16, 24], [50, 60, 3, 4, 16, 24]]
    assert batch.attributes[0] == {"diff_output_preservation": True}
    latents = build_batch({"captions": ["a"], "latents": torch.randn(1, 4, 5, 6)}, "batch 1", OWN_SPEC)
    assert latents.pixels_BCHW is None and latents.sizes_B6.tolist() == [[40, 48, 0, 0, 40, 48]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": torch.zeros(1, 3, 8, 8)}, "batch 5 has no `captions`"),
        ({"captions": ["a"]}, "batch 5 has neither `images` nor `latents`"),
        (item(count=2, captions=["one"]), r"expected \(1, 3, height, width\) for 1 captions, not \[2, 3, 16, 24\]"),
        ({"captions": ["a"], "latents": torch.zeros(1, 16, 4, 4)}, r"expected \(1, 4, height, width\)"),
        ({"captions": ["a"], "images": [1, 2]}, "not list"),
        (item(count=2, loss_weights=[0.5]), "`loss_weights` has 1 entries for 2 captions; give one for each"),
        (item(count=2, custom_attributes=[{}]), "`custom_attributes` has 1 entries for 2 captions"),
        (item(count=2, original_sizes_hw=[[1, 2]]), "`original_sizes_hw` has 1 entries for 2 captions"),
        (item(count=2, alpha_masks=torch.ones(2, 1, 16, 24)), r"`alpha_masks` of shape \(2, height, width\)"),
    ],
)
def test_invalid_batches_raise_errors_that_name_them(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_batch(content, "batch 5", OWN_SPEC)


def test_errors_for_an_unsuitable_class_say_what_it_must_provide() -> None:
    with pytest.raises(ValueError, match=r"is called with \(tokenizer=None, max_token_length"):
        open_own_dataset(dict.fromkeys, DATA, None, OWN_SPEC, seed=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must return the number of its batches from len\(\)"):
        OwnDataset(object(), "my.Thing", 3, OWN_SPEC)
    with pytest.raises(ValueError, match="has no batches"):
        OwnDataset([], "my.Thing", 3, OWN_SPEC)
    with pytest.raises(ValueError, match="batch 0 is int, not a mapping"):
        next(OwnDataset([5], "my.Thing", 3, OWN_SPEC).iterate_epoch(1, [0], lambda index: 0, 0, False))


# skip_image_resolution: images whose own area is not larger are neither trained nor cached nor counted.

SIZES = {"a": (64, 64), "b": (128, 32), "c": (65, 64), "d": (96, 128), "e": (300, 20)}  # b has the same area as a
SUBSET = "[[datasets.subsets]]\nimage_dir = '{here}/2_cat'\ncaption_extension = '.txt'\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, (name, size) in enumerate(SIZES.items(), 40):
        path = write_image(tmp_path / "2_cat" / f"{name}.png", size, seed)
        if name in "cde":  # skipped images have no captions
            path.with_suffix(".txt").write_text(f"{name} tag", encoding="utf-8")
    return tmp_path


def trained_images(plan: DataPlan) -> list[tuple[int, str]]:
    """Return the dataset number and name of each image."""
    return [(sample.dataset, os.path.basename(sample.image.key)[0]) for sample in plan.samples]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "abcde"),
        ("--skip_image_resolution 64", "cde"),
        ("--skip_image_resolution 96,63", "d"),
        ("--skip_image_resolution 0", "abcde"),
    ],
)
def test_the_flag_compares_the_original_area_of_each_image(folder: Path, arguments: str, expected: str) -> None:
    options = options_of(f"--resolution 64 --caption_extension .txt {arguments} --train_data_dir", str(folder))
    plan = plan_of(options)
    assert trained_images(plan) == [(0, name) for name in expected]
    assert plan.num_train_images == 2 * len(expected)


def write_two_datasets(folder: Path, general: str = "") -> TrainOptions:
    high = "resolution = 128\nskip_image_resolution = [96, 64]\n"
    text = f"{general}[[datasets]]\nresolution = 64\n{SUBSET}[[datasets]]\n{high}{SUBSET}"
    return write_config(folder / "data.toml", text)


def test_datasets_over_one_folder_may_override_the_general_value(folder: Path) -> None:
    low = [(0, name) for name in "abcde"]
    assert trained_images(plan_of(write_two_datasets(folder))) == [*low, (1, "d")]
    options = write_two_datasets(folder, "[general]\nskip_image_resolution = 64\n")
    assert trained_images(plan_of(options)) == [*low[2:], (1, "d")]
    datasets = plan_of(options).metadata(options.dataset)["ss_datasets"]
    assert [dataset["skip_image_resolution"] for dataset in datasets] == [[64, 64], [96, 64]]
    assert [dataset["num_train_images"] for dataset in datasets] == [3, 1]


def test_the_audit_reports_skipped_images_but_not_their_missing_captions(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = options_of(
        "--resolution 64 --caption_extension .txt --skip_image_resolution 64 --train_data_dir", str(folder)
    )
    with caplog.at_level(logging.INFO):
        plan_of(options).audit(logging.getLogger("audit"))
    assert "2 images are skipped by skip_image_resolution" in caplog.text and "a.png" in caplog.text
    assert "captions are missing" not in caplog.text


def test_the_error_says_why_no_image_is_left(folder: Path) -> None:
    arguments = "--resolution 64 --caption_extension .txt --skip_image_resolution 512 --train_data_dir"
    with pytest.raises(NoDataFound, match="skip_image_resolution skips 5 as too small"):
        plan_of(options_of(arguments, str(folder)))
    text = (
        f"[[datasets]]\nresolution = 64\n{SUBSET}[[datasets]]\nresolution = 64\nskip_image_resolution = 200\n{SUBSET}"
    )
    with pytest.raises(UserError, match=r"no images in .*2_cat; skip_image_resolution skips 5"):
        plan_of(write_config(folder / "data.toml", text))


def test_a_value_that_is_not_a_size_is_refused(folder: Path) -> None:
    arguments = "--resolution 64 --skip_image_resolution 512x512 --train_data_dir"
    with pytest.raises(UserError, match=r"--skip_image_resolution is '512x512', but must look like 512 or 768,512"):
        plan_of(options_of(arguments, str(folder)))

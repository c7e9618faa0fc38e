"""Cached latents: compatible with sd-scripts and never stale."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.base.errors import NotThere, UserError
from library.data.batches.planned import PlannedBatches
from library.data.caching.filling import assign_jobs
from library.data.caching.latent_jobs import plan_jobs
from library.data.caching.latents import cache_latents
from library.data.plan import data_plan
from library.data.plan.data_plan import DataPlan
from library.data.sources.folders import image_index
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from library.processes.process_group import Processes
from library.protocols import POSTERIOR_MEAN, LatentSpec
from tests.unit.data.builders import (
    SPEC,
    averaging_vae,
    batches_of,
    content_of,
    hide_change_times,
    options_of,
    plan_of,
    write_config,
    write_image,
)
from tests.unit.test_processes import Board

DISK = CachingOptions(cache_latents=True, cache_latents_to_disk=True, vae_batch_size=2)
MEMORY = CachingOptions(cache_latents=True, vae_batch_size=2)
TAIL = "_8x8"  # the suffix of an entry's keys at 64x64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, size in enumerate([(64, 64), (80, 64), (64, 70)]):
        write_image(tmp_path / f"2_a/p{i}.png", size, seed=20 + i)
    return tmp_path


def open_folder(folder: Path, arguments: str = "", spec: LatentSpec = SPEC) -> DataPlan:
    return plan_of(options_of(f"--resolution 64 {arguments}", "--train_data_dir", str(folder)), spec=spec)


def cache(
    folder: Path,
    arguments: str = "",
    options: CachingOptions = DISK,
    vae: str = "vae",
    spec: LatentSpec = SPEC,
    seed: int = 1,
) -> tuple[PlannedBatches, int]:
    """Return batches with cached latents, and the number of images (and mirrored copies) that were encoded."""
    calls: list[int] = []
    plan = open_folder(folder, arguments, spec)
    store = cache_latents(plan, averaging_vae(calls), lambda: vae, options, seed)
    return open_batches(plan, store), sum(calls)


def file_of(folder: Path, name: str = "p0_0064x0064_sd.npz") -> Path:
    return folder / "2_a" / name


def latents_by_key(batches: PlannedBatches) -> dict[str, list]:
    latents = {}
    for batch in batches_of(batches):
        assert batch.pixels_BCHW is None and batch.latents_BCHW is not None
        latents.update(zip(batch.keys, batch.latents_BCHW.tolist(), strict=True))
    return latents


def rewrite(path: Path, keeps_origin: bool = False, tail: str = TAIL, **changes: np.ndarray | None) -> None:
    """Rewrite a file's only entry as another program would, with some arrays changed or (None) omitted."""
    with np.load(path) as archive:
        arrays = {key.removesuffix(TAIL): archive[key] for key in archive.files}
    arrays |= {**({} if keeps_origin else {"origin": None}), **changes}
    np.savez(path, **{key + tail: array for key, array in arrays.items() if array is not None})


# File names and layout


def test_files_have_the_names_and_layout_of_sd_scripts(folder):
    cache(folder)
    names = sorted(path.name for path in (folder / "2_a").glob("*.npz"))
    assert names == ["p0_0064x0064_sd.npz", "p1_0080x0064_sd.npz", "p2_0064x0070_sd.npz"]
    with np.load(file_of(folder, names[1])) as archive:
        assert {key: (archive[key].shape, archive[key].dtype.name) for key in archive.files if key != "origin_8x8"} == {
            "latents_8x8": ((4, 8, 8), "float32"),
            "original_size_8x8": ((2,), "int64"),
            "crop_ltrb_8x8": ((4,), "float64"),
        }
        assert archive["original_size_8x8"].tolist() == [80, 64]
        assert archive["crop_ltrb_8x8"].tolist() == pytest.approx([0, 6, 64, 57.2])
        assert archive["origin_8x8"].dtype == np.uint8 and json.loads(archive["origin_8x8"].tobytes())["vae"] == "vae"


def cache_larger(folder: Path) -> int:
    """Cache the images at 128x64 and return the number that was encoded."""
    calls: list[int] = []
    larger = plan_of(options_of("--resolution 128,64", "--train_data_dir", str(folder)))
    cache_latents(larger, averaging_vae(calls), lambda: "vae", DISK, 1)
    return sum(calls)


def test_keys_contain_the_size_and_entries_of_other_sizes_are_kept(folder):
    cache(folder)
    num_encoded = cache_larger(folder)
    with np.load(file_of(folder)) as archive:
        assert archive["latents_8x8"].shape == (4, 8, 8) and archive["latents_8x16"].shape == (4, 8, 16)
        assert {"origin_8x8", "origin_8x16", "crop_ltrb_8x8", "original_size_8x16"} <= set(archive.files)
    assert (num_encoded, cache(folder)[1]) == (3, 0)


@pytest.mark.parametrize("keeps_origin", [False, True])
def test_an_entry_without_a_size_in_its_key_is_used_only_for_its_own_size(folder, keeps_origin, caplog):
    """Otherwise a dataset with two sizes would use the entry for both and train one of them on the other's latents."""
    expected = latents_by_key(cache(folder)[0])
    for path in (folder / "2_a").glob("*.npz"):
        rewrite(path, keeps_origin, tail="")
    batches, num_encoded = cache(folder)
    assert num_encoded == 0 and latents_by_key(batches) == expected
    with caplog.at_level(logging.INFO):
        assert cache_larger(folder) == 3
    assert "3 without latents of this size" in caplog.text
    with np.load(file_of(folder)) as archive:
        assert {"latents", "latents_8x16"} <= set(archive.files)
    assert cache(folder)[1] == cache_larger(folder) == 0


def test_an_entry_without_a_size_is_ignored_for_base_models_that_never_wrote_one(folder):
    spec = replace(SPEC, had_keys_without_size=False)
    cache(folder, spec=spec)
    for path in (folder / "2_a").glob("*.npz"):
        rewrite(path, tail="")
    assert cache(folder, spec=spec)[1] == 3


def test_a_new_entry_replaces_one_without_a_size(folder):
    cache(folder)
    for path in (folder / "2_a").glob("*.npz"):
        rewrite(path, tail="", crop_ltrb=np.array([1.0, 0, 64, 64]))
    assert cache(folder)[1] == 3
    with np.load(file_of(folder)) as archive:
        assert set(archive.files) == {f"{key}_8x8" for key in ("latents", "original_size", "crop_ltrb", "origin")}


def test_mirrored_latents_encode_the_mirrored_image_and_are_drawn(folder):
    batches, num_encoded = cache(folder, "--flip_aug")
    assert num_encoded == 6
    pixels = torch.from_numpy(np.array(Image.open(folder / "2_a/p0.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    means = torch.nn.functional.avg_pool2d(pixels, 8)[0]
    with np.load(file_of(folder)) as archive:
        assert np.abs(archive["latents_8x8"][:3] - means.numpy()).max() < 0.06
        assert np.abs(archive["latents_flipped_8x8"][:3] - means.flip(-1).numpy()).max() < 0.06
        plain, flipped = archive["latents_8x8"].tolist(), archive["latents_flipped_8x8"].tolist()
    drawn = []
    for epoch in range(1, 12):
        for batch in batches_of(batches, epoch):
            drawn += [
                latent for key, latent in zip(batch.keys, batch.latents_BCHW.tolist(), strict=True) if "p0" in key
            ]
    assert all(latent in (plain, flipped) for latent in drawn) and plain in drawn and flipped in drawn


def test_masks_are_stored_in_the_file_and_mirrored_with_the_image(folder):
    path = write_image(folder / "2_a/q.png", (64, 64), seed=30, mode="RGBA")
    alpha = np.array(Image.open(path))[..., 3].astype(np.float32) / 255
    for options in (DISK, MEMORY):
        batches, _ = cache(folder, "--alpha_mask --flip_aug --train_batch_size 4", options)
        seen = set()
        for epoch in range(1, 8):
            for batch in batches_of(batches, epoch):
                assert batch.masks_B1HW is not None
                for key, mask in zip(batch.keys, batch.masks_B1HW[:, 0].numpy(), strict=True):
                    if key.endswith("q.png"):
                        seen.add("mirrored" if np.allclose(mask, alpha[:, ::-1], atol=1e-6) else "plain")
                        assert np.allclose(mask, alpha, atol=1e-6) or np.allclose(mask, alpha[:, ::-1], atol=1e-6)
                    else:
                        assert (mask == 1).all()
        assert seen == {"plain", "mirrored"}
    with np.load(file_of(folder, "q_0064x0064_sd.npz")) as archive:
        mask = archive["alpha_mask_8x8"]
        assert mask.dtype == np.float32 and np.abs(mask - alpha).max() < 1e-6
    rewrite(file_of(folder, "q_0064x0064_sd.npz"), keeps_origin=True, alpha_mask=np.full((64, 64), 0.7005, np.float32))
    batches, num_encoded = cache(folder, "--alpha_mask --flip_aug")
    mask = next(batch.masks_B1HW for batch in batches_of(batches) if batch.keys[0].endswith("q.png"))
    assert num_encoded == 0 and mask.unique().tolist() == pytest.approx([179 / 255]), "178.6 is nearest to 179"


@pytest.mark.parametrize("options", [DISK, MEMORY], ids=["disk", "memory"])
def test_subsets_that_share_an_image_only_get_its_mask_if_they_want_it(tmp_path, options):
    write_image(tmp_path / "a/q.png", (64, 64), seed=30, mode="RGBA")
    dataset = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/a'\n"
    plan = plan_of(
        write_config(tmp_path / "data.toml", f"{dataset}alpha_mask = true\n{dataset}class_tokens = 'whole'\n")
    )
    batches = open_batches(plan, cache_latents(plan, averaging_vae(), lambda: "vae", options, 1))
    masks = {batch.captions[0]: batch.masks_B1HW for batch in batches_of(batches)}
    assert masks[""] is not None and masks["whole"] is None


# Latents do not depend on how they are computed


def test_memory_disk_and_batching_give_the_same_latents(folder):
    expected = latents_by_key(cache(folder)[0])
    assert latents_by_key(cache(folder, options=MEMORY)[0]) == expected
    for path in (folder / "2_a").glob("*.npz"):
        path.unlink()
    assert (
        latents_by_key(cache(folder, options=CachingOptions(cache_latents_to_disk=True, vae_batch_size=1))[0])
        == expected
    )
    assert latents_by_key(cache(folder)[0]) == expected


def test_another_seed_samples_the_posterior_differently(folder):
    first = latents_by_key(cache(folder, options=MEMORY)[0])
    second = latents_by_key(cache(folder, options=MEMORY, seed=2)[0])
    assert all(first[key] != second[key] for key in first)


def test_batches_of_latents_do_not_depend_on_workers(folder):
    for options in (DISK, MEMORY):
        batches, _ = cache(folder, "--flip_aug", options)
        alone = [content_of(batch) for batch in batches_of(batches)]
        assert [content_of(batch) for batch in batches_of(batches, workers=2)] == alone


@pytest.mark.parametrize("options", [DISK, MEMORY])
def test_only_subsets_that_mirror_get_mirrored_copies(tmp_path, options):
    for name in "ab":
        write_image(tmp_path / f"{name}/p.png", seed=70 + ord(name))
    subset = "[[datasets.subsets]]\nimage_dir = '{here}/%s'\nflip_aug = %s\n"
    text = "[[datasets]]\nresolution = 64\n" + subset % ("a", "true") + subset % ("b", "false")
    plan = plan_of(write_config(tmp_path / "data.toml", text))
    calls: list[int] = []
    batches = open_batches(plan, cache_latents(plan, averaging_vae(calls), lambda: "vae", options, 1))
    assert sum(calls) == 3
    drawn = {
        (b.keys[0][-7], str(b.latents_BCHW.tolist())) for epoch in range(1, 12) for b in batches_of(batches, epoch)
    }
    assert sorted(name for name, _ in drawn) == ["a", "a", "b"]


def test_an_image_in_two_datasets_is_encoded_once_per_size(tmp_path):
    write_image(tmp_path / "a/p.png", (64, 64))
    dataset = "[[datasets]]\nresolution = {}\n[[datasets.subsets]]\nimage_dir = '{here}/a'\n"
    for sizes, num_encoded in (((64, 64), 1), ((64, 128), 2)):
        text = "".join(dataset.replace("{}", str(size)) for size in sizes)
        plan = plan_of(write_config(tmp_path / "data.toml", text))
        calls: list[int] = []
        batches = open_batches(
            plan, cache_latents(plan, averaging_vae(calls), lambda sizes=sizes: f"vae of {sizes}", DISK, 1)
        )
        shapes = sorted(tuple(batch.latents_BCHW.shape) for batch in batches_of(batches))
        assert sum(calls) == num_encoded
        assert shapes == [(1, 4, size // 8, size // 8) for size in sizes]
    with np.load(tmp_path / "a/p_0064x0064_sd.npz") as archive:
        assert {"latents_8x8", "latents_16x16"} <= set(archive.files)


def test_images_that_share_a_file_name_do_not_share_latents(tmp_path):
    write_image(tmp_path / "2_a/p.png", seed=40)
    write_image(tmp_path / "2_a/p.bmp", seed=41)
    latents = latents_by_key(cache(tmp_path)[0])
    assert latents == latents_by_key(cache(tmp_path, options=MEMORY)[0])
    assert len(latents) == 2 and len({str(latent) for latent in latents.values()}) == 2


def test_caches_go_to_the_cache_directory_of_their_dataset(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / name / "p.png", seed=ord(name))
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir = '{{here}}/{name}'\n" for name in ("a", "b"))

    def encode(project: str) -> int:
        text = f"[[datasets]]\nresolution = 64\ncache_directory = '{{here}}/{project}'\n{subsets}"
        calls: list[int] = []
        plan = plan_of(write_config(tmp_path / "data.toml", text))
        store = cache_latents(plan, averaging_vae(calls), lambda: "vae", DISK, 1)
        assert len(set(map(str, latents_by_key(open_batches(plan, store)).values()))) == 2
        return sum(calls)

    assert [encode(project) for project in ("one", "one", "other")] == [2, 0, 2]
    names = {path.relative_to(tmp_path).parts[0]: path.name for path in tmp_path.rglob("*.npz")}
    assert names == dict.fromkeys(("one", "other"), "p_0064x0064_sd.npz")
    assert [path.name for name in ("a", "b") for path in (tmp_path / name).iterdir()] == ["p.png", "p.png"]


def places(folder: Path) -> dict[str, int]:
    """Return the number of cache files below each folder of `folder`."""
    parts = [path.relative_to(folder).parts[0] for path in folder.rglob("*_sd.npz")]
    return {part: parts.count(part) for part in sorted(set(parts))}


def test_cache_dir_holds_entries_of_local_images_and_those_beside_them_are_read_first(folder, caplog):
    elsewhere = f"--cache_latents_to_disk --remote_cache_gb 0.001 --cache_dir {folder}/my_caches"
    batches, count = cache(folder, elsewhere)
    first = latents_by_key(batches)
    assert count == 3 and places(folder) == {"my_caches": 3}
    assert cache(folder, elsewhere)[1] == 0
    assert "no effect" not in caplog.text
    for path in (folder / "my_caches").rglob("p1_*.npz"):
        path.rename(folder / "2_a" / path.name)
    batches, count = cache(folder, elsewhere)
    assert count == 0 and places(folder) == {"2_a": 1, "my_caches": 2}
    assert latents_by_key(batches) == first
    write_image(folder / "2_a/p1.png", (80, 64), seed=7)
    before = file_of(folder, "p1_0080x0064_sd.npz").read_bytes()
    assert [cache(folder, elsewhere)[1] for _ in range(2)] == [1, 0]
    assert file_of(folder, "p1_0080x0064_sd.npz").read_bytes() == before and places(folder) == {
        "2_a": 1,
        "my_caches": 3,
    }


def test_cache_directory_of_a_dataset_wins_over_cache_dir(tmp_path):
    write_image(tmp_path / "a/p.png")
    text = "[[datasets]]\nresolution = 64\ncache_directory = '{here}/key'\n[[datasets.subsets]]\nimage_dir = '{here}/a'"
    options = write_config(tmp_path / "data.toml", text)
    options = options.with_values({"cache_dir": str(tmp_path / "flag"), "cache_latents_to_disk": True})
    cache_latents(plan_of(options), averaging_vae(), lambda: "vae", DISK, 1)
    assert places(tmp_path) == {"key": 1}


def test_caches_of_a_folder_that_cannot_be_written_go_below_output_dir(folder, caplog, monkeypatch):
    write_image(folder / "1_b/q.png")
    arguments = f"--cache_latents_to_disk --output_dir {folder}/out"
    assert cache(folder, arguments)[1] == 4 and places(folder) == {"1_b": 1, "2_a": 3}
    for path in folder.rglob("[pq][02]*.npz"):
        path.unlink()
    is_writable = data_plan.is_writable
    monkeypatch.setattr(data_plan, "is_writable", lambda path: not path.endswith("2_a") and is_writable(path))
    with caplog.at_level(logging.INFO):
        batches, count = cache(folder, arguments)
    assert count == 2 and places(folder) == {"1_b": 1, "2_a": 1, "out": 2}
    assert caplog.text.count("cannot be written") == 1 and str(folder / "out/cache") in caplog.text
    assert len(latents_by_key(batches)) == 4 and cache(folder, arguments)[1] == 0


def test_a_folder_is_writable_if_a_file_can_be_created_in_it(tmp_path):
    assert data_plan.is_writable(str(tmp_path)) and not data_plan.is_writable(str(tmp_path / "missing"))
    assert list(tmp_path.iterdir()) == []


# What makes an entry stale


def edit_image(folder: Path) -> None:
    write_image(folder / "2_a/p0.png", seed=99)


def truncate(folder: Path) -> None:
    file_of(folder).write_bytes(file_of(folder).read_bytes()[:700])


def flip_bits(folder: Path) -> None:
    content = bytearray(file_of(folder).read_bytes())
    content[400:404] = bytes(255 - byte for byte in content[400:404])
    file_of(folder).write_bytes(bytes(content))


def put_nan(folder: Path) -> None:
    rewrite(file_of(folder), latents=np.full((4, 8, 8), np.nan, np.float32))


def put_whole_numbers(folder: Path) -> None:
    rewrite(file_of(folder), latents=np.ones((4, 8, 8), np.int64))


def put_other_shape(folder: Path) -> None:
    rewrite(file_of(folder), latents=np.zeros((4, 8, 16), np.float32))


def put_other_crop(folder: Path) -> None:
    rewrite(file_of(folder), crop_ltrb=np.array([1.0, 0, 64, 64]))


def put_other_size(folder: Path) -> None:
    rewrite(file_of(folder), original_size=np.array([64, 65]))


def drop_latents(folder: Path) -> None:
    rewrite(file_of(folder), keeps_origin=True, latents=None)


def make_older_than_image(folder: Path) -> None:
    rewrite(file_of(folder))
    os.utime(file_of(folder), (1, 1))


def test_entries_with_random_samples_by_an_earlier_version_are_encoded_again(folder, caplog):
    spec = replace(SPEC, computed_as=POSTERIOR_MEAN)
    line = "3 stale (3 made of random samples by an earlier version, where the VAE's mean is needed"

    def missing() -> str:
        raise NotThere("it is missing")

    cache(folder)
    with caplog.at_level(logging.INFO):
        with pytest.raises(NotThere):
            cache_latents(open_folder(folder, spec=spec), averaging_vae(), missing, DISK, 1)
        assert caplog.text.count(line) == 1
        assert cache(folder, vae=f"vae{spec.vae_suffix}", spec=spec)[1] == 3
        assert caplog.text.count(line) == 2
        cache_latents(open_folder(folder, spec=spec), averaging_vae(), missing, DISK, 1)
        assert cache(folder, vae=f"vae{spec.vae_suffix}", spec=spec)[1] == 0
    assert caplog.text.count(line) == 2


@pytest.mark.parametrize("extension", ["bmp", "BMP", "dib", "tif", "tiff", "tga", "ppm"])
def test_an_uncompressed_image_of_equal_size_and_time_is_encoded_again(folder, tmp_path, extension):
    entries = {}
    for seed in (1, 2):
        path = write_image(tmp_path / f"other/{seed}.{extension.lower()}", seed=seed)
        entries[seed] = path.read_bytes()
    assert len(entries[1]) == len(entries[2])
    image = folder / f"2_a/b.{extension}"
    metadata = {str(image): {"caption": "cat"}, str(folder / "2_a/p0.png"): {"caption": "dog"}}
    (folder / "m.json").write_text(json.dumps(metadata))
    image.write_bytes(entries[1])
    os.utime(image, (1e9, 1e9))
    described = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = '{here}/m.json'\n"

    def cache_again() -> int:
        plan, calls = plan_of(write_config(folder / "data.toml", described)), []
        cache_latents(plan, averaging_vae(calls), lambda: "vae", DISK, 1)
        return sum(calls)

    assert [cache_again(), cache_again()] == [2, 0]
    os.utime(image, (2e9, 2e9))
    assert cache_again() == 0
    os.utime(image, (1e9, 1e9))
    image.write_bytes(entries[2])
    os.utime(image, (1e9, 1e9))
    assert [cache_again(), cache_again()] == [1, 0]


@pytest.mark.parametrize(("form", "words"), [("BMP", {}), ("TIFF", {}), ("TGA", {}), ("PNG", {"compress_level": 0})])
@pytest.mark.parametrize("system", ["posix", "nt"])
def test_an_uncompressed_image_is_known_by_its_content_whatever_its_name(folder, monkeypatch, form, words, system):
    """With an index of latents too, on Windows, where no time tells of an edit that keeps size and time."""
    if system == "nt":
        hide_change_times(monkeypatch)
        monkeypatch.setattr(image_index, "MIN_FILES", 1)
    path, counts = folder / "2_a/p0.png", []
    for seed in (1, 1, 1, 2, 2):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, form, **words)
        os.utime(path, (1e9, 1e9))
        counts.append(cache(folder)[1])
        for entry in folder.rglob("*.npz"):
            os.utime(entry, (1.1e9, 1.1e9))
    assert counts == [3, 0, 0, 1, 0]


def test_entries_of_sd_scripts_are_used_and_their_unknown_vae_is_reported(folder, caplog):
    cache(folder)
    for path in (folder / "2_a").glob("*.npz"):
        rewrite(path)
    with caplog.at_level(logging.INFO):
        assert cache(folder, vae="another vae")[1] == 0
    assert "3 cache entries do not name their VAE" in caplog.text


def test_an_origin_note_is_ignored_if_another_program_replaced_the_latents(folder, caplog):
    cache(folder)
    latents = np.ones((4, 8, 8), np.float32)
    rewrite(file_of(folder), keeps_origin=True, latents=latents)
    with caplog.at_level(logging.INFO):
        batches, num_encoded = cache(folder)
    assert num_encoded == 0 and "1 cache entries do not name" in caplog.text
    assert latents.tolist() in latents_by_key(batches).values()


def test_a_file_with_an_old_name_is_used_if_there_is_no_other(folder, caplog):
    cache(folder)
    rewrite(file_of(folder))
    os.rename(file_of(folder), file_of(folder, "p0.npz"))
    batches, num_encoded = cache(folder)
    assert num_encoded == 0 and "1 latents come from files with an old name" in caplog.text
    assert not file_of(folder).exists() and len(latents_by_key(batches)) == 3


def test_a_file_with_an_old_name_and_another_shape_is_neither_used_nor_changed(folder):
    np.savez(file_of(folder, "p0.npz"), latents=np.zeros((4, 9, 9), np.float32))
    assert cache(folder)[1] == 3
    with np.load(file_of(folder, "p0.npz")) as archive:
        assert archive["latents"].shape == (4, 9, 9)


# --skip_cache_check


def test_skip_cache_check_requires_only_that_the_file_exists(folder, caplog):
    cache(folder)
    skipping = CachingOptions(cache_latents=True, cache_latents_to_disk=True, skip_cache_check=True)
    file_of(folder).unlink()
    with caplog.at_level(logging.INFO):
        assert cache(folder, options=skipping, vae="another vae")[1] == 1
    assert "2 entries reused unchecked (--skip_cache_check), 1 to encode" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (put_other_shape, "holding latents of shape"),
        (put_whole_numbers, "holding latents of the type int64"),
        (truncate, "damaged"),
    ],
)
def test_an_invalid_file_passed_by_skip_cache_check_stops_the_run(folder, spoil, message):
    cache(folder)
    spoil(folder)
    skipping = CachingOptions(cache_latents=True, cache_latents_to_disk=True, skip_cache_check=True)
    batches, _ = cache(folder, options=skipping)
    with pytest.raises(ValueError, match=rf"p0_0064x0064_sd\.npz is {message}") as error:
        batches_of(batches)
    assert ("without --skip_cache_check" in str(error.value)) == (spoil is not truncate)


@pytest.mark.parametrize(
    ("spoil", "fix"),
    [(truncate, "delete it and run again to rebuild it"), (Path.unlink, "is missing; run again to rebuild it")],
)
def test_a_file_that_breaks_after_the_check_is_named_without_options_that_nobody_gave(folder, spoil, fix):
    batches, _ = cache(folder, options=DISK)
    spoil(folder if spoil is truncate else file_of(folder))
    with pytest.raises(ValueError, match=r"p0_0064x0064_sd\.npz is ") as error:
        batches_of(batches)
    assert str(error.value).endswith(fix) and "skip_cache_check" not in str(error.value)


def test_latents_of_another_image_that_replace_an_entry_during_the_run_are_refused(tmp_path):
    for name in ("a", "b"):  # equal names, sizes and buckets
        write_image(tmp_path / f"1_{name}/p.png", seed=ord(name))
    own, other = (tmp_path / f"1_{name}/p_0064x0064_sd.npz" for name in ("a", "b"))
    batches, _ = cache(tmp_path)
    content = own.read_bytes()
    own.write_bytes(content)  # the same entry, written anew
    assert len(latents_by_key(batches)) == 2
    for options in (DISK, replace(DISK, skip_cache_check=True)):
        own.write_bytes(content)
        batches, _ = cache(tmp_path, options=options)
        shutil.copy2(other, own)
        with pytest.raises(UserError, match=r"1_a.p_0064x0064_sd\.npz was replaced .* is made from another image; run"):
            batches_of(batches)


def test_latents_of_another_vae_that_replace_an_entry_during_the_run_are_refused(folder):
    batches, _ = cache(folder)
    cache(folder, vae="another")
    with pytest.raises(UserError, match="was replaced during the run and is made with another VAE"):
        batches_of(batches)


# Interruption and failure


def test_the_error_for_nan_from_the_vae_names_the_image_and_a_solution(folder):
    encode = averaging_vae()

    def encode_nan(pixels, generators):
        latents = encode(pixels, generators)
        latents[-1, 0, 0, 0] = float("nan")
        return latents

    with pytest.raises(ValueError, match=r"the VAE gives NaN for .*p1\.png; add --no_half_vae"):
        cache_latents(open_folder(folder), encode_nan, lambda: "vae", MEMORY, 1)


def test_latents_whose_shape_does_not_match_the_base_model_are_refused(folder):
    with pytest.raises(ValueError, match=r"shape \(4, 8, 8\) for .*, but \(16, 8, 8\) is needed"):
        cache(folder, spec=LatentSpec(16, 8, 64, "_x.npz", False))


@pytest.mark.parametrize("options", [DISK, MEMORY])
def test_a_damaged_image_is_skipped_and_reported(folder, options, caplog):
    path = folder / "2_a/p2.png"
    path.write_bytes(path.read_bytes()[:5000])
    batches, _ = cache(folder, options=options)
    assert "1 damaged images are skipped" in caplog.text and "p2.png is damaged" in caplog.text
    drawn_batches = list(batches.iterate_epoch(1, range(batches.plan.num_batches), int, 0, False))
    drawn = [key for batch in drawn_batches for key in batch.keys]
    assert all(batch.latents_BCHW is not None for batch in drawn_batches)
    assert len(drawn) == batches.plan.num_train_images and str(path) not in drawn


def test_a_damaged_image_without_a_replacement_stops_the_run_at_the_start(folder):
    for path in (folder / "2_a").glob("*.png"):
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"\.png is damaged; no other image of its size can replace it"):
        cache(folder, options=MEMORY)


def test_the_vae_is_loaded_before_encoding_and_hashed_only_for_caches_on_disk(folder: Path) -> None:
    """Hashing a VAE takes as long as loading it, so it happens only when needed."""
    events: list[str] = []

    def encode(pixels_BCHW: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        events.append("encoded")
        return averaging_vae()(pixels_BCHW, generators)

    def identity() -> str:
        events.append("hashed")
        return "vae"

    for options, expected in ((MEMORY, {"loaded", "encoded"}), (DISK, {"loaded", "encoded", "hashed"})):
        events.clear()
        cache_latents(open_folder(folder), encode, identity, options, 1, load_vae=lambda: events.append("loaded"))
        assert set(events) == expected and events.index("loaded") < events.index("encoded")


def test_regularisation_images_that_are_not_needed_are_not_encoded(tmp_path):
    write_image(tmp_path / "train/1_a/p.png")
    for i in range(3):
        write_image(tmp_path / f"reg/1_b/r{i}.png", seed=50 + i)
    plan = plan_of(
        options_of("--resolution 64", "--train_data_dir", f"{tmp_path}/train", "--reg_data_dir", f"{tmp_path}/reg")
    )
    calls: list[int] = []
    batches = open_batches(plan, cache_latents(plan, averaging_vae(calls), lambda: "vae", MEMORY, 1))
    assert sum(calls) == 2
    assert len(latents_by_key(batches)) == 2


def test_mask_files_are_used_with_cached_latents(tmp_path):
    write_image(tmp_path / "a/p.png", (64, 64))
    mask = write_image(tmp_path / "m/p.png", (64, 64), seed=60)
    config = tmp_path / "data.toml"
    config.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path.as_posix()}/a'\n"
        f"conditioning_data_dir = '{tmp_path.as_posix()}/m'\n"
    )
    plan = plan_of(options_of("--masked_loss", "--dataset_config", str(config)))
    batches = open_batches(plan, cache_latents(plan, averaging_vae(), lambda: "vae", MEMORY, 1))
    (batch,) = batches_of(batches)
    assert np.abs(batch.masks_B1HW[0, 0].numpy() - np.array(Image.open(mask))[..., 0] / 255).max() < 1e-6


# Several processes


def cache_on_machines(folders: list[Path], options: CachingOptions) -> list[tuple[dict[str, list], int]]:
    """Cache on machines of one process each; return each one's latents by image name and the number it encoded."""
    board = Board()

    def run(rank: int) -> tuple[dict[str, list], int]:
        calls: list[int] = []
        plan = open_folder(folders[rank])
        processes = Processes(rank, len(folders), local_rank=0, local_count=1, store=board)
        batches = open_batches(plan, cache_latents(plan, averaging_vae(calls), lambda: "vae", options, 1, processes))
        return {Path(key).name: value for key, value in latents_by_key(batches).items()}, sum(calls)

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(run, range(len(folders))))


@pytest.mark.parametrize("options", [DISK, MEMORY], ids=["disk", "memory"])
def test_machines_with_separate_disks_each_cache_every_latent(folder, tmp_path_factory, options):
    other = tmp_path_factory.mktemp("machine") / "data"
    shutil.copytree(folder, other)
    first, second = cache_on_machines([folder, other], options)
    alone, _ = cache(folder, options=MEMORY)
    expected = {Path(key).name: value for key, value in latents_by_key(alone).items()}
    assert first[0] == second[0] == expected


def test_machines_with_a_shared_disk_divide_the_work(folder):
    first, second = cache_on_machines([folder, folder], DISK)
    assert first[0] == second[0] and first[1] + second[1] == 3


def test_a_file_is_written_by_one_process_only(folder):
    """Two processes that add an entry to the same file at once would each lose the other's."""
    text = "".join(
        f"[[datasets]]\nresolution = [{width}, 64]\n[[datasets.subsets]]\nimage_dir = '{{here}}/2_a'\n"
        for width in (64, 128)
    )
    plan = plan_of(write_config(folder / "data.toml", text))
    jobs = plan_jobs(plan, to_disk=True)
    shares = [assign_jobs(jobs, rank, 2) for rank in range(2)]
    assert sorted(len(share) for share in shares) == [2, 4] and len({id(job) for s in shares for job in s}) == len(jobs)
    paths = [{job.file.path for job in share} for share in shares]
    assert paths[0] and paths[1] and not paths[0] & paths[1]


def test_latents_in_memory_are_not_read_from_old_files(folder):
    cache(folder)
    for path in (folder / "2_a").glob("*_sd.npz"):
        path.rename(path.with_name(path.name.partition("_")[0] + ".npz"))
    encoded = cache_on_machines([folder, folder], MEMORY)
    assert [count for _, count in encoded] == [3, 3]


def test_paths_of_latent_files_are_not_stored_per_image(tmp_path: Path) -> None:
    """Only exceptions are stored: one of two images with the same stem, kept in memory, and a file with an old name."""
    for i in range(40):
        write_image(tmp_path / "a" / f"p{i}.png", (64, 64), seed=i)
    write_image(tmp_path / "a" / "p3.jpg", (64, 64), seed=77)
    config = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/a'\n"
    plan = plan_of(write_config(tmp_path / "data.toml", config))
    first = open_batches(plan, cache_latents(plan, averaging_vae(), lambda: "vae", DISK, 1))
    expected = [content_of(batch) for batch in batches_of(first)]
    os.rename(tmp_path / "a" / "p7_0064x0064_sd.npz", tmp_path / "a" / "p7.npz")
    new_plan = plan_of(write_config(tmp_path / "data.toml", config))
    store = cache_latents(new_plan, averaging_vae(), lambda: "vae", DISK, 1)
    files = store.files
    names = [os.path.basename(files.renamed_files[number].path) for number in files.renamed_files]
    assert names == ["p7.npz"] and int(files.has_N.sum()) == 40 and len(store.memory) == 1
    assert [content_of(batch) for batch in batches_of(open_batches(new_plan, store))] == expected

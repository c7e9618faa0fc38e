"""Reference images of edit training: matched, resized, augmented with their image and checked before loading models."""

import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.base.errors import UserError
from library.data.batches.planned import PlannedBatches
from library.data.caching.latents import cache_latents
from library.data.decoding.images import read_pixels
from library.data.decoding.tensors import to_pixels
from library.data.description.buckets import ReferenceRules, Shape, cover
from library.data.plan import dataset_digest
from library.data.plan.data_plan import DataPlan
from library.data.scanned.images import References, ScannedImage
from library.data.sources.folders import image_index
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from library.training.saving.resume import content_differences
from tests.unit.data import builders
from tests.unit.data.builders import averaging_vae, batches_of, plan_of, write_config, write_folder, write_image
from tests.unit.data.shard_builders import write_parquet, write_tar
from tools import make_shards

SPEC = replace(builders.SPEC, max_references=3, bucket_step=16)
HEAD = "[[datasets]]\nresolution = 64\nbatch_size = 2\ncaption_extension = '.txt'\n"
SUBSET = "[[datasets.subsets]]\nimage_dir = '{here}/after'\n"


def plan(folder: Path, subset: str = "control_dirs = ['{here}/before']", dataset: str = "", spec=SPEC) -> DataPlan:
    return plan_of(write_config(folder / "data.toml", f"{HEAD}{dataset}\n{SUBSET}{subset}\n"), spec=spec)


def references_of(data_plan: DataPlan) -> dict[str, list[str]]:
    """Map the name of each image to the names of its references."""
    folder_and_name = [
        [
            Path(reference.key).relative_to(Path(reference.key).parents[1]).as_posix()
            for reference in sample.image.references
        ]
        for sample in data_plan.samples
    ]
    return dict(zip([Path(sample.image.key).name for sample in data_plan.samples], folder_and_name, strict=True))


def test_each_folder_gives_one_reference_in_order(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 2)
    for folder in ("style", "before"):
        write_image(tmp_path / folder / "p0.png", (32, 48))
        write_image(tmp_path / folder / "p1.jpg", (64, 64))
    data_plan = plan(tmp_path, "control_dirs = ['{here}/style', '{here}/before']")
    assert references_of(data_plan) == {
        "p0.png": ["style/p0.png", "before/p0.png"],
        "p1.png": ["style/p1.jpg", "before/p1.jpg"],
    }
    assert [reference.size for reference in data_plan.samples[0].image.references] == [(32, 48)] * 2


def test_several_references_in_a_folder_are_numbered(tmp_path: Path) -> None:
    for name in ("a", "a_1", "b"):
        write_image(tmp_path / "after" / f"{name}.png")
    for name in ("a_0000.png", "a_1.png", "b_2.png", "b_10.jpg", "c.png"):
        write_image(tmp_path / "before" / name)
    with pytest.raises(UserError, match=r"1 image with ambiguous reference images: b \(b_2.png, b_10.jpg\)"):
        plan(tmp_path)
    (tmp_path / "before" / "b_10.jpg").rename(tmp_path / "before" / "b_3.jpg")
    data_plan = plan(tmp_path)
    assert references_of(data_plan) == {
        "a.png": ["before/a_0000.png"],
        "a_1.png": ["before/a_1.png"],  # not the second reference of a.png
        "b.png": ["before/b_2.png", "before/b_3.jpg"],
    }
    assert [Path(path).name for path in data_plan.datasets[0].subsets[0].surplus] == ["c.png"]
    buckets = [(bucket.size, bucket.reference_sizes, len(bucket.draws)) for bucket in data_plan.draws.buckets]
    assert buckets == [((64, 64), ((64, 64),), 2), ((64, 64), ((64, 64),) * 2, 1)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["p0.png"], r"control_dirs .*before: 1 of 2 images have no reference image there: .*p1.png"),
        (["p0.png", "p0.jpg", "p1.png"], r"ambiguous reference images: p0 \(p0.jpg, p0.png\)"),
        (["p0.png", "p0_0.png", "p1.png"], r"ambiguous reference images: p0 \(p0.png, p0_0.png\)"),
        (
            ["p0_0.png", "p0_2.png", "p1.png"],
            r"ambiguous reference images: p0 \(p0_0.png, p0_2.png\); keep one of the image's own name",
        ),
    ],
    ids=["missing", "twice", "two names", "gap"],
)
def test_missing_and_ambiguous_references_are_refused_by_name(tmp_path: Path, names: list[str], message: str) -> None:
    write_folder(tmp_path / "after", 2)
    for name in names:
        write_image(tmp_path / "before" / name)
    with pytest.raises(UserError, match=message):
        plan(tmp_path)


def test_missing_folders_damaged_references_and_other_sources_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 1)
    with pytest.raises(UserError, match=r"control_dirs .*/before is not a folder"):
        plan(tmp_path)
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "p0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 reference image cannot be read: .*p0.png is not an image"):
        plan(tmp_path)
    shards = f"{HEAD}[[datasets.subsets]]\nshards = 'a.tar'\ncontrol_dirs = 'b'\n"
    with pytest.raises(UserError, match=r"\['control_dirs'\] has no effect with shards; it is for image_dir and metad"):
        plan_of(write_config(tmp_path / "shards.toml", shards))


def test_metadata_files_may_list_references(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 3)
    write_folder(tmp_path / "before", 3)
    lines = [
        {"image_path": "after/p0.png", "caption": "x", "control_path": "before/p0.png"},
        {
            "image_path": "after/p1.png",
            "caption": "x",
            "control_path_1": "before/p1.png",
            "control_path_0": "before/p2",
        },
        {"image_path": "after/p2.png", "caption": "x"},
    ]
    (tmp_path / "meta.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = f"{HEAD}[[datasets.subsets]]\nmetadata_file = '{{here}}/meta.jsonl'\nimage_dir = '{{here}}'\n"
    text = text.replace("caption_extension = '.txt'\n", "")
    data_plan = plan_of(write_config(tmp_path / "data.toml", text), spec=SPEC)
    expected = {"p0.png": ["before/p0.png"], "p1.png": ["before/p2.png", "before/p1.png"], "p2.png": []}
    assert references_of(data_plan) == expected
    with pytest.raises(UserError, match=r"names reference images with control_path, and the subset has control_dirs"):
        plan_of(write_config(tmp_path / "both.toml", f"{text}control_dirs = '{{here}}/before'\n"), spec=SPEC)
    table = {"after/p0": {"caption": "x", "control_path": "before/nowhere.png"}}
    (tmp_path / "meta.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"there are no such reference images: before/nowhere.png"):
        plan_of(write_config(tmp_path / "data.toml", text.replace(".jsonl", ".json")), spec=SPEC)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"control_path_0": "a", "control_path_2": "b"},
            "has control_path_0, control_path_2; name one reference image",
        ),
        ({"control_path": "a", "control_path_0": "b"}, "has control_path, control_path_0; name one reference image"),
        ({"control_path": 3}, "control_path is 3, but must be text"),
    ],
)
def test_invalid_references_in_metadata_files_are_refused(
    tmp_path: Path, entry: dict[str, object], message: str
) -> None:
    (tmp_path / "meta.jsonl").write_text(json.dumps({"image_path": "p0.png", **entry}))
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = '{here}/meta.jsonl'\n"
    with pytest.raises(UserError, match=f"line 1:? {message}"):
        plan_of(write_config(tmp_path / "data.toml", text))


def test_dataset_files_of_musubi_tuner_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 2)
    write_folder(tmp_path / "before", 2, (96, 128))
    flat = f"{HEAD}image_directory = '{{here}}/after'\ncontrol_directory = '{{here}}/before'\n"
    flat += "control_resolution = [96, 96]\nno_resize_control = true\n"
    data_plan = plan_of(write_config(tmp_path / "flat.toml", flat), spec=SPEC)
    keys = "control_dirs = ['{here}/before']\ncontrol_resolution = 96\ncontrol_no_resize = true\n"
    steps = "bucket_reso_steps = 0\nmin_bucket_reso = 0\nmax_bucket_reso = 256"
    expected = plan(tmp_path, keys, dataset=steps)
    assert data_plan.config == expected.config and list(data_plan.samples) == list(expected.samples)
    earlier = flat.replace("no_resize_control", "qwen_image_edit_no_resize_control").replace(
        "control_resolution", "qwen_image_edit_control_resolution"
    )
    general = flat.replace("no_resize_control = true", "") + "[general]\nflux_kontext_no_resize_control = true\n"
    for name, text in (("earlier", earlier), ("general", general)):
        assert plan_of(write_config(tmp_path / f"{name}.toml", text), spec=SPEC).config == expected.config
    twice = f"{flat}qwen_image_edit_control_resolution = [64, 64]\n"
    with pytest.raises(UserError, match="qwen_image_edit_control_resolution has another value"):
        plan_of(write_config(tmp_path / "twice.toml", twice), spec=SPEC)


# Sizes


def test_references_are_resized_to_their_image_by_default() -> None:
    target = Shape((64, 64), (96, 64))
    default, area = ReferenceRules(None, False, 16), ReferenceRules((96, 96), False, 16)
    assert default.shape((300, 200), (300, 200), target) == target
    assert default.shape((100, 200), (300, 200), target) == Shape((64, 64), (64, 128))
    # 16:9 of 9216 pixels is 128 x 72: the nearest ratio in steps of 16 is 128 x 64
    assert area.shape((1600, 900), (64, 64), target) == Shape((128, 64), cover((1600, 900), (128, 64)))
    unresized, limited = ReferenceRules(None, True, 16), ReferenceRules((96, 96), True, 16)
    assert unresized.shape((333, 65), (64, 64), target) == Shape((320, 64), (333, 65))
    assert limited.shape((90, 50), (64, 64), target) == Shape((80, 48), (90, 50))
    width, height = limited.shape((900, 900), (64, 64), target).bucket
    assert (width, height) == (96, 96)


def test_reference_columns_are_equal_however_they_are_accessed() -> None:
    rows = [[("a/0.png", (3, 4)), ("b/0.png", (5, 6))], [], [("a/2.png", (7, 8))]]
    columns = References.of(rows)
    expected = [tuple(ScannedImage(path, "", size) for path, size in row) for row in rows]
    assert list(columns) == expected
    assert [columns.of_image(i) for i in range(3)] == expected
    assert list(columns.take(np.array([2, 0, 2]))) == [expected[2], expected[0], expected[2]]


def test_each_batch_has_references_of_one_size(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 6)
    for i in range(6):
        write_image(tmp_path / "before" / f"p{i}.png", (64, 64) if i % 2 else (128, 64), seed=50 + i)
    data_plan = plan(
        tmp_path,
        "control_dirs = ['{here}/before']\ncontrol_no_resize = true",
        "enable_bucket = true\nbucket_reso_steps = 16\nmin_bucket_reso = 16",
    )
    seen = {}
    for batch in batches_of(data_plan):
        (pixels_BCHW,) = batch.reference_pixels
        for key, pixels in zip(batch.keys, pixels_BCHW, strict=True):
            seen[Path(key).name] = pixels
    for i in range(6):
        expected = to_pixels(read_pixels(str(tmp_path / "before" / f"p{i}.png"))[0])
        assert torch.equal(seen[f"p{i}.png"], expected)


# Draws


def write_same(folder: Path, count: int, size: tuple[int, int] = (64, 64)) -> None:
    """Write images, and references with the same pixels in other files."""
    write_folder(folder / "after", count, size)
    (folder / "before").mkdir()
    for i in range(count):
        Image.open(folder / "after" / f"p{i}.png").save(folder / "before" / f"p{i}.bmp")


@pytest.mark.parametrize(
    "keys", ["flip_aug = true", "random_crop = true\nflip_aug = true", "color_aug = true", "brightness_aug = 0.5"]
)
def test_references_are_augmented_like_their_image(tmp_path: Path, keys: str) -> None:
    write_same(tmp_path, 8, (96, 80))
    data_plan = plan(tmp_path, f"control_dirs = '{{here}}/before'\n{keys}")
    plain = {
        key: pixels
        for batch in batches_of(plan(tmp_path))
        for key, pixels in zip(batch.keys, batch.pixels_BCHW, strict=True)
    }
    num_changed = 0
    for batch in batches_of(data_plan, epoch=3):
        assert torch.equal(batch.reference_pixels[0], batch.pixels_BCHW)
        num_changed += sum(
            not torch.equal(plain[key], image) for key, image in zip(batch.keys, batch.pixels_BCHW, strict=True)
        )
    assert num_changed > 0


def test_crops_that_references_cannot_follow_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 2, (96, 80))
    write_folder(tmp_path / "before", 2, (96, 81))
    with pytest.raises(UserError, match="random_crop crops images where reference images of another size cannot"):
        plan(tmp_path, "control_dirs = '{here}/before'\nrandom_crop = true")
    data_plan = plan(tmp_path, "control_dirs = '{here}/before'")
    assert [tuple(batch.reference_pixels[0].shape) for batch in batches_of(data_plan)] == [(2, 3, 64, 64)]


def test_references_stay_with_their_image_in_the_validation_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 4)
    write_folder(tmp_path / "before", 4, seed=3)
    data_plan = plan(tmp_path, "control_dirs = '{here}/before'\nvalidation_split = 0.5\nflip_aug = true")
    assert len(data_plan.draws_aside.sample_of_draw) == 2
    for sample in data_plan.samples:
        (reference,) = sample.image.references
        assert Path(reference.key).name == Path(sample.image.key).name


# Checks


def test_more_references_than_the_base_model_supports_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 1)
    write_folder(tmp_path / "before", 1)
    with pytest.raises(UserError, match=r"has 1 reference image for each image .* this base model takes none; remove"):
        plan(tmp_path, spec=builders.SPEC)
    two = "control_dirs = ['{here}/before', '{here}/before']"
    with pytest.raises(UserError, match=r"has 2 reference images for each image .* this base model takes at most 1;"):
        plan(tmp_path, two, spec=replace(SPEC, max_references=1))


def audit_log(data_plan: DataPlan, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        data_plan.audit(logging.getLogger("audit"))
    return caplog.text


def test_the_audit_reports_unusual_references(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / "after", 4)
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "p0.png").write_bytes((tmp_path / "after" / "p0.png").read_bytes())
    write_image(tmp_path / "before" / "p1.png", (128, 64))
    write_image(tmp_path / "before" / "p2.png", seed=9, mode="RGBA")
    write_image(tmp_path / "before" / "p3.png", (128, 128), seed=9)
    write_image(tmp_path / "before" / "other.png")
    text = audit_log(plan(tmp_path), caplog)
    assert "1 reference image for each image, resized to the size of their image" in text
    assert "1 reference image without an image of its name, not used: other.png" in text
    assert "1 image with a reference image of another aspect ratio, which is cropped to theirs" in text
    assert "1 image equal to its reference image, which teaches the model to change nothing: p0.png" in text
    assert "1 reference image with an alpha channel, which is dropped" in text and "stored under them: p2.png" in text
    assert "bucket 64x64 with references of 64x64: 4 draws, 2 batches" in text
    text = audit_log(plan(tmp_path, "control_dirs = '{here}/before'\ncontrol_resolution = 64"), caplog)
    assert "resized to the area of 64x64" in text and "another aspect ratio" not in text
    text = audit_log(plan(tmp_path, "control_resolution = 64"), caplog)
    assert "control_resolution has no effect: the subset has no reference images" in text


@pytest.mark.parametrize("source", ["control_dirs", "control_path"])
def test_one_instruction_for_many_pairs_is_not_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    for n in range(9):
        write_image(tmp_path / f"after/p{n}.png", seed=n).with_suffix(".txt").write_text("make it red")
        write_image(tmp_path / f"before/p{n}.png", seed=50 + n)
    if source == "control_dirs":
        pairs, alone = plan(tmp_path), plan(tmp_path, "")
    else:
        subset = "metadata_file = '{here}/meta.json'\nimage_dir = '{here}'\n"
        config = write_config(tmp_path / "meta.toml", f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{subset}")
        table = {f"after/p{n}": {"caption": "make it red", "control_path": f"before/p{n}.png"} for n in range(9)}
        (tmp_path / "meta.json").write_text(json.dumps(table))
        pairs = plan_of(config, spec=SPEC)
        (tmp_path / "meta.json").write_text(json.dumps({key: {"caption": "make it red"} for key in table}))
        alone = plan_of(config, spec=SPEC)
    assert "captions are the same" not in audit_log(pairs, caplog)
    assert "all 9 captions are the same" in audit_log(alone, caplog)


def test_the_identity_of_a_dataset_depends_on_its_references(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 2)
    write_folder(tmp_path / "before", 2, seed=1)
    write_folder(tmp_path / "more", 2, (48, 64), seed=2)
    alone, first = plan(tmp_path, "").identity, plan(tmp_path).identity
    assert plan(tmp_path).identity == first and alone != first
    assert plan(tmp_path, "control_dirs = '{here}/more'").identity != first
    assert plan(tmp_path, "control_dirs = '{here}/before'\ncontrol_resolution = 96").identity != first
    contents = plan(tmp_path).identity_with_contents["contents"]
    write_image(tmp_path / "before" / "p1.png", seed=77)
    changed = plan(tmp_path).identity_with_contents["contents"]
    paths = plan(tmp_path).image_paths
    assert [path for path, a, b in zip(paths, contents, changed, strict=True) if a != b] == [
        str(tmp_path / "before" / "p1.png")
    ]


def test_changed_references_in_shards_and_changed_masks_are_named_at_resume(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 1)
    keys = "conditioning_data_dir = '{here}/masks'"
    options = write_config(tmp_path / "masked.toml", f"{HEAD}{SUBSET}{keys}\n").with_values({"masked_loss": True})
    subset = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nshards = '{here}/a.tar'"
    shards = write_config(tmp_path / "shards.toml", subset)
    states = []
    for seed in (1, 2):
        mask = write_image(tmp_path / "masks" / "p0.png", seed=seed)
        image = (tmp_path / "after" / "p0.png").read_bytes()
        write_tar(tmp_path / "a.tar", [("p0.png", image), ("p0.control.png", mask.read_bytes())])
        plans = [plan_of(options), plan_of(shards, spec=SPEC)]
        states.append([one.identity_with_contents for one in plans])
    for before, now, data_plan in zip(*states, plans, strict=True):
        (line,) = content_differences(before, now, data_plan.image_paths)
        assert line.startswith("1 image changed since the state was saved: ") and line.endswith(
            ("masks/p0.png", "a.tar/p0.control.png")
        )
        # States from before these digests existed.
        older = [before["contents"][:1], [*before["contents"][:1], ""]]
        assert not [*content_differences({**before, "contents": older[0]}, now, data_plan.image_paths)]
        assert not [*content_differences({**before, "contents": older[1]}, now, data_plan.image_paths)]


def test_more_references_than_are_compared_do_not_stop_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_digest, "MAX_IMAGES", 3)
    write_folder(tmp_path / "after", 2)
    write_folder(tmp_path / "before", 2, seed=1)
    write_folder(tmp_path / "more", 2, seed=2)
    data_plan = plan(tmp_path, "control_dirs = ['{here}/before', '{here}/more']")
    identity = data_plan.identity_with_contents
    assert not [*content_differences(identity, identity, data_plan.image_paths)]


# Caches


DISK = CachingOptions(cache_latents=True, cache_latents_to_disk=True, vae_batch_size=2)
MEMORY = CachingOptions(cache_latents=True, vae_batch_size=2)
FLIPPED = "control_dirs = ['{here}/before', '{here}/more']\nflip_aug = true\ncontrol_resolution = [48, 32]"


def write_two_references(folder: Path) -> None:
    write_folder(folder / "after", 3)
    write_folder(folder / "before", 3, (96, 64), seed=1)
    write_folder(folder / "more", 3, (64, 96), seed=2)


def cache(data_plan: DataPlan, options: CachingOptions) -> tuple[PlannedBatches, int]:
    """Return batches with cached latents, and the number of images, references and mirrored copies encoded."""
    calls: list[int] = []
    encode = averaging_vae()

    def count_and_encode(pixels_BCHW, generators):
        calls.append(len(pixels_BCHW))
        return encode(pixels_BCHW, generators)

    return open_batches(data_plan, cache_latents(data_plan, count_and_encode, lambda: "vae", options, 1)), sum(calls)


@pytest.mark.parametrize("options", [MEMORY, DISK], ids=["memory", "disk"])
def test_cached_references_match_encoded_batches(tmp_path: Path, options: CachingOptions) -> None:
    write_two_references(tmp_path)
    data_plan = plan(tmp_path, FLIPPED)
    batches, count = cache(data_plan, options)
    assert count == 3 * 3 * 2  # an image and two references, each also mirrored
    encode, num_flipped = averaging_vae(), 0
    for epoch in (1, 2):
        for plain, stored in zip(batches_of(data_plan, epoch), batches_of(batches, epoch), strict=True):
            assert stored.keys == plain.keys and stored.pixels_BCHW is None and stored.reference_pixels == ()
            for pixels, latents in zip(plain.reference_pixels, stored.reference_latents, strict=True):
                torch.testing.assert_close(latents, encode(pixels, None))
            assert [tuple(latents_BCHW.shape[1:]) for latents_BCHW in stored.reference_latents] == [
                (4, 4, 6),
                (4, 6, 4),
            ]
            first = [to_pixels(read_pixels(key)[0]) for key in plain.keys]
            num_flipped += sum(not torch.equal(a, b) for a, b in zip(first, plain.pixels_BCHW, strict=True))
    assert 0 < num_flipped < 6


def test_a_changed_reference_is_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_two_references(tmp_path)
    assert cache(plan(tmp_path, FLIPPED), DISK)[1] == 18
    assert cache(plan(tmp_path, FLIPPED), DISK)[1] == 0
    os.utime(tmp_path / "more" / "p0.png")  # the content is unchanged
    assert cache(plan(tmp_path, FLIPPED), DISK)[1] == 0
    write_image(tmp_path / "more" / "p0.png", (64, 96), seed=900)
    with caplog.at_level(logging.INFO):
        assert cache(plan(tmp_path, FLIPPED), DISK)[1] == 6
    assert "1 stale (1 made from other reference images" in caplog.text
    swapped = FLIPPED.replace("'{here}/before', '{here}/more'", "'{here}/more', '{here}/before'")
    assert cache(plan(tmp_path, swapped), DISK)[1] == 18
    other_size = swapped.replace("[48, 32]", "64")
    assert cache(plan(tmp_path, other_size), DISK)[1] == 18
    one_folder = "control_dirs = '{here}/more'\ncontrol_resolution = 64"
    assert cache(plan(tmp_path, one_folder), DISK)[1] == 6
    with np.load(tmp_path / "after" / "p0_0064x0064_sd.npz") as archive:
        assert sorted(key for key in archive if key.startswith("reference")) == ["reference_0_8x8"]
    assert cache(plan(tmp_path, ""), DISK)[1] == 0  # the image itself has not changed
    assert cache(plan(tmp_path, one_folder), DISK)[1] == 0


def test_an_uncompressed_reference_of_equal_size_and_time_is_encoded_again(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 3)
    one = "control_dirs = ['{here}/before']"
    for seed, count in ((1, 6), (2, 2), (2, 0)):
        for number in range(3):
            reference = write_image(tmp_path / f"before/p{number}.bmp", seed=seed if number == 1 else 9)
            os.utime(reference, (1e9, 1e9))
        assert cache(plan(tmp_path, one), DISK)[1] == count


@pytest.mark.parametrize("source", ["a.bmp", "a.png", "parquet"])
def test_an_uncompressed_image_in_a_larger_file_is_encoded_again_if_its_middle_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Whatever its name, and although an index says which entries were valid."""
    monkeypatch.setattr(image_index, "MIN_FILES", 1)
    monkeypatch.setattr(image_index, "SETTLED_NS", 0)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for change, count in ((0, 1), (0, 0), (0, 0), (99, 1), (99, 0)):
        pixels[30:34] = change
        Image.fromarray(pixels).save(tmp_path / "a.bmp")
        content, key = (tmp_path / "a.bmp").read_bytes(), "parquet" if source == "parquet" else "shards"
        write_parquet(tmp_path / "0000.parquet", {"image": [content], "text": ["a cat"]})
        write_tar(tmp_path / "0000.shards", [(source, content), ("a.txt", b"a cat")])
        words = f"{HEAD}[[datasets.subsets]]\n{key} = '{{here}}/0000.{key}'\n"
        assert cache(plan_of(write_config(tmp_path / "data.toml", words), spec=SPEC), DISK)[1] == count


def test_an_entry_without_references_is_not_used_for_a_pair(tmp_path: Path) -> None:
    write_two_references(tmp_path)
    assert cache(plan(tmp_path, ""), DISK)[1] == 3
    assert cache(plan(tmp_path), DISK)[1] == 6
    path = tmp_path / "after" / "p0_0064x0064_sd.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **{key: value for key, value in arrays.items() if not key.startswith(("reference", "origin"))})
    assert cache(plan(tmp_path), DISK)[1] == 2
    arrays["reference_0_8x8"] = arrays["reference_0_8x8"] + 1
    np.savez(path, **arrays)  # rewritten by another program, so the origin note no longer applies
    assert cache(plan(tmp_path), DISK)[1] == 2


def test_an_image_with_different_references_is_encoded_separately(tmp_path: Path) -> None:
    write_two_references(tmp_path)
    again = f"control_dirs = '{{here}}/before'\n{HEAD}{SUBSET}control_dirs = '{{here}}/more'"
    data_plan = plan(tmp_path, again)
    batches, count = cache(data_plan, DISK)
    assert count == 12
    encode = averaging_vae()
    for plain, stored in zip(batches_of(data_plan), batches_of(batches), strict=True):
        torch.testing.assert_close(stored.reference_latents[0], encode(plain.reference_pixels[0], None))


def test_trained_pairs_can_be_measured(tmp_path: Path) -> None:
    write_same(tmp_path, 4, (96, 80))
    data_plan = plan(tmp_path, "control_dirs = '{here}/before'\nrandom_crop = true\nflip_aug = true")
    limited, numbers = data_plan.limited_to_measured(2, [])
    for batch in open_batches(limited).measured(numbers).batches([0], 0):
        assert torch.equal(batch.reference_pixels[0], batch.pixels_BCHW)
        assert batch.pixels_BCHW.shape == (2, 3, 64, 64)


def test_a_damaged_reference_is_replaced_with_its_image(tmp_path: Path) -> None:
    write_folder(tmp_path / "after", 4)
    write_folder(tmp_path / "before", 4, seed=6)
    content = (tmp_path / "before" / "p2.png").read_bytes()
    (tmp_path / "before" / "p2.png").write_bytes(content[: len(content) // 2])
    data_plan = plan(tmp_path)
    batches = open_batches(data_plan)
    keys = [Path(key).name for batch in batches_of(batches) for key in batch.keys]
    assert len(keys) == 4 and "p2.png" not in keys


def test_masks_and_references_can_be_combined(tmp_path: Path) -> None:
    write_same(tmp_path, 4)
    for i in range(4):
        write_image(tmp_path / "masks" / f"p{i}.png", seed=30 + i)
    keys = "control_dirs = '{here}/before'\nconditioning_data_dir = '{here}/masks'\nflip_aug = true"
    options = write_config(tmp_path / "data.toml", f"{HEAD}{SUBSET}{keys}\n").with_values({"masked_loss": True})
    data_plan = plan_of(options, spec=SPEC)
    assert {sample.image.mask_path is not None for sample in data_plan.samples} == {True}
    for batch in batches_of(data_plan):
        assert torch.equal(batch.reference_pixels[0], batch.pixels_BCHW)
        for key, pixels, mask in zip(batch.keys, batch.pixels_BCHW, batch.masks_B1HW, strict=True):
            red = torch.from_numpy(np.array(Image.open(tmp_path / "masks" / Path(key).name))[..., 0]) / 255
            is_flipped = not torch.equal(pixels, to_pixels(np.array(Image.open(key))))
            torch.testing.assert_close(mask[0], red.flip(-1) if is_flipped else red)


def write_pairs(folder: Path) -> None:
    """Write four images with two references each."""
    write_folder(folder / "after", 4)
    write_folder(folder / "before", 4, seed=7, caption=None)
    for n in range(4):
        write_image(folder / "before" / f"p{n}_1.png", (96, 64), seed=40 + n)
        (folder / "before" / f"p{n}.png").rename(folder / "before" / f"p{n}_0.png")


def pack_pairs(folder: Path, kind: str) -> str:
    """Pack the pairs of `write_pairs` and return the subset that reads them."""
    files = {path.name: path.read_bytes() for path in sorted((folder / "after").iterdir())}
    references = {path.stem: path.read_bytes() for path in sorted((folder / "before").glob("*.png"))}
    stems = sorted({name.partition(".")[0] for name in files})
    if kind == "tar":
        members = list(files.items()) + [
            (name.replace("_", ".control_") + ".png", content) for name, content in references.items()
        ]
        write_tar(folder / "a.tar", sorted(members))
        return "shards = '{here}/a.tar'"
    columns = {
        "image": [{"bytes": files[f"{stem}.png"], "path": None} for stem in stems],
        "caption": [files[f"{stem}.txt"].decode() for stem in stems],
        "one": [references[f"{stem}_0"] for stem in stems],
        "two": [{"bytes": references[f"{stem}_1"], "path": None} for stem in stems],
    }
    write_parquet(folder / "a.parquet", columns)
    return "parquet = '{here}/a.parquet'\ncontrol_columns = ['one', 'two']"


def plan_of_files(folder: Path, subset: str) -> DataPlan:
    text = f"{HEAD}[[datasets.subsets]]\ncontrol_resolution = 64\n{subset}\n"
    return plan_of(write_config(folder / "files.toml", text), spec=SPEC)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_and_parquet_files_may_contain_references(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_pairs(tmp_path)
    expected = plan(tmp_path, "control_dirs = ['{here}/before']\ncontrol_resolution = 64")
    for _ in range(2):  # the second time from the index
        data_plan = plan_of_files(tmp_path, pack_pairs(tmp_path, kind))
        assert [sample.shape for sample in data_plan.samples] == [sample.shape for sample in expected.samples]
        for batch, expected_batch in zip(batches_of(data_plan), batches_of(expected), strict=True):
            assert len(expected_batch.reference_pixels) == 2 and expected_batch.captions == batch.captions
            assert all(map(torch.equal, (batch.pixels_BCHW, *batch.reference_pixels),
                           (expected_batch.pixels_BCHW, *expected_batch.reference_pixels)))  # fmt: skip
    options = CachingOptions(cache_latents=True, cache_latents_to_disk=True)
    assert cache(data_plan, options)[1] == 12 and cache(data_plan, options)[1] == 0  # four images and their references
    assert "equal to its reference" not in audit_log(data_plan, caplog)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["p0.png", "p0.control.png", "p1.png"], r"1 of 2 images have no reference image: .*p1\.png"),
        (
            ["p0.png", "p0.control_0.png", "p0.control_2.png", "p1.png"],
            "p0.png has reference images that are not numbered consecutively",
        ),
        (["p1.png", "p1.control.png", "p2.control.png"], "p2.control.png is a reference image without an image"),
    ],
)
def test_mismatched_references_in_shards_are_reported(
    tmp_path: Path, names: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(tmp_path / "one.png", (64, 64), seed=3)
    write_tar(tmp_path / "a.tar", [(name, (tmp_path / "one.png").read_bytes()) for name in names])
    try:
        message_or_log = audit_log(plan_of_files(tmp_path, "shards = '{here}/a.tar'"), caplog)
    except UserError as error:
        message_or_log = str(error)
    assert re.search(message, message_or_log)


def test_equal_and_damaged_references_in_a_shard_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "one.png", (64, 64), seed=3)
    content = (tmp_path / "one.png").read_bytes()
    members = [("p0.png", content), ("p0.control.png", content), ("p1.png", content), ("p1.control.png", b"no image")]
    write_tar(tmp_path / "a.tar", members)
    text = audit_log(plan_of_files(tmp_path, "shards = '{here}/a.tar'"), caplog)
    assert "1 image equal to its reference image" in text and "has a reference image, p1.control.png, that" in text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("['none']", "control_columns is 'none', but .*a.parquet has no such column; it has image, caption, one, two"),
        ("['caption']", r"control_columns 'caption' of .*a.parquet has string, but must have image bytes"),
    ],
)
def test_columns_without_references_are_refused(tmp_path: Path, columns: str, message: str) -> None:
    write_pairs(tmp_path)
    pack_pairs(tmp_path, "parquet")
    with pytest.raises(UserError, match=message):
        plan_of_files(tmp_path, f"parquet = '{{here}}/a.parquet'\ncontrol_columns = {columns}")


def test_packed_pairs_train_like_their_folders(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    keys = "control_dirs = ['{here}/before']\ncontrol_resolution = 64"
    expected = plan(tmp_path, keys)
    assert make_shards.main(["--dataset_config", str(tmp_path / "data.toml"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "dataset.toml").read_text()
    data_plan = plan_of(write_config(tmp_path / "out" / "again.toml", text), spec=SPEC)
    for batch, expected_batch in zip(batches_of(data_plan), batches_of(expected), strict=True):
        assert (
            all(map(torch.equal, batch.reference_pixels, expected_batch.reference_pixels))
            and len(expected_batch.reference_pixels) == 2
        )
    packed = (tmp_path / "out" / "after-00000.tar").read_bytes()
    write_image(tmp_path / "before" / "p0_0.png", (64, 64), seed=99)
    assert make_shards.main(["--dataset_config", str(tmp_path / "data.toml"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "after-00000.tar").read_bytes() != packed, "another reference, another shard"

"""Image pairs of opposite_dir: matched by name, augmented alike and checked before any model is loaded."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.base.errors import UserError
from library.data.caching.latents import cache_latents
from library.data.plan.data_plan import DataPlan
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from library.protocols import LatentSpec
from tests.unit.data import builders
from tests.unit.data.builders import (
    averaging_vae,
    batches_of,
    plan_of,
    validation_of,
    write_config,
    write_folder,
    write_image,
)

HEAD = "[[datasets]]\nresolution = 64\nbatch_size = 2\ncaption_extension = '.txt'\n"
SUBSET = "[[datasets.subsets]]\nimage_dir = '{here}/good'\n"
PAIR = "opposite_dir = '{here}/bad'\n"


def plan(
    folder: Path,
    keys: str = PAIR,
    head: str = HEAD,
    more: str = "",
    trains: str = "dpo",
    spec: LatentSpec = builders.SPEC,
) -> DataPlan:
    options = write_config(folder / "data.toml", f"{head}{SUBSET}{keys}{more}")
    return plan_of(options.with_values({"preference_loss": trains or None}), spec=spec)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Write two images with partners of other sizes, one of them in another format."""
    write_folder(tmp_path / "good", 2)
    write_image(tmp_path / "bad" / "p0.png", (96, 96), seed=7)
    write_image(tmp_path / "bad" / "p1.webp", (32, 64), seed=8)
    return tmp_path


def test_an_image_is_paired_with_the_one_of_its_name_resized_to_it(
    pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Base models without reference images can train pairs; partners are in the order of their images."""
    write_image(pairs / "bad" / "p2.png")
    data_plan = plan(pairs)
    with caplog.at_level(logging.INFO):
        data_plan.audit(logging.getLogger("audit"))
    (batch,) = batches_of(data_plan)
    partners = {
        sample.image.key: [Path(reference.key).name for reference in sample.image.references]
        for sample in data_plan.samples
    }
    assert [partners[key] for key in batch.keys] == [
        [Path(key).stem + (".png" if key.endswith("p0.png") else ".webp")] for key in batch.keys
    ]
    assert batch.pixels_BCHW is not None and len(batch.reference_pixels) == 1
    assert batch.reference_pixels[0].shape == batch.pixels_BCHW.shape == (2, 3, 64, 64)
    assert "one partner in" in caplog.text and "1 reference image without an image of its name" in caplog.text
    assert "1 image with a reference image of another aspect ratio, which is cropped to theirs: p1.png" in caplog.text


@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
def test_cached_partners_are_sampled_with_the_noise_of_their_images(pairs: Path, to_disk: bool) -> None:
    """Both images of a pair get the same noise, which otherwise would tell the preferred from the rejected one."""
    data_plan = plan(pairs, f"{PAIR}flip_aug = true\n")
    options = CachingOptions(cache_latents=True, cache_latents_to_disk=to_disk)
    cached, encode = (
        open_batches(data_plan, cache_latents(data_plan, averaging_vae(), lambda: "vae", options, 1)),
        averaging_vae(),
    )
    for epoch in (1, 2):
        for plain, stored in zip(batches_of(data_plan, epoch), batches_of(cached, epoch), strict=True):
            noise = stored.latents_BCHW - encode(plain.pixels_BCHW, None)
            assert 0.008 < float(noise.std()) < 0.012
            torch.testing.assert_close(stored.reference_latents[0] - encode(plain.reference_pixels[0], None), noise)


def test_a_partner_is_opaque_where_the_alpha_channel_of_its_image_is_a_mask(tmp_path: Path) -> None:
    """For a base model that encodes alpha channels, in the step and cached."""
    for folder, seed in (("good", 1), ("bad", 2)):
        for path in write_folder(tmp_path / folder, 2, seed=seed).glob("*.png"):
            with Image.open(path) as image:
                image.putalpha(60)
                image.save(path)
    spec, average = replace(builders.SPEC, has_alpha=True), averaging_vae()

    def encode(pixels_BCHW: torch.Tensor, generators: Sequence[torch.Generator] | None) -> torch.Tensor:
        return average(pixels_BCHW[:, 1:], generators)  # three channels, among them alpha

    for is_mask in (False, True):
        keys = f"{PAIR}alpha_mask = {str(is_mask).lower()}\n"
        data_plan = plan(tmp_path, keys, spec=spec)
        options = CachingOptions(cache_latents=True)
        cached = open_batches(data_plan, cache_latents(data_plan, encode, lambda: "vae", options, 1))
        for plain, stored in zip(batches_of(data_plan), batches_of(cached), strict=True):
            assert (plain.reference_pixels[0][:, 3] == 1).all() == is_mask
            noise = stored.latents_BCHW - encode(plain.pixels_BCHW, None)
            torch.testing.assert_close(stored.reference_latents[0] - encode(plain.reference_pixels[0], None), noise)


def test_text_encoders_that_see_references_do_not_see_partners(pairs: Path) -> None:
    data_plan = plan(pairs)
    assert not data_plan.has_references
    seen = data_plan.with_fixed_captions(1).with_seen_references()
    assert [list(row) for row in seen.caption_texts()] == [["a tag 0"], ["a tag 1"]]


def test_a_cache_entry_with_a_reference_image_is_not_used_for_a_pair(
    pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference of an edit model is encoded without noise."""
    calls: list[int] = []

    def cache(data_plan: DataPlan) -> int:
        calls.clear()
        options = CachingOptions(cache_latents=True, cache_latents_to_disk=True)
        cache_latents(data_plan, averaging_vae(calls), lambda: "vae", options, 1)
        return sum(calls)

    edit = write_config(pairs / "edit.toml", f"{HEAD}{SUBSET}control_dirs = '{{here}}/bad'\n")
    spec = replace(builders.SPEC, max_references=1)
    assert cache(plan_of(edit, spec=spec)) == 4
    with caplog.at_level(logging.INFO):
        assert cache(plan(pairs)) == 4
    assert "2 stale (2 made with a reference image where the partner of a pair is needed" in caplog.text
    assert cache(plan(pairs)) == 0
    assert cache(plan_of(write_config(pairs / "plain.toml", f"{HEAD}{SUBSET}"))) == 0, "the image is the same"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"opposite_dir .*bad: 1 of 2 images do not have exactly one partner of their name there: .*p1.png"),
        ("twice", r"1 of 2 images do not have exactly one partner of their name there: .*p1.png"),
        ("equal", r"opposite_dir .*bad: 1 image equal to the partner, which teaches nothing: .*p0.png"),
        ("folder", r"opposite_dir .*bad is not a folder"),
        ("damaged", r"1 partner cannot be read: .*p0.png is not an image"),
    ],
)
def test_images_without_exactly_one_valid_partner_are_refused_by_name(pairs: Path, change: str, message: str) -> None:
    if change == "missing":
        (pairs / "bad" / "p1.webp").unlink()
    elif change == "twice":
        write_image(pairs / "bad" / "p1.png")
    elif change == "equal":
        (pairs / "bad" / "p0.png").write_bytes((pairs / "good" / "p0.png").read_bytes())
    elif change == "folder":
        (pairs / "bad").rename(pairs / "worse")
    else:
        (pairs / "bad" / "p0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=message):
        plan(pairs)


@pytest.mark.parametrize("keys", ["control_dirs = '{here}/bad'", "control_resolution = 64", "is_reg = true"])
def test_keys_that_do_not_work_with_pairs_are_refused(pairs: Path, keys: str) -> None:
    with pytest.raises(UserError, match=rf"{keys.split()[0]} does not work with opposite_dir"):
        plan(pairs, PAIR + keys)


def test_output_preservation_does_not_work_with_pairs(pairs: Path) -> None:
    with pytest.raises(UserError, match=r"diff_output_preservation trains toward the base model's own predictions"):
        plan(pairs, PAIR + "custom_attributes = {diff_output_preservation = true}")


def test_pairs_require_preference_loss_and_vice_versa(pairs: Path) -> None:
    with pytest.raises(UserError, match=r"has opposite_dir, whose pairs are trained with --preference_loss dpo or"):
        plan(pairs, trains="")
    with pytest.raises(
        UserError, match=r"good has no pairs, which --preference_loss and --pair_slider train: set oppo"
    ):
        plan(pairs, "")
    write_folder(pairs / "other", 1)
    more = "\n[[datasets.subsets]]\nimage_dir = '{here}/other'\n"
    with pytest.raises(UserError, match=r"other has no pairs"):
        plan(pairs, more=more)
    data_plan = plan(pairs, more=f"{more}is_forgetting_probe = true\n")
    assert validation_of(data_plan).of_probe(True).num_images == 1, "a probe is measured as it is"


def test_metadata_files_are_paired_by_folder_and_not_by_control_path(pairs: Path) -> None:
    table = {f"{pairs.as_posix()}/good/p{i}.png": {"caption": "x"} for i in range(2)}
    (pairs / "meta.json").write_text(json.dumps(table))
    head = HEAD.replace("caption_extension = '.txt'\n", "")
    data_plan = plan(pairs, f"metadata_file = '{{here}}/meta.json'\n{PAIR}", head)
    assert all(len(sample.image.references) == 1 for sample in data_plan.samples)
    for entry in table.values():
        entry["control_path"] = f"{pairs.as_posix()}/bad/p0.png"
    (pairs / "meta.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"with control_path, and the subset has opposite_dir; keep one of them"):
        plan(pairs, f"metadata_file = '{{here}}/meta.json'\n{PAIR}", head)

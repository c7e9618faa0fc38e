"""Reference images that text encoders see: the texts to encode and the images of each."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.base.errors import UserError
from library.base.randomness import random_for
from library.data.caching.captions import Encoders, TextEncoding, cache_texts, check_row
from library.data.caching.latents import cache_latents
from library.data.decoding.images import DamagedImage, Pixels, change_colour, read_pixels, resize, with_alpha
from library.data.plan import reference_digests
from library.data.plan.data_plan import DataPlan
from library.data.plan.dataset_digest import whole_digest
from library.data.plan.seen_references import digest_packed
from library.data.scanned.images import ImageLocation, ScannedImage
from library.data.sources.storage.storage import Storage
from library.data.training_data import open_batches
from library.options.caching import CachingOptions, TextCachingOptions
from library.protocols import TextCacheSpec
from library.types import CaptionWithImages, Conditioning, plain_caption
from tests.unit.data import builders
from tests.unit.data.builders import averaging_vae, batches_of, plan_of, write_config, write_folder
from tests.unit.data.test_text_cache import DISK, KEYS, MEMORY, Tokenizer, pipeline

SPEC = replace(builders.SPEC, max_references=2, has_alpha=True)


def plan(folder: Path, keys: str = "", spec: object = SPEC) -> DataPlan:
    if not (folder / "after").exists():
        write_folder(folder / "after", 2)
        write_folder(folder / "before", 2, (64, 64))
    text = (
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/after'\nclass_tokens = 'cat'\n"
        f"control_dirs = ['{{here}}/before']\n{keys}\n"
    )
    data_plan = plan_of(write_config(folder / "data.toml", text), spec=spec)
    return data_plan.with_fixed_captions(1).with_seen_references()


def texts(data_plan: DataPlan) -> list[list[str]]:
    return [list(row) for row in data_plan.caption_texts()]


def images_of(caption: str) -> Sequence[torch.Tensor]:
    assert isinstance(caption, CaptionWithImages)
    return caption.read()


def test_a_caption_is_encoded_once_per_set_of_references(tmp_path: Path) -> None:
    first, second = texts(plan(tmp_path))
    assert [len(row) for row in (first, second)] == [1, 1]
    assert plain_caption(first[0]) == plain_caption(second[0]) == "cat" and first[0] != second[0]
    (image,) = images_of(first[0])
    rgb, _ = read_pixels(str(sorted((tmp_path / "before").glob("*.png"))[0]))
    assert torch.equal(((image + 1) * 127.5).round().permute(1, 2, 0), torch.from_numpy(with_alpha(rgb, None)).float())


def test_mirrored_references_and_dropped_captions_are_separate_texts(tmp_path: Path) -> None:
    (row, _) = texts(plan(tmp_path, "flip_aug = true\ncaption_dropout_rate = 0.1"))
    assert [plain_caption(text) for text in row] == ["cat", "", "cat", ""] and len(set(row)) == 4
    plain, mirrored = (images_of(row[place])[0] for place in (0, 2))
    assert torch.equal(plain.flip(-1), mirrored) and not torch.equal(plain, mirrored)


@pytest.mark.parametrize("is_flipped", [False, True])
def test_batches_look_up_features_by_the_encoded_texts(tmp_path: Path, is_flipped: bool) -> None:
    data_plan = plan(tmp_path, "flip_aug = true\ncaption_dropout_rate = 0.1")
    assert data_plan.seen is not None
    for number, row in enumerate(texts(data_plan)):
        keys = [data_plan.seen.key(number, caption, is_flipped) for caption in ("cat", "")]
        assert keys == row[2:] if is_flipped else keys == row[:2]


def test_a_caption_keeps_null_characters() -> None:
    """The digest follows one, but so may text of the caption."""
    assert plain_caption("cat\0dog") == plain_caption(CaptionWithImages("cat\0dog", "4b8e", lambda: ())) == "cat\0dog"


def test_messages_show_the_caption_without_the_digest() -> None:
    caption = CaptionWithImages("cat", "4b8e", lambda: ())
    for text in (caption, str(caption)):
        with pytest.raises(UserError, match=r"give NaN .* for the caption 'cat'; use"):
            check_row(text, {"hidden_state": torch.tensor([float("nan")])})


def test_texts_of_images_that_are_measured_mirrored_have_mirrored_references(tmp_path: Path) -> None:
    for are_mirrored in (False, True):
        limited, numbers = plan(tmp_path).limited_to_measured(2, [], are_mirrored)
        assert limited.seen is not None
        for number in numbers:
            is_encoded = limited.seen.key(number, "cat", True) in texts(limited)[number]
            assert is_encoded == are_mirrored


def test_a_text_changes_with_the_content_and_the_crop_of_a_reference(tmp_path: Path) -> None:
    before = texts(plan(tmp_path))
    path = sorted((tmp_path / "before").glob("*.png"))[1]
    pixels, _ = read_pixels(str(path))
    Image.fromarray(pixels[::-1].copy()).save(path)
    after = texts(plan(tmp_path))
    assert before[0] == after[0] and before[1] != after[1]
    assert all(a != b for a, b in zip(after, texts(plan(tmp_path, "control_resolution = 128")), strict=True))


def change_one_byte(path: Path, start: int = 0) -> None:
    """Change a byte between the parts that short digests of an uncompressed image read."""
    content = bytearray(path.read_bytes())
    content[start + 250_000] ^= 255
    path.write_bytes(bytes(content))


def test_a_text_changes_with_the_middle_of_an_uncompressed_reference(tmp_path: Path) -> None:
    plan(tmp_path)
    path = sorted((tmp_path / "before").glob("*.png"))[1]
    bitmap = path.with_suffix(".bmp")
    Image.fromarray(np.zeros((512, 512, 3), dtype=np.uint8)).save(bitmap)
    path.unlink()
    before = texts(plan(tmp_path))
    change_one_byte(bitmap)
    after = texts(plan(tmp_path))
    assert before[0] == after[0] and before[1] != after[1]


def test_a_reference_in_a_larger_file_is_known_by_its_whole_content_too(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(bytes(600_000))
    location = ImageLocation(str(path), "a.bmp", 512, 500_000, "digest of its ends")
    reference = ScannedImage("shard.tar/a.bmp", "", (64, 64), location=location)
    before = digest_packed(reference, Storage())
    change_one_byte(path, 512)
    assert digest_packed(reference, Storage()) != before


def test_only_new_and_edited_references_are_read_at_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(tmp_path)
    files = sorted((tmp_path / "before").glob("*.png"))
    for path in files:
        os.utime(path, ns=(1, 10**9))
    before = texts(plan(tmp_path))
    read: list[str] = []

    def digest(path: str) -> str:
        read.append(path)
        return whole_digest(path)

    monkeypatch.setattr(reference_digests, "whole_digest", digest)
    assert texts(plan(tmp_path)) == before and not read
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(files[1], ns=(1, 10**9))  # the same size and time; on Windows nothing else could tell
    if os.name != "nt":
        assert texts(plan(tmp_path))[1] != before[1] and read == [str(files[1])]
    (tmp_path / "before" / reference_digests.FILE_NAME).write_bytes(b"damaged")
    files[1].write_bytes(content)
    assert texts(plan(tmp_path)) == before


@pytest.mark.parametrize("form", ["BMP", "PNG"])
def test_an_uncompressed_reference_is_read_at_each_start_where_no_time_tells_of_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    builders.hide_change_times(monkeypatch)
    plan(tmp_path)
    path, seen = sorted((tmp_path / "before").glob("*.png"))[1], []
    for value in (10, 10, 20):
        Image.fromarray(np.full((64, 64, 3), value, dtype=np.uint8)).save(path, form)
        path.write_bytes(path.read_bytes().ljust(1 << 15, b"\0"))
        os.utime(path, (1e9, 1e9))
        seen.append(texts(plan(tmp_path))[1])
    assert seen[0] == seen[1]
    # Compressed files hardly ever have one size, which these are padded to.
    assert (seen[1] != seen[2]) is (form == "BMP")


def encoding_of(options: TextCachingOptions, calls: list[list[str]]) -> TextEncoding:
    """Return the encoding of texts by encoders that read the images of captions."""

    def encode(captions: Sequence[str]) -> Conditioning:
        for caption in captions:
            if isinstance(caption, CaptionWithImages):
                caption.read()
        return pipeline(calls)(captions)

    spec = TextCacheSpec(options, "_te.npz", KEYS, lambda: "encoders", "", (Tokenizer("a cat"),))
    return TextEncoding(spec, lambda: Encoders(encode, encode), "bf16")


@pytest.mark.parametrize("options", [MEMORY, DISK], ids=["memory", "disk"])
def test_an_image_with_a_damaged_reference_is_skipped_by_both_caches(
    tmp_path: Path, options: TextCachingOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """Test a batch of two captions of which one cannot be encoded, with and without cached latents."""
    plan(tmp_path)
    path = sorted((tmp_path / "before").glob("*.png"))[1]
    path.write_bytes(path.read_bytes()[:600])
    data_plan, calls = plan(tmp_path), []  # type: ignore[var-annotated]
    cached = cache_texts(data_plan, encoding_of(replace(options, text_encoder_batch_size=4), calls), (), False)
    assert [plain_caption(text) for call in calls for text in call].count("cat") == 1
    assert caplog.text.count(f"captions of images with a damaged reference are not encoded: {path}") == 1
    for batch in (*batches_of(data_plan), *batches_of(open_batches(data_plan, texts=cached.store))):
        assert [Path(key).stem for key in batch.keys] == ["p0"]
    latents = CachingOptions(cache_latents=True)
    store = cache_latents(data_plan, lambda pixels, _: pixels[:, :, ::8, ::8], lambda: "vae", latents, 1)
    assert store.damaged == {1}
    damaged = CaptionWithImages("a prompt", "", lambda: (torch.from_numpy(read_pixels(str(path))[0]),))
    with pytest.raises(DamagedImage, match=re.escape(str(path))):
        cache_texts(data_plan, encoding_of(options, calls), [damaged], False)


def test_latents_are_made_again_where_the_text_encoder_sees_another_reference(tmp_path: Path) -> None:
    """Of equal size and time, in a compressed format."""
    plan(tmp_path)
    path = sorted((tmp_path / "before").glob("*.png"))[1]
    contents = []
    for value in (10, 20):
        Image.fromarray(np.full((64, 64, 3), value, dtype=np.uint8)).save(path)
        contents.append(path.read_bytes())
    size = max(map(len, contents))
    counts = []
    for content in (contents[0], contents[0], contents[1], contents[1]):
        path.write_bytes(content.ljust(size, b"\0"))
        os.utime(path, (1e9, 1e9))
        calls: list[int] = []
        options = CachingOptions(cache_latents=True, cache_latents_to_disk=True)
        spec = replace(SPEC, channels=5)  # RGBA and the mean of red
        cache_latents(plan(tmp_path, spec=spec), averaging_vae(calls), lambda: "vae", options, 1)
        counts.append(sum(calls))
    assert counts == [4, 0, 2, 0]


@pytest.mark.parametrize("name", ["color_aug", "random_crop"])
def test_references_that_change_in_every_draw_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"after.*: {name} changes reference images in every draw"):
        plan(tmp_path, f"{name} = true")


def make_rgba(seed: int) -> Pixels:
    """Return noise whose left half is transparent."""
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    pixels[:, :32, 3] = 0
    return pixels


@pytest.mark.parametrize("name", ["area", "lanczos", "bicubic", "bilinear", "box", None])
def test_colors_under_transparent_pixels_do_not_reach_their_neighbors(name: str | None) -> None:
    first = make_rgba(1)
    second = first.copy()
    second[:, :32, :3] = 255 - second[:, :32, :3]
    small, other = (resize(pixels, (20, 20), name) for pixels in (first, second))
    is_seen = small[..., 3] > 0
    assert is_seen.any() and (small[..., 3] == other[..., 3]).all()
    assert (small[is_seen] == other[is_seen]).all()


def test_changed_colors_leave_the_alpha_channel_alone() -> None:
    pixels, changed = make_rgba(2), []
    for draw in range(12):
        result = change_colour(pixels, random_for(0, "colour", draw))
        assert (result[..., 3] == pixels[..., 3]).all()
        changed.append((result != pixels).any())
    assert any(changed) and not all(changed)

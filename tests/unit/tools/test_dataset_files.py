"""Commands for dataset files: resizing images, collecting captions in a metadata file, and cleaning them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import clean_captions_and_tags, merge_captions_to_metadata, merge_dd_tags_to_metadata
from library.data.sources.folders.metadata_file import read_metadata
from tools import captions_to_metadata, clean_metadata, resize_images

# --- sizes ---


def write_image(path: Path, width: int, height: int, seed: int = 1) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def resized(*arguments: object) -> int:
    return resize_images.main([str(argument) for argument in arguments])


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: Image.open(path).size for path in folder.iterdir() if path.suffix in (".png", ".jpg")}


def test_each_size_is_an_area_at_the_aspect_ratio_of_the_image(tmp_path: Path) -> None:
    """In any order of the sizes; an image that is small enough is unchanged."""
    write_image(tmp_path / "in" / "wide.png", 200, 50)
    write_image(tmp_path / "in" / "small.png", 20, 30, seed=2)
    out = tmp_path / "out"
    assert resized(tmp_path / "in", out, "--max_resolution", "16x16, 64x64", "--save_as_png") == 0
    assert sizes(out) == {
        "wide+16x16.png": (32, 8),
        "wide+64x64.png": (128, 32),
        "small+16x16.png": (13, 19),
        "small+64x64.png": (20, 30),
    }
    unchanged = np.asarray(Image.open(out / "small+64x64.png"))
    assert np.array_equal(unchanged, np.asarray(Image.open(tmp_path / "in" / "small.png")))


def test_shrinking_by_a_whole_factor_averages_pixels(tmp_path: Path) -> None:
    path = write_image(tmp_path / "in" / "a.png", 96, 64, seed=3)
    assert resized(tmp_path / "in", tmp_path / "out", "--max_resolution", "24x16", "--save_as_png") == 0
    pixels = np.asarray(Image.open(tmp_path / "out" / "a+24x16.png")).astype(float)
    means = np.asarray(Image.open(path)).astype(float).reshape(16, 4, 24, 4, 3).mean(axis=(1, 3))
    assert np.abs(pixels - means).max() <= 0.5 + 1e-9  # rounded to whole numbers


def test_sides_are_center_cropped_to_a_multiple_of_the_divisor(tmp_path: Path) -> None:
    path = write_image(tmp_path / "in" / "a.png", 37, 29, seed=4)
    words = ("--max_resolution", "512x512", "--divisible_by", 8, "--save_as_png")
    assert resized(tmp_path / "in", tmp_path / "out", *words) == 0
    pixels = np.asarray(Image.open(tmp_path / "out" / "a+512x512.png"))
    assert np.array_equal(pixels, np.asarray(Image.open(path))[2:26, 2:34])


def test_captions_are_copied_for_each_size_and_other_files_once(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "a.png", 40, 40)
    (tmp_path / "in" / "a.txt").write_text("a cat")
    (tmp_path / "in" / "notes.md").write_text("n")
    (tmp_path / "in" / "below").mkdir()
    (tmp_path / "in" / "a_0040x0040_sdxl.npz").write_text("a cache of the old image")
    words = ("--max_resolution", "32x32,16x16")
    assert resized(tmp_path / "in", tmp_path / "plain", *words) == 0
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"a+32x32.jpg", "a+16x16.jpg", "a.txt", "notes.md"}
    assert resized(tmp_path / "in", tmp_path / "all", *words, "--copy_associated_files") == 0
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        "a+32x32.jpg", "a+16x16.jpg", "a+32x32.txt", "a+16x16.txt", "notes.md"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_resolution", "512"], '--max_resolution is "512"; use sizes such as'),
        (["--divisible_by", "0"], "--divisible_by is 0"),
        (["--divisible_by", "64"], "has less than --divisible_by 64 pixels on a side"),
    ],
)
def test_impossible_sizes_are_refused(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "in" / "a.png", 40, 40)
    assert resized(tmp_path / "in", tmp_path / "out", *words) == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "from").mkdir()
    assert resized(tmp_path / "from", tmp_path / "to") == 1
    assert f"{tmp_path / 'from'} has no images" in capsys.readouterr().err and not (tmp_path / "to").exists()


def test_unusable_image_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "in" / "a.png", 40, 40)
    assert resized(tmp_path / "in", tmp_path / "in") == 1
    assert "is the folder of the images themselves" in capsys.readouterr().err
    write_image(tmp_path / "in" / "a.jpg", 40, 40)
    assert resized(tmp_path / "in", tmp_path / "out") == 1
    assert "differ only in their extension" in capsys.readouterr().err
    assert resized(tmp_path / "none", tmp_path / "out") == 1
    assert "is not a folder" in capsys.readouterr().err


# --- metadata files ---


def write_captioned_images(folder: Path) -> Path:
    for number, text in enumerate(("a café", "", "three\nlines"), 1):
        write_image(folder / f"{number}.png", 8, 8, seed=number)
        (folder / f"{number}.caption").write_text(f"{text}\n", encoding="utf-8")
        (folder / f"{number}.txt").write_text(f"tag{number}, b", encoding="utf-8")
    return folder


def test_captions_and_tags_are_merged_into_one_file_that_training_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = write_captioned_images(tmp_path / "pictures"), tmp_path / "m.json"
    (folder / "2.txt").unlink()
    out.write_text('{"elsewhere": {"caption": "kept", "train_resolution": [64, 64]}, "1": {"caption": "old"}}')
    assert merge_captions_to_metadata.main([str(folder), str(out), "--in_json", str(out)]) == 0
    assert merge_dd_tags_to_metadata.main([str(folder), str(out)]) == 0
    assert "1 of 3 images have no .txt file and get no tags" in caplog.text
    assert json.loads(out.read_text(encoding="utf-8")) == {
        "elsewhere": {"caption": "kept", "train_resolution": [64, 64]},
        "1": {"caption": "a café", "tags": "tag1, b"},
        "2": {"caption": ""},
        "3": {"caption": "three\nlines", "tags": "tag3, b"},
    }
    assert dict(read_metadata(str(out)))["1"].tags == "tag1, b"


def test_files_in_subfolders_are_keyed_by_their_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_captioned_images(tmp_path / "pictures" / name)
    words = [str(tmp_path / "pictures"), str(tmp_path / "m.json"), "--caption_extention", ".txt"]
    assert captions_to_metadata.main(words) == 1
    assert "has no images; --recursive with --full_path" in capsys.readouterr().err
    assert captions_to_metadata.main([*words, "--recursive"]) == 1
    assert "--recursive requires --full_path" in capsys.readouterr().err
    assert captions_to_metadata.main([*words, "--recursive", "--full_path"]) == 0
    table = json.loads((tmp_path / "m.json").read_text())
    assert table == {
        str(tmp_path / "pictures" / name / f"{n}.png"): {"caption": f"tag{n}, b"} for name in "ab" for n in (1, 2, 3)
    }


def test_captions_that_cannot_be_collected_are_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_captioned_images(tmp_path / "pictures")
    words = [str(folder), str(tmp_path / "m.json")]
    assert captions_to_metadata.main([*words, "--caption_extension", ".cap"]) == 1
    assert "none of the 3 images has a .cap file" in capsys.readouterr().err
    (folder / "2.caption").write_bytes("caf\u00e9".encode("latin-1"))
    assert captions_to_metadata.main(words) == 1
    assert "2.caption is not UTF-8 text" in capsys.readouterr().err
    write_image(folder / "1.jpg", 8, 8)
    assert captions_to_metadata.main(words) == 1
    assert "have the same key, 1; use --full_path" in capsys.readouterr().err
    (tmp_path / "m.json").write_text('{"2": {}, "1": "text"}')
    assert captions_to_metadata.main(words) == 1
    assert "but must be a table" in capsys.readouterr().err


# --- cleaning ---


@pytest.mark.parametrize(
    ("tags", "cleaned"),
    [
        ("long_hair, ^_^, open_mouth", "long hair, ^_^, open mouth"),
        ("1girl, smile, rating:safe, rating:x", "1girl, smile"),
        ("shirt, white shirt, hat, shirt", "white shirt, hat"),
        ("hair ornament, red hair ornament", "red hair ornament"),
        ("1girl, blonde hair, red hair, blue eyes, green eyes", "1girl, blonde hair, red hair, blue eyes, green eyes"),
        ("2girls, blonde hair, red hair, blue eyes, long hair", "2girls, blue eyes, long hair"),
        ("2girls, blonde hair, long hair, short hair, ponytail, braid", "2girls, blonde hair"),
        ("1girl, 2boys, blue eyes, red eyes, sleeveless, long sleeves", "1girl, 2boys"),
        ("", ""),
        ("c++, (a", "c++, (a"),
    ],
)
def test_tags_are_cleaned(tags: str, cleaned: str) -> None:
    assert clean_metadata.clean_tags(tags) == cleaned


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("an anime lady and a young woman", "a girl and a girl"),
        ("two cartoon characters, people behind", "two girls, girls behind"),
        ("an anime cartoon image of a person", "an image of a girl"),
        ("a cartoon anime drawing of anime anime women", "a drawing of girls"),
        ("a personal womanly image", "a personal womanly image"),
    ],
)
def test_captions_are_cleaned_word_by_word(caption: str, cleaned: str) -> None:
    assert clean_metadata.clean_caption(caption) == cleaned


def test_a_metadata_file_is_cleaned_with_the_arguments_of_sd_scripts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = {"a": {"tags": "b_c", "train_resolution": [8, 8]}, "d": {"caption": "a lady"}}
    (tmp_path / "in.json").write_text(json.dumps(table))
    paths = [str(tmp_path / "in.json"), str(tmp_path / "out.json")]
    assert clean_captions_and_tags.main(["pictures", *paths, "--debug"]) == 0
    assert "pictures has no effect" in caplog.text and "1 of 2 entries have no tags" in caplog.text
    expected = {"a": {"tags": "b c", "train_resolution": [8, 8]}, "d": {"caption": "a girl"}}
    assert json.loads((tmp_path / "out.json").read_text()) == expected


def test_json_lines_are_read_and_a_json_table_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (
        {"image_path": "a.png", "tags": "long_hair", "note": 1},
        {"image_path": "b.png", "caption": "a cartoon lady"},
    )
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.json")]
    assert clean_captions_and_tags.main(words) == 0
    table = json.loads((tmp_path / "out.json").read_text())
    assert table == {"a.png": {"tags": "long hair", "note": 1}, "b.png": {"caption": "a girl"}}
    assert clean_captions_and_tags.main([words[0], str(tmp_path / "out.jsonl")]) == 1
    assert "is a JSON object, not JSON lines" in capsys.readouterr().err

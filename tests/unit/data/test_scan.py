"""Scanning of folders and metadata files for images, with their names, exclusions and permissions."""

import builtins
import errno
import io
import json
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from library.base.errors import NoDataFound, UserError
from library.checkpoints import model_lookup, weights
from library.data.caching.captions import cache_texts
from library.data.caching.latents import cache_latents
from library.data.decoding.images import read_size
from library.data.description.dataset_file import load_dataset_config
from library.data.plan.collect import collect
from library.data.plan.data_plan import DataPlan, build_plan
from library.data.scanned.names import ignores_case, same_file_key
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.folders.metadata_file import read_metadata
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from library.options.config_file import read_toml
from library.options.output.prompts import read_prompts
from library.options.train import TrainOptions
from tests.running import make_images
from tests.unit.data.builders import SPEC, batches_of, options_of, plan_of, write_config, write_folder, write_image
from tests.unit.data.test_audit import audit_log
from tests.unit.data.test_seen_references import encoding_of
from tests.unit.data.test_text_cache import DISK


def scan(tmp_path: Path, subset: str, dataset: str = "", arguments: str = "") -> ScannedSubset:
    text = f"[[datasets]]\nresolution = 64\n{dataset}\n[[datasets.subsets]]\n{subset}\n"
    path = tmp_path / "data.toml"
    path.write_text(text.replace("{here}", tmp_path.as_posix()), encoding="utf-8")
    (scanned,) = collect(load_dataset_config(options_of(arguments, "--dataset_config", str(path))))
    return scanned.subsets[0]


FOLDER = 'image_dir = "{here}/pictures"\ncaption_extension = ".txt"\n'


def names(scanned: ScannedSubset) -> list[str]:
    return [os.path.basename(image.key) for image in scanned.images]


def test_images_of_a_folder_are_sorted_and_subfolders_not_searched(tmp_path):
    folder = tmp_path / "pictures"
    for name in ("b.png", "a.JPG", "C.webp", "d.bmp", "e.Png", "below/f.png"):
        write_image(folder / name)
    (folder / "notes.txt").write_text("x")
    assert names(scan(tmp_path, FOLDER)) == ["C.webp", "a.JPG", "b.png", "d.bmp"]


def test_file_names_may_have_spaces_brackets_and_non_ascii_letters(tmp_path):
    folder = tmp_path / "pictures"
    for name in ("a b.png", "[x] (1).png", "ねこ.png", "ünï{c}.png", "*?.png"):
        write_image(folder / name).with_suffix(".txt").write_text(f"caption of {name}", encoding="utf-8")
    scanned = scan(tmp_path, FOLDER)
    assert [image.caption for image in scanned.images] == [f"caption of {name}" for name in names(scanned)]
    assert len(scanned.images) == 5


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_symbolic_links_are_followed_and_loops_skipped(tmp_path):
    folder = write_folder(tmp_path / "pictures", 1)
    (folder / "link.png").symlink_to(folder / "p0.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "folder.png").symlink_to(folder)
    scanned = scan(tmp_path, FOLDER)
    assert names(scanned) == ["link.png", "p0.png"]
    assert sorted(os.path.basename(path) for path, _ in scanned.dropped) == ["gone.png", "loop.png"]


def test_captions_fall_back_to_class_tokens_and_then_to_empty(tmp_path):
    folder = tmp_path / "pictures"
    write_image(folder / "a.png").with_suffix(".txt").write_bytes(b"\xef\xbb\xbf  first line \r\nsecond\r\n")
    write_image(folder / "b.png")
    write_image(folder / "c.png").with_suffix(".txt").write_text("")
    scanned = scan(tmp_path, FOLDER + 'class_tokens = "cat"')
    assert [image.caption for image in scanned.images] == ["first line", "cat", ""]
    assert [os.path.basename(p) for p in scanned.without_caption] == ["b.png"]
    assert [os.path.basename(p) for p in scanned.empty_caption] == ["c.png"]
    assert scan(tmp_path, FOLDER).images[1].caption == ""


def test_with_wildcards_all_nonblank_lines_are_kept(tmp_path):
    write_image(tmp_path / "pictures/a.png").with_suffix(".txt").write_text(" one \n\n two\n")
    assert scan(tmp_path, FOLDER + "enable_wildcard = true").images[0].caption == "one\ntwo"


def test_multiline_captions_are_kept_whole_at_every_level(tmp_path):
    write_image(tmp_path / "pictures/a.png").with_suffix(".txt").write_text("a cat\n\non a sofa \n")
    write_image(tmp_path / "pictures/b.png").with_suffix(".txt").write_text("one line")
    option = "enable_multiline_caption = true\n"
    whole = ["a cat\n\non a sofa", "one line"]
    for scanned in (
        scan(tmp_path, FOLDER + option),
        scan(tmp_path, FOLDER, option),
        scan(tmp_path, FOLDER, f"[general]\n{option}"),
        scan(tmp_path, f"{FOLDER}{option}enable_wildcard = true"),
    ):
        assert [image.caption for image in scanned.images] == whole
    assert scan(tmp_path, FOLDER).images[0].caption == "a cat"


def test_face_crops_share_the_caption_of_their_image(tmp_path):
    folder = tmp_path / "pictures"
    write_image(folder / "me_10_20_30_40.png")
    write_image(folder / "you_10_20_30_40.png").with_suffix(".txt").write_text("own")
    (folder / "me.txt").write_text("shared")
    (folder / "you.txt").write_text("not this")
    assert [image.caption for image in scan(tmp_path, FOLDER).images] == ["shared", "own"]


def test_captions_in_another_encoding_are_refused_by_name(tmp_path):
    write_image(tmp_path / "pictures/a.png").with_suffix(".txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        scan(tmp_path, FOLDER)


def test_unreadable_images_are_skipped_with_the_reason(tmp_path):
    folder = write_folder(tmp_path / "pictures", 1)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("this is no image")
    (folder / "cut.png").write_bytes((folder / "p0.png").read_bytes()[:20])
    scanned = scan(tmp_path, FOLDER)
    reasons = {os.path.basename(path): reason for path, reason in scanned.dropped}
    assert names(scanned) == ["p0.png"] and reasons.keys() == {"empty.png", "text.png", "cut.png"}
    assert reasons["empty.png"] == "is empty" and "not an image" in reasons["text.png"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_refer_to_the_upright_image(tmp_path, orientation):
    image = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.webp", "a.png"):
        image.save(tmp_path / name, exif=exif)
        assert read_size(str(tmp_path / name)) == ((30, 20) if orientation < 5 else (20, 30))


def test_an_image_with_damaged_exif_data_is_kept(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00" + struct.pack("<I", 9999))
    assert read_size(str(tmp_path / "a.jpg")) == (30, 20)


def test_a_folder_listed_twice_in_one_dataset_counts_once(tmp_path, caplog):
    write_folder(tmp_path / "pictures", 2)
    options = write_config(
        tmp_path / "data.toml",
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{FOLDER}[[datasets.subsets]]\n{FOLDER}num_repeats = 3\n",
    )
    assert plan_of(options).num_train_images == 2
    assert "is listed twice in one dataset" in caplog.text


def test_a_folder_listed_in_two_datasets_counts_twice(tmp_path):
    write_folder(tmp_path / "pictures", 2)
    dataset = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{FOLDER}"
    assert plan_of(write_config(tmp_path / "data.toml", dataset + dataset + "num_repeats = 3\n")).num_train_images == 8


def test_an_empty_subset_is_an_error_and_an_empty_dataset_raises_no_data_found(tmp_path):
    write_folder(tmp_path / "pictures", 1)
    (tmp_path / "nothing").mkdir()
    empty = '[[datasets.subsets]]\nimage_dir = "{here}/nothing"\n'
    text = "[[datasets]]\nresolution = 64\n"
    with pytest.raises(ValueError, match=r"there are no images in .*nothing"):
        plan_of(write_config(tmp_path / "data.toml", f"{text}[[datasets.subsets]]\n{FOLDER}{empty}"))
    for only in (
        text + empty,
        text + empty.replace("nothing", "missing"),
        "[[datasets]]\nresolution = 64\nsubsets = []\n",
    ):
        with pytest.raises(NoDataFound):
            plan_of(write_config(tmp_path / "data.toml", only))


# Metadata files

METADATA = 'image_dir = "{here}/pictures"\nmetadata_file = "{here}/meta.json"\n'


def write_metadata(tmp_path: Path, table: object) -> None:
    (tmp_path / "meta.json").write_text(json.dumps(table), encoding="utf-8")


def test_metadata_keys_are_paths_with_or_without_extension(tmp_path):
    folder = write_folder(tmp_path / "pictures", 3, size=(48, 32), caption=None)
    keys = [str(folder / "p0.png"), "p1.png", "p2"]
    write_metadata(tmp_path, {key: {"caption": f"c{i}", "image_size": [9, 9]} for i, key in enumerate(keys)})
    scanned = scan(tmp_path, METADATA)
    assert [(os.path.basename(p.key), p.caption, p.size) for p in scanned.images] == [
        (f"p{i}.png", f"c{i}", (48, 32)) for i in range(3)
    ]


def test_a_stem_does_not_match_the_beginning_of_another_name(tmp_path):
    write_image(tmp_path / "pictures/cat10.png")
    write_metadata(tmp_path, {"cat1": {"caption": "x"}, "cat10": {"caption": "y"}})
    scanned = scan(tmp_path, METADATA)
    assert names(scanned) == ["cat10.png"] and [path for path, _ in scanned.dropped] == ["cat1"]


@pytest.mark.parametrize(
    ("entry", "plain", "wildcard", "multiline"),
    [
        ({"caption": "a b", "tags": "x, y"}, "a b,x, y", "a b,x, y", "a b,x, y"),
        ({"caption": "a\n\nb", "tags": "x\ny"}, "a,x,y", "a,x,y\nb,x,y", "a\nb,x,y"),
        ({"tags": "x, y"}, "x, y", "x, y", "x, y"),
        ({"caption": "a"}, "a", "a", "a"),
        ({}, "", "", ""),
    ],
)
def test_caption_and_tags_are_combined(tmp_path, entry, plain, wildcard, multiline):
    write_image(tmp_path / "pictures/p.png")
    write_metadata(tmp_path, {"p": entry})
    assert scan(tmp_path, METADATA).images[0].caption == plain
    assert scan(tmp_path, METADATA + "enable_wildcard = true").images[0].caption == wildcard
    assert scan(tmp_path, METADATA + "enable_multiline_caption = true").images[0].caption == multiline


def test_json_lines_files_are_read(tmp_path):
    folder = write_folder(tmp_path / "pictures", 2, caption=None)
    lines = [
        {"image_path": str(folder / "p0.png"), "caption": "x"},
        {"image_path": "p1.png", "caption": "y", "tags": "z"},
    ]
    (tmp_path / "meta.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    scanned = scan(tmp_path, METADATA.replace(".json", ".jsonl"))
    assert [image.caption for image in scanned.images] == ["x", "y,z"]


def test_metadata_keys_can_be_relative_to_the_working_folder(tmp_path, monkeypatch):
    write_image(tmp_path / "pictures" / "mine" / "a.png", (64, 64))
    (tmp_path / "meta.json").write_text(json.dumps({"pictures/mine/a.png": {"caption": "a cat"}}))
    monkeypatch.chdir(tmp_path)
    (image,) = scan(tmp_path, METADATA).images
    assert (image.key, image.caption) == ("pictures/mine/a.png", "a cat")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("meta.json", "{", "meta.json is not valid JSON: .*line 1"),
        ("meta.json", "[" * 100_000, "meta.json is not valid JSON: it is nested too deeply"),
        ("meta.json", '{"p": {"caption": "\\ud800"}}', "is not valid JSON: it contains half of a surrogate pair"),
        ("meta.jsonl", '{"image_path": "p", "caption": "\\udc00"}', "line 1.*half of a surrogate pair"),
        ("meta.json", "[]", "but must be a table"),
        ("meta.json", '{"p": 3}', "meta.json: p is 3, but must be a table"),
        ("meta.json", '{"p": {"tags": ["x"]}}', "p: tags is"),
        ("meta.jsonl", '{"caption": "x"}', "line 1: image_path is missing"),
    ],
)
def test_invalid_metadata_files_raise_errors_that_name_the_mistake(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        scan(tmp_path, METADATA.replace("meta.json", name))


def test_a_missing_metadata_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"meta\.json, but there is no such file"):
        scan(tmp_path, METADATA)


# Masks

MASKED = FOLDER + 'conditioning_data_dir = "{here}/masks"\n'


def test_masks_are_matched_by_stem(tmp_path):
    write_folder(tmp_path / "pictures", 2)
    for i in range(2):
        write_image(tmp_path / f"masks/p{i}.jpg")
    scanned = scan(tmp_path, MASKED, arguments="--masked_loss")
    assert [os.path.basename(image.mask_path or "") for image in scanned.images] == ["p0.jpg", "p1.jpg"]


def test_images_with_masks_have_class_tokens(tmp_path):
    write_folder(tmp_path / "pictures", 1, caption=None)
    write_image(tmp_path / "masks/p0.png")
    scanned = scan(tmp_path, MASKED + 'class_tokens = "a cat"\n', arguments="--masked_loss")
    assert list(scanned.images.captions) == ["a cat"]


def test_hidden_files_are_left_out(tmp_path):
    """macOS writes ._p0.png and ._p0.txt, with other content, beside files on other file systems."""
    for folder in ("pictures", "masks"):
        write_folder(tmp_path / folder, 1)
        for name in ("._p0.png", "._p0.txt"):
            (tmp_path / folder / name).write_bytes(b"\x00\x05\x16\x07\xff")
    for text, arguments in ((FOLDER, ""), (MASKED, "--masked_loss")):
        scanned = scan(tmp_path, text, arguments=arguments)
        assert len(scanned.images) == 1 and not scanned.dropped and not scanned.alone


def test_missing_and_surplus_masks_are_refused_by_name(tmp_path):
    write_folder(tmp_path / "pictures", 2)
    write_image(tmp_path / "masks/p0.png")
    with pytest.raises(ValueError, match=r"1 image without a mask.*p1\.png"):
        scan(tmp_path, MASKED, arguments="--masked_loss")
    write_image(tmp_path / "masks/p1.png")
    write_image(tmp_path / "masks/other.png")
    with pytest.raises(ValueError, match=r"1 masks .* belong to no image.*other\.png"):
        scan(tmp_path, MASKED, arguments="--masked_loss")


# Names that differ only in case: two files on Linux, one on Windows and macOS.


@pytest.fixture
def ignoring_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a case-insensitive, case-preserving file system below tmp_path."""

    def find_actual_path(path: Any) -> Any:
        if not isinstance(path, str | os.PathLike) or not str(path).startswith(f"{tmp_path}{os.sep}"):
            return path
        folder, name = os.path.split(os.fspath(path))
        names = os.listdir(folder) if os.access(folder, os.R_OK) else []
        other = next((entry for entry in names if entry.casefold() == name.casefold()), name)
        return os.path.join(folder, name if name in names else other)

    def resolve_argument(function: Any, place: int = 0) -> Any:
        return lambda *args, **named: function(
            *args[:place], find_actual_path(args[place]), *args[place + 1 :], **named
        )

    for module, name in ((os, "stat"), (os, "open"), (builtins, "open"), (io, "open"), (os, "replace")):
        place = 1 if name == "replace" else 0
        monkeypatch.setattr(module, name, resolve_argument(getattr(module, name), place))


def test_a_case_sensitive_folder_is_recognised(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "Cat.png")
    assert not ignores_case(str(tmp_path / "a")) and not ignores_case(str(tmp_path / "missing"))
    assert same_file_key(f"{tmp_path}/a/Cat.png") == f"{tmp_path}/a/Cat.png"


def test_a_case_insensitive_folder_is_recognised(tmp_path: Path, ignoring_case: None) -> None:
    write_image(tmp_path / "a" / "Cat.png")
    assert ignores_case(str(tmp_path / "a"))
    assert same_file_key(f"{tmp_path}/a/Cat.png") == same_file_key(f"{tmp_path}/a/cAT.png") == f"{tmp_path}/a/cat.png"


def audit_renamed_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Return the audit log for p0.TXT and P1.txt next to p0.png and p1.png."""
    write_folder(tmp_path / "a", 3, caption="words")
    for old, new in (("p0.txt", "p0.TXT"), ("p1.txt", "P1.txt")):
        (tmp_path / "a" / old).rename(tmp_path / "a" / new)
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/a'\ncaption_extension = '.txt'\n"
    return audit_log(write_config(tmp_path / "data.toml", text), caplog)


def test_captions_in_another_case_are_reported_by_the_audit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = audit_renamed_captions(tmp_path, caplog)
    assert "1 of the missing captions exist as .TXT files" in log and "1 caption without an image: P1.txt" in log


def test_captions_in_another_case_are_read_on_a_case_insensitive_system(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ignoring_case: None
) -> None:
    assert "WARNING" not in audit_renamed_captions(tmp_path, caplog)


def test_images_whose_names_differ_in_case_do_not_share_a_cache(tmp_path: Path, ignoring_case: None) -> None:
    """Otherwise A.png and a.jpg would share a cache file, and both would use what the second wrote."""
    for name, seed in (("A.png", 1), ("a.jpg", 2)):
        write_image(tmp_path / "2_a" / name, seed=seed)
    (tmp_path / "2_a" / "a.txt").write_text("one, two, three, four, five, six")
    command = "--resolution 64 --caption_extension .txt --shuffle_caption"
    plan = plan_of(options_of(command, "--train_data_dir", str(tmp_path))).with_fixed_captions(3)
    encode = lambda pixels, _: torch.nn.functional.avg_pool2d(pixels, 8).repeat(1, 2, 1, 1)[:, :4]  # noqa: E731
    stores = []
    for to_disk in (False, True):
        latents = CachingOptions(cache_latents=True, cache_latents_to_disk=to_disk)
        store = cache_latents(plan, encode, lambda: "vae", latents, 1)
        texts = cache_texts(plan, encoding_of(DISK, []), (), False).store
        batches = [batch for epoch in (1, 2) for batch in batches_of(open_batches(plan, store, texts), epoch)]
        stores.append([(batch.keys, batch.latents_BCHW, batch.conditioning) for batch in batches])
    for in_memory, on_disk in zip(*stores, strict=True):
        assert in_memory[0] == on_disk[0] and torch.equal(in_memory[1], on_disk[1])
        assert all(torch.equal(in_memory[2][name], on_disk[2][name]) for name in in_memory[2])
    names = {path for path in os.listdir(tmp_path / "2_a") if path.endswith(".npz")}
    assert names == {"A_te.npz", ".empty_prompt_te.npz", "A_0064x0064_sd.npz"}


# exclude: images of a folder that a subset does not use.


def plan_excluding(folder: Path, keys: str, source: str = "") -> DataPlan:
    subset = source or f"image_dir = '{folder}'"
    (folder / "dataset.toml").write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{subset}\nclass_tokens = 'x'\n{keys}\n"
    )
    options = TrainOptions().with_values({"dataset_config": str(folder / "dataset.toml"), "max_train_steps": 1})
    return build_plan(options, SPEC, 0, lambda text: len(text), None, 1)


def test_excluded_images_are_neither_trained_nor_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path / "photos", 3)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        plan = plan_excluding(tmp_path / "photos", "exclude = ['01.png', 'broken.png', '09.png']")
        plan.audit(logging.getLogger())
    assert [Path(sample.image.key).name for sample in plan.samples] == ["00.png", "02.png"]
    assert plan.num_train_images == 2
    assert "exclude names what is no image in" in caplog.text and "09.png" in caplog.text
    assert "broken.png" not in caplog.text


def test_exclude_is_refused_for_other_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exclude"):
        plan_excluding(tmp_path, "exclude = ['01.png']", "shards = 'a.tar'")


# Errors for files without read permission name the option.
# The permission error is simulated, because root may read everything.

READERS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "config file": ("a.toml", lambda path: read_toml(path, "--config_file"), "--config_file"),
    "dataset": (
        "a.json",
        lambda path: load_dataset_config(options_of("--dataset_config", str(path))),
        "--dataset_config",
    ),
    "metadata": ("a.json", lambda path: list(read_metadata(str(path))), "metadata_file"),
    "prompts": ("a.txt", read_prompts, "--sample_prompts"),
    "base model": ("a.safetensors", lambda path: model_lookup.open_file("--vae", path), "--vae"),
}


@pytest.mark.parametrize("name", READERS)
def test_the_error_for_an_unreadable_file_names_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file, read, flag = READERS[name]
    path = tmp_path / file
    path.write_text("{}")

    def refuse(*_: object, **__: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(weights, "require_weight_file", refuse)
    monkeypatch.setattr("library.data.sources.folders.metadata_file.open", refuse, raising=False)
    with pytest.raises(UserError, match=rf"{flag} .*{file} cannot be read: Permission denied; change its permissions"):
        read(path)

"""Training from tar shards and Parquet files equals training from their source and resumes bit for bit."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import toml
import torch
from PIL import Image

from library.models.unet_loader import UnetLoader
from tests.hiding import hide
from tests.running import Finished, make_images
from tests.runs.test_resume import ALL_RANDOM, interrupt_and_resume, load_saved
from tests.tiny.bases import BASES
from tests.unit.data.builders import batches_of, content_of, options_of, plan_of, write_image
from tests.unit.data.object_store import BUCKET, SECRET, object_store
from tests.unit.data.shard_builders import shards_of, write_parquet
from tools import make_shards

Train = Callable[..., Finished]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """Return subsets of the same seven images: a folder, two shards, and a Parquet file."""
    folder = tmp_path / "pictures"
    make_images(folder, 7, seed=3)
    shards_of(folder, tmp_path / "shards", 2)
    files = sorted(path for path in folder.iterdir() if path.suffix != ".txt")
    columns: dict[str, list[object]] = {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "text": [file.with_suffix(".txt").read_text() for file in files],
    }
    write_parquet(tmp_path / "rows.parquet", columns)
    return {
        "folder": f'image_dir = "{folder.as_posix()}"',
        "shards": f'shards = "{(tmp_path / "shards").as_posix()}/*.tar"',
        "parquet": f'parquet = "{(tmp_path / "rows.parquet").as_posix()}"',
    }


def arguments_of(base_arguments: list[str], folder: Path, subset: str, *more: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    description = f"[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\n{subset}\nnum_repeats = 2\n"
    (folder / "data.toml").write_text(description, encoding="utf-8")
    arguments = list(base_arguments)
    place = arguments.index("--train_data_dir")
    del arguments[place : place + 2]
    return [*arguments, "--dataset_config", str(folder / "data.toml"), "--output_dir", str(folder), *more]


def have_equal_weights(one: Path, other: Path) -> bool:
    first, second = load_saved(one), load_saved(other)
    return first.keys() == second.keys() and all(bool((first[key] == second[key]).all()) for key in first)


@pytest.mark.parametrize("source", ["shards", pytest.param("parquet", marks=pytest.mark.nightly)])
def test_the_adapter_equals_that_of_the_folder(
    source: str, train: Train, base_arguments: list[str], sources: dict[str, str], tmp_path: Path
) -> None:
    options = ["--cache_latents_to_disk", "--validation_split", "0.3", "--shuffle_caption"]
    for name in ("folder", source):
        done = train(arguments_of(base_arguments, tmp_path / name, sources[name], *options)).ok()
        assert "2 of 7 images are held out" in done.stderr
    assert have_equal_weights(tmp_path / "folder", tmp_path / source)


@pytest.mark.nightly
def test_an_interrupted_run_resumes_bit_for_bit(
    train: Train, base_arguments: list[str], sources: dict[str, str], tmp_path: Path
) -> None:
    arguments = arguments_of(base_arguments, tmp_path / "run", sources["shards"], *ALL_RANDOM, "--max_train_steps", "5")
    interrupt_and_resume(train, arguments, tmp_path, cuts=[2])


@pytest.mark.nightly
def test_launched_run_reads_shards_in_workers(
    launch: Callable[..., Finished], train: Train, base_arguments: list[str], sources: dict[str, str], tmp_path: Path
) -> None:
    workers = ["--max_data_loader_n_workers", "2"]
    launch(arguments_of(base_arguments, tmp_path / "shards_run", sources["shards"], *workers)).ok()
    assert train(arguments_of(base_arguments, tmp_path / "folder_run", sources["folder"])).status == 0
    assert have_equal_weights(tmp_path / "shards_run", tmp_path / "folder_run")


@pytest.mark.nightly
def test_launched_run_survives_broken_responses_of_a_bucket(
    launch: Callable[..., Finished],
    train: Train,
    base_arguments: list[str],
    sources: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with object_store(monkeypatch) as store:
        store.fill(tmp_path / "shards", "cats/")
        store.cuts = 3
        options = ["--max_data_loader_n_workers", "2", "--cache_dir", str(tmp_path / "caches")]
        shards = f'shards = "s3://{BUCKET}/cats/*.tar"'
        done = launch(arguments_of(base_arguments, tmp_path / "bucket_run", shards, *options)).ok()
        assert store.cuts == 0
    assert train(arguments_of(base_arguments, tmp_path / "folder_run", sources["folder"])).status == 0
    assert have_equal_weights(tmp_path / "bucket_run", tmp_path / "folder_run")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not written and SECRET not in done.stderr + done.stdout


def test_credentials_in_urls_are_never_written_or_logged(
    train: Train, base_arguments: list[str], sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check metadata, state, report, events, charts, caches, and the logs of a resumed and a failed run."""
    with object_store(monkeypatch) as store:
        store.fill(tmp_path / "shards", "cats/")
        base = store.url.replace("http://", f"http://me:{SECRET}@")
        names = sorted(path.name for path in (tmp_path / "shards").glob("*.tar"))
        url = f"{base}/{BUCKET}/cats/{{{','.join(names)}}}?X-Amz-Signature={SECRET}"
        out = tmp_path / "run"
        command = [
            "--cache_dir", str(tmp_path / "caches"), "--cache_latents_to_disk", "--validation_split", "0.3",
            "--save_state", "--log_events", str(out / "events.jsonl"), "--log_with", "tensorboard", "--logging_dir",
            str(out / "logs"), "--save_every_n_steps", "2",
        ]  # fmt: skip
        words = arguments_of([w for w in base_arguments if w != "--no_report"], out, f'shards = "{url}"', *command)
        done = [train(words), train([*words, "--resume", str(out / "mine-step00000002-state")])]
        assert [finished.status for finished in done] == [0, 0], done[-1].stderr
        (tmp_path / "caches" / "read").rename(tmp_path / "gone")
        store.statuses = ["403 Forbidden"] * 500
        done.append(train([word for word in words if not word.startswith("--cache_latents")]))
        assert done[-1].status == 1 and "cannot be read" in done[-1].stderr
    assert not [finished for finished in done if SECRET in finished.stdout + finished.stderr]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != out / "data.toml"]
    assert len([path for path in files if path.parent == out]) >= 5
    assert not [path for path in files if SECRET.encode() in path.read_bytes() or SECRET in path.name]
    for index in (path for path in files if path.suffix == ".parquet" and path.name.startswith(".picture_index")):
        assert SECRET not in str(pyarrow.parquet.read_table(index).to_pydict())


# Shards of tools/make_shards.py train like their source and need neither VAE nor text encoders.

DESCRIPTION = """
[general]
caption_extension = ".txt"
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
bucket_reso_steps = 64

[[datasets]]
resolution = 64
batch_size = 2

  [[datasets.subsets]]
  image_dir = "{here}/cats"
  num_repeats = 2
  shuffle_caption = true
  class_tokens = "a thing"
  custom_attributes = {{ diff_output_preservation = true }}

  [[datasets.subsets]]
  image_dir = "{here}/other/cats"
  num_repeats = 0

  [[datasets.subsets]]
  metadata = 1

[[datasets]]
resolution = [128, 64]
batch_size = 1
skip_image_resolution = 64

  [[datasets.subsets]]
  image_dir = "{here}/cats"
  flip_aug = true
"""


@pytest.fixture
def write_dataset(tmp_path: Path) -> Path:
    """Write a dataset with unusual file names, missing captions and captions of several lines."""
    names = ["plain", "two.dots", "with space", "caf\xe9", "-dash x", "n" * 120, "last_1_2_3_4"]
    for i, name in enumerate(names):
        path = write_image(tmp_path / "cats" / f"{name}.{'PNG' if i == 2 else 'png'}", [(64, 64), (100, 70)][i % 2], i)
        if i != 1:
            path.with_suffix(".txt").write_text(f"tag {i}, other, third\nsecond {i}", encoding="utf-8")
    write_image(tmp_path / "other" / "cats" / "z.png", (64, 64), seed=90)
    text = DESCRIPTION.replace("  [[datasets.subsets]]\n  metadata = 1\n", "").format(here=tmp_path.as_posix())
    (tmp_path / "data.toml").write_text(text, encoding="utf-8")
    return tmp_path / "data.toml"


def contents(path: Path) -> list[object]:
    plan = plan_of(options_of("--dataset_config", str(path)))
    return [content_of(batch)[1:] for epoch in (1, 2) for batch in batches_of(plan, epoch)]


@pytest.mark.parametrize("shard_mb", ["1000", "0.03"])
def test_shards_train_like_their_source(shard_mb: str, write_dataset: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert make_shards.main(["--dataset_config", str(write_dataset), "--out", str(out), "--shard_mb", shard_mb]) == 0
    assert capsys.readouterr().out.strip() == str(out / "dataset.toml")
    assert contents(out / "dataset.toml") == contents(write_dataset)
    shards = sorted(out.glob("*.tar"))
    assert len(shards) == (1 if shard_mb == "1000" else 4) and shards[0].name == "cats-00000.tar"
    names: list[str] = []
    for path in shards:
        with tarfile.open(path) as archive:
            names += archive.getnames()
    stems = [name.partition(".")[0] for name in names if not name.endswith(".txt")]
    assert len(stems) == 7 == len(set(stems)) and {"plain", "with space", "last_1_2_3_4"} <= set(stems)
    assert len(list(out.glob(".picture_index-*.parquet"))) == 1  # both datasets read the same shards


def test_subsets_that_read_other_lines_of_captions_have_shards_of_their_own(tmp_path: Path) -> None:
    write_image(tmp_path / "cats" / "a.png", (64, 64)).with_suffix(".txt").write_text("first\nsecond")
    subset = f"[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'cats').as_posix()}'\n"
    text = f"[general]\ncaption_extension = '.txt'\nresolution = 64\n[[datasets]]\n{subset}{subset}"
    for rule in ("enable_multiline_caption", "enable_wildcard"):
        source, out = tmp_path / f"{rule}.toml", tmp_path / rule
        source.write_text(f"{text}{rule} = true\n")
        assert make_shards.main(["--dataset_config", str(source), "--out", str(out)]) == 0
        captions = [s.image.caption for s in plan_of(options_of("--dataset_config", str(out / "dataset.toml"))).samples]
        assert captions == ["first", "first\nsecond"]


def test_the_same_images_give_the_same_shards(write_dataset: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert make_shards.main(["--dataset_config", str(write_dataset), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "one" / "cats-00000.tar").read_bytes() == (tmp_path / "two" / "cats-00000.tar").read_bytes()


def shard_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((*out.glob("*.tar"), *out.glob(".*-shards.json")))}


def pack(out: Path, write_dataset: Path, *more: str) -> int:
    return make_shards.main(["--dataset_config", str(write_dataset), "--out", str(out), "--shard_mb", "0.03", *more])


@pytest.mark.parametrize("stop_at", [1, 4, 12])
def test_interrupted_packing_resumes_with_the_unfinished_shard(
    stop_at: int, write_dataset: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C while that member is written, all files on disk are complete."""
    assert pack(tmp_path / "whole", write_dataset) == 0
    out, add, calls, stops = tmp_path / "out", make_shards.add_member, list[str](), [stop_at]

    def counted(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        calls.append(name)
        if stops and len(calls) == stops[0]:
            raise KeyboardInterrupt
        add(archive, name, content)

    monkeypatch.setattr(make_shards, "add_member", counted)
    assert pack(out, write_dataset) == 130 and "stopped" in capsys.readouterr().err
    finished = shard_bytes(out)
    assert finished.items() <= {**shard_bytes(tmp_path / "whole"), **finished}.items()
    assert {name for name in finished if name.endswith(".tar")} <= shard_bytes(tmp_path / "whole").keys()
    assert not [path for path in out.glob(".*") if path.name != ".cats-shards.json"]
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / ".cats-00003.0123456789ab.tar").write_bytes(b"of one that was killed")
    calls.clear()
    stops.clear()
    assert pack(out, write_dataset) == 0
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(calls) < 13 if stamps else len(calls) == 13  # 7 images, 6 captions
    # The first line has a digest of the others.
    whole = (tmp_path / "whole" / "dataset.toml").read_text().splitlines()[1:]
    assert (out / "dataset.toml").read_text().splitlines()[1:] == [line.replace("/whole/", "/out/") for line in whole]
    assert not list(out.glob(".cats-00003.*"))


def test_only_changed_shards_are_repacked(write_dataset: Path, tmp_path: Path, capsys) -> None:
    """Refuse a shard that another program changed, and repack one that is missing, and one with a changed caption; with
    fewer images, delete the last shards."""
    out = tmp_path / "out"
    assert pack(out, write_dataset) == 0
    original = shard_bytes(out)
    names = sorted(name for name in original if name.endswith(".tar"))
    changed_shard = out / names[1]
    changed_shard.write_bytes(original[names[1]][:-1] + b"x")
    first = (out / names[0]).stat().st_mtime_ns
    for more in ((), ("--shard_mb", "1000")):
        assert pack(out, write_dataset, *more) == 1
        error = capsys.readouterr().err
        assert re.search(rf"{names[1]} exists and is a tar archive .*, unchanged: it would be lost", error)
    assert changed_shard.read_bytes() != original[names[1]]
    changed_shard.unlink()
    assert pack(out, write_dataset) == 0
    assert shard_bytes(out) == original and (out / names[0]).stat().st_mtime_ns == first
    with tarfile.open(out / names[2]) as archive:
        caption = next(name for name in archive.getnames() if name.endswith(".txt"))
    source = next(path for path in (tmp_path / "cats").glob("*.txt") if path.stem == Path(caption).stem)
    source.write_text("another one")
    assert pack(out, write_dataset) == 0
    assert pack(tmp_path / "anew", write_dataset) == 0
    changed = shard_bytes(out)
    assert changed == shard_bytes(tmp_path / "anew") and changed[names[1]] == original[names[1]]
    assert pack(out, write_dataset, "--shard_mb", "1000") == 0
    assert [path.name for path in out.glob("*.tar")] == ["cats-00000.tar"]


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_shards_and_parquet_files_can_be_repacked(kind: str, tmp_path: Path) -> None:
    """Rows of a Parquet file have neither names nor extensions."""
    make_images(tmp_path / "p", 4, seed=2)
    if kind == "shards":
        shards_of(tmp_path / "p", tmp_path / "made", 2)
        source = f'shards = "{(tmp_path / "made").as_posix()}/*.tar"'
    else:
        files = sorted(path for path in (tmp_path / "p").iterdir() if path.suffix != ".txt")
        texts = [file.with_suffix(".txt").read_text() for file in files]
        images: list[object] = [file.read_bytes() for file in files]
        write_parquet(tmp_path / "rows.parquet", {"img": images, "words": list(texts)})
        source = f'parquet = "{(tmp_path / "rows.parquet").as_posix()}"\ncaption_column = "words"'
    (tmp_path / "data.toml").write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{source}\n")
    assert make_shards.main(["--dataset_config", str(tmp_path / "data.toml"), "--out", str(tmp_path / "out")]) == 0
    assert len(contents(tmp_path / "out" / "dataset.toml")) == 8
    assert contents(tmp_path / "out" / "dataset.toml") == contents(tmp_path / "data.toml")


@pytest.mark.parametrize("image_format", ["JPEG", "MPO", "TIFF"])
def test_a_row_is_read_from_the_shard_or_refused(image_format: str, tmp_path: Path, capsys) -> None:
    """A row has no file name, so its format gives its extension. Phones write MPO, a JPEG with more pictures."""
    buffer, image = io.BytesIO(), Image.new("RGB", (64, 64), "red")
    image.save(buffer, image_format, **({"save_all": True, "append_images": [image]} if image_format == "MPO" else {}))
    write_parquet(tmp_path / "rows.parquet", {"image": [buffer.getvalue()], "text": ["a cat"]})
    source = f'parquet = "{(tmp_path / "rows.parquet").as_posix()}"'
    (tmp_path / "data.toml").write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{source}\n")
    status = make_shards.main(["--dataset_config", str(tmp_path / "data.toml"), "--out", str(tmp_path / "out")])
    if image_format == "TIFF":
        assert status == 1 and "in the format TIFF, which is not read from shards" in capsys.readouterr().err
    else:
        assert status == 0 and contents(tmp_path / "out" / "dataset.toml") == contents(tmp_path / "data.toml")


def test_a_caption_that_is_not_text_is_named(tmp_path: Path, capsys) -> None:
    write_image(tmp_path / "p" / "a.png", (64, 64))
    (tmp_path / "meta.json").write_text('{"a": {"caption": "half \\ud83d of it"}}')
    text = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{(tmp_path / "p").as_posix()}"\n'
    (tmp_path / "data.toml").write_text(f'{text}metadata_file = "{(tmp_path / "meta.json").as_posix()}"\n')
    assert make_shards.main(["--dataset_config", str(tmp_path / "data.toml"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "meta.json is not valid JSON: it contains half of a surrogate pair" in error and not list(
        (tmp_path / "out").glob("*.tar")
    )


def test_captions_of_a_metadata_file_are_kept(tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / "p" / f"p{i}.png", (64, 64), seed=i)
    entries = {f"p{i}": {"caption": f"said {i}", "tags": "x, y"} for i in range(3)}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    text = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{(tmp_path / "p").as_posix()}"\n'
    (tmp_path / "data.toml").write_text(f'{text}metadata_file = "{(tmp_path / "meta.json").as_posix()}"\n')
    assert make_shards.main(["--dataset_config", str(tmp_path / "data.toml"), "--out", str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out" / "dataset.toml") == contents(tmp_path / "data.toml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{out}"], "--dataset_config is missing"),
        (["--out", "{out}", "--dataset_config", "{data}", "--shard_mb", "0"], "--shard_mb is 0, but must be above 0"),
        (["--out", "{out}", "--dataset_config", "{data}", "--cache_latents_to_disk"], "requires --script"),
        (
            ["--out", "{out}", "--dataset_config", "{data}", "--script", "x.py"],
            "--script x.py is not a training script",
        ),
    ],
)
def test_missing_inputs_are_named(
    arguments: list[str], message: str, write_dataset: Path, tmp_path: Path, capsys
) -> None:
    command = [word.format(out=tmp_path / "out", data=write_dataset) for word in arguments]
    assert make_shards.main(command) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_package_of_the_index_is_asked_for_before_anything_is_written(
    write_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hide("pyarrow", monkeypatch)
    assert pack(tmp_path / "out", write_dataset) == 1
    assert "pip install pyarrow" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_masks_are_rejected_before_anything_is_written(write_dataset: Path, tmp_path: Path, capsys) -> None:
    text = write_dataset.read_text().replace(
        'image_dir = "', f'conditioning_data_dir = "{tmp_path / "cats"}"\nimage_dir = "'
    )
    write_dataset.write_text(text.replace('class_tokens = "a thing"\n', ""))
    arguments = ["--dataset_config", str(write_dataset), "--out", str(tmp_path / "out"), "--masked_loss"]
    assert make_shards.main(arguments) == 1
    assert "shards do not support mask files" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_opposite_images_are_rejected_before_anything_is_written(write_dataset: Path, tmp_path: Path, capsys) -> None:
    text = write_dataset.read_text().replace("diff_output_preservation", "anything")
    write_dataset.write_text(text.replace('image_dir = "', 'opposite_dir = "nowhere"\nimage_dir = "', 1))
    assert make_shards.main(["--dataset_config", str(write_dataset), "--out", str(tmp_path / "out")]) == 1
    assert "shards do not support opposite images" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_caches_next_to_the_shards_make_vae_and_text_encoders_unnecessary(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_process: None
) -> None:
    """The adapter equals that of a run on the folder that encodes everything itself."""
    make_images(tmp_path / "images", 5, seed=8)
    text = "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\ncaption_extension = '.txt'\n"
    (tmp_path / "data.toml").write_text(f'{text}image_dir = "{(tmp_path / "images").as_posix()}"\nflip_aug = true\n')
    common = [
        *BASES["sdxl"].build(tmp_path / "base"), "--network_train_unet_only", "--seed", "6", "--network_dim", "2",
        "--network_module", "networks.lora", "--learning_rate", "1e-3", "--max_train_steps", "3", "--no_report",
        "--max_data_loader_n_workers", "0", "--output_name", "mine",
    ]  # fmt: skip
    caches = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    out = tmp_path / "out"
    packing_arguments = [*common, "--dataset_config", str(tmp_path / "data.toml"), "--out", str(out), *caches]
    assert make_shards.main(["--script", "sdxl_train_network.py", *packing_arguments]) == 0
    plain = [*common, "--dataset_config", str(tmp_path / "data.toml"), "--output_dir", str(tmp_path / "plain")]
    train([*plain, "--cache_latents", "--cache_text_encoder_outputs"], script="sdxl_train_network").ok()

    for part in ("vae", "text_encoders"):
        meta = getattr(UnetLoader, part)

        def load(self: UnetLoader, part: str = part, meta: Callable[..., object] = meta) -> object:
            assert torch.get_default_device().type == "meta", f"{part} were loaded"  # without weights, to count
            return meta(self)

        monkeypatch.setattr(UnetLoader, part, load)
    cached = [*common, "--dataset_config", str(out / "dataset.toml"), "--output_dir", str(tmp_path / "cached"), *caches]
    train([*cached, "--skip_cache_check"], script="sdxl_train_network").ok()
    expected, other = load_saved(tmp_path / "plain"), load_saved(tmp_path / "cached")
    assert expected.keys() == other.keys() and all(bool((expected[key] == other[key]).all()) for key in expected)


def test_the_written_dataset_file_keeps_the_settings(write_dataset: Path, tmp_path: Path) -> None:
    assert make_shards.main(["--dataset_config", str(write_dataset), "--out", str(tmp_path / "out")]) == 0
    before, after = (toml.loads(path.read_text("utf-8")) for path in (write_dataset, tmp_path / "out" / "dataset.toml"))
    assert [len(dataset["subsets"]) for dataset in after["datasets"]] == [1, 1]  # the subset without repeats is dropped
    first, second = before["datasets"][0]["subsets"][0], after["datasets"][0]["subsets"][0]
    assert {name: value for name, value in first.items() if name != "image_dir"} == {
        name: value for name, value in second.items() if name != "shards"
    }

"""Training from tar shards and Parquet files equals training from a folder and resumes bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.running import Finished, make_images
from tests.runs.test_resume import ALL_RANDOM, interrupt_and_resume, load_saved
from tests.unit.data.object_store import BUCKET, SECRET, object_store
from tests.unit.data.shard_builders import shards_of, write_parquet

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
        done = train(arguments_of(base_arguments, tmp_path / name, sources[name], *options))
        assert done.status == 0, done.stderr
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
    done = launch(arguments_of(base_arguments, tmp_path / "shards_run", sources["shards"], *workers))
    assert done.status == 0, done.stderr
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
        done = launch(arguments_of(base_arguments, tmp_path / "bucket_run", shards, *options))
        assert done.status == 0, done.stderr
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

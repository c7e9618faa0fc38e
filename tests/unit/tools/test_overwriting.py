"""Commands and runs never overwrite one of their own inputs, nor a file of another type."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from library.base.errors import UserError
from library.checkpoints.saving import save_safetensors
from library.data.sources.folders.metadata_file import parse_entries
from library.data.sources.indexed.parquet_index import index_lock
from library.options.output.console import ConsoleOptions
from library.training.command_line.checks import check_output
from library.training.command_line.console import build_handlers
from library.training.reporting.event_stream import Events, open_event_file
from library.training.reporting.events import Removed, StageProgress
from library.training.saving.run_lock import lock_path, run_lock
from tests.unit.data.builders import options_of, write_image
from tools import captions_to_metadata, clean_metadata, compare_runs, make_shards, report

EVENT = json.dumps(StageProgress("loading", "begin").as_line(1.0), separators=(",", ":")) + "\n"
DATASET = """
[general]
caption_extension = ".txt"

[[datasets]]
resolution = 64

  [[datasets.subsets]]
  image_dir = "{here}/cats"
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Write mine/dataset.toml, a dataset file of a user."""
    write_image(tmp_path / "cats" / "a.png", (64, 64), 1)
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "dataset.toml"
    path.write_text(DATASET.format(here=tmp_path.as_posix()), encoding="utf-8")
    return path


def refusal_of(capsys: pytest.CaptureFixture[str], status: int) -> str:
    assert status == 1
    return capsys.readouterr().err


def test_packing_does_not_overwrite_the_dataset_file_it_reads(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dataset.read_bytes()
    status = make_shards.main(["--dataset_config", str(dataset), "--out", str(dataset.parent)])
    assert "dataset.toml is also read by this command and would be lost" in refusal_of(capsys, status)
    assert dataset.read_bytes() == before and [path.name for path in dataset.parent.iterdir()] == ["dataset.toml"]


def test_packing_does_not_overwrite_foreign_dataset_files_and_archives(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset_config", str(shutil.copy(dataset, tmp_path / "data.toml")), "--out", str(tmp_path / "mine")]
    assert "dataset.toml exists and is a text file, not a dataset file that tools/make_shards.py" in refusal_of(
        capsys, make_shards.main(words)
    )
    dataset.unlink()
    archive = tmp_path / "mine" / "cats-00007.tar"
    archive.write_bytes(b"another program's")
    assert "cats-00007.tar exists and is a text file, not a shard" in refusal_of(capsys, make_shards.main(words))
    assert archive.read_bytes() == b"another program's"
    archive.unlink()
    assert make_shards.main(words) == 0 == make_shards.main(words)  # its own earlier output is replaced


@pytest.mark.parametrize("content", ['{"general": {"a": 1}}', '{"cat.png": {"caption": "a cat"}}', "a caption"])
def test_an_event_file_replaces_event_files_only(tmp_path: Path, content: str) -> None:
    path = tmp_path / "events.jsonl"
    for goes_on in (False, True):
        path.write_text(content)
        with pytest.raises(UserError, match="not an event log: it would be lost"):
            open_event_file(path, goes_on)
        assert path.read_text() == content
    path.write_text(EVENT)
    events = Events([open_event_file(path, False)])
    events.emit(Removed("b"))
    events.close()
    assert len(path.read_text().splitlines()) == 1


def test_an_event_file_of_another_run_is_replaced_only_by_appending(tmp_path: Path) -> None:
    path, run = tmp_path / "events.jsonl", {"output_name": "cat", "output_dir": "out"}
    line = '{"v":1,"event":"start","time":1.0,"command":null,"versions":{},"options":%s}\n'
    for other in ({"output_name": "dog", "output_dir": "out"}, {"output_name": "cat"}, {}):
        path.write_text(content := line % json.dumps(other))
        with pytest.raises(UserError, match="not an event log of a run named cat in this --output_dir: it would"):
            open_event_file(path, False, run)
        open_event_file(path, True, run).close()
        assert path.read_text() == content
    path.write_text(line % json.dumps({**run, "seed": 1}))
    open_event_file(path, False, run).close()
    assert path.read_text() == ""


def test_curated_captions_are_replaced_only_where_they_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, folder = tmp_path / "a b.json", tmp_path / "clean it.json", tmp_path / "cats"
    write_image(folder / "a.png", (64, 64), 1).with_suffix(".caption").write_text("an anime girl")
    curated = '{"a": {"caption": "my cat"}}'
    for words in ([str(source), str(out)], [str(folder), str(out)]):
        command = clean_metadata if words[0] == str(source) else captions_to_metadata
        source.write_text('{"a": {"caption": "an anime girl", "tags": "cat"}}')
        out.write_text(curated)
        assert "not a metadata file with these texts, or one that" in refusal_of(capsys, command.main(words))
        assert out.read_text() == curated
        out.unlink()
        assert command.main(words) == 0 == command.main(words)  # its own
        table = json.loads(out.read_text())
        assert parse_entries(table)[0][1].caption in ("a girl", "an anime girl")
        out.write_text(content := out.read_text().replace("girl", "cat"))
        assert "it would be lost" in refusal_of(capsys, command.main(words))
        assert out.read_text() == content
    assert clean_metadata.main([str(source), str(source)]) == 0 == clean_metadata.main([str(source), str(source)])
    assert json.loads(source.read_text())["a"]["caption"] == "a girl"
    assert captions_to_metadata.main([str(folder), str(out), "--in_json", str(out)]) == 0
    assert json.loads(out.read_text())["a"]["caption"] == "an anime girl"
    out.write_text('{"a": {"tags": "cat"}}')  # by another program; nothing is lost
    assert captions_to_metadata.main([str(folder), str(out)]) == 0
    assert {"tags": "cat", "caption": "an anime girl"}.items() <= json.loads(out.read_text())["a"].items()


def test_a_log_file_replaces_log_files_only(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    for _ in range(2):
        handler, _errors = build_handlers(ConsoleOptions(console_log_file=str(path)))
        handler.emit(logging.makeLogRecord({"msg": "new", "levelname": "INFO"}))
        handler.close()
        assert len(path.read_text().splitlines()) == 1
    path.write_text("a caption")
    with pytest.raises(UserError, match="exists and is a text file, not a log file"):
        build_handlers(ConsoleOptions(console_log_file=str(path)))
    assert path.read_text() == "a caption"


def test_html_pages_do_not_overwrite_their_input_or_files_of_another_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "events.jsonl", tmp_path / "page.html"
    path.write_text(EVENT)
    assert "is also read by this command" in refusal_of(capsys, report.main([str(path), "--output", str(path)]))
    page.write_text("<!doctype html><p>mine")
    assert "not a report of a run" in refusal_of(capsys, report.main([str(path), "--output", str(page)]))
    assert (path.read_text(), page.read_text()) == (EVENT, "<!doctype html><p>mine")
    page.unlink()
    assert report.main([str(path), "--output", str(page)]) == 0 == report.main([str(path), "--output", str(page)])
    whole = page.read_text(encoding="utf-8")
    for edited in (whole.replace("<body", "<body data-mine", 1), f"{whole}<p>mine", whole.replace("<!-- #", "<!-- #0")):
        page.write_text(edited, encoding="utf-8")
        assert "unchanged with these events: it" in refusal_of(capsys, report.main([str(path), "--output", str(page)]))
        assert page.read_text(encoding="utf-8") == edited != whole
    page.write_text(whole[: whole.rindex("<!-- #")], encoding="utf-8")  # as earlier versions did
    assert report.main([str(path), "--output", str(page)]) == 0 and page.read_text(encoding="utf-8") == whole
    monkeypatch.setattr(compare_runs, "build_comparison", lambda runs: "a comparison")
    assert "is also read" in refusal_of(capsys, compare_runs.main([str(path), str(page), "--output", str(page)]))


def test_a_metadata_file_replaces_metadata_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "cats" / "a.png", (64, 64), 1).with_suffix(".caption").write_text("a cat")
    (tmp_path / "in.json").write_text('{"b": {"caption": "b"}}')
    out = tmp_path / "out.json"
    words = [str(tmp_path / "cats"), str(out), "--in_json", str(tmp_path / "in.json")]
    for content in ("[1, 2]", '{"general": {}}', EVENT, "lr = 1"):
        out.write_text(content)
        assert "not a metadata file" in refusal_of(capsys, captions_to_metadata.main(words))
        assert out.read_text() == content
    out.unlink()
    assert captions_to_metadata.main(words) == 0 == captions_to_metadata.main(words)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_lock_files_do_not_overwrite_links_and_other_files(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "notes.txt"
    options = options_of("", "--output_dir", str(tmp_path), "--output_name", "m")
    index = tmp_path / "index.parquet"
    for lock in (lock_path(tmp_path, "m"), index.with_name(f"{index.name}.lock")):
        target.write_text("mine")
        if kind == "link":
            lock.symlink_to(target)
        else:
            lock.write_text("mine")
        with pytest.raises(UserError, match="symbolic link" if kind == "link" else "not an? (empty )?lock file"):
            with run_lock(options.saving) if lock.name == ".m.lock" else index_lock(index):
                pass
        assert target.read_text() == lock.read_text() == "mine"


def test_training_does_not_overwrite_the_files_it_reads(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--output_name", "cat", "--no_report", "--pretrained_model_name_or_path"]
    words = ["--network_module", "networks.lora", *words]
    for name in ("cat.safetensors", "cat-000002.safetensors", "base.safetensors", "prompts.txt"):
        (tmp_path / name).write_bytes(b"read")
    for name in ("cat.safetensors", "cat-000002.safetensors"):
        save_safetensors(tmp_path / name, {}, {"ss_network_module": "networks.lora", "ss_output_name": "cat"})
    base, prompts = str(tmp_path / "base.safetensors"), str(tmp_path / "prompts.txt")
    check_output(options_of("", *words, base))
    for more in (
        [str(tmp_path / "cat.safetensors")],
        [base, "--network_weights", str(tmp_path / "cat-000002.safetensors")],
        [base, "--sample_prompts", prompts, "--log_events", prompts],
        [base, "--sample_prompts", prompts, "--console_log_file", prompts],
    ):
        with pytest.raises(UserError, match="is also read by this command and would be lost"):
            check_output(options_of("", *words, *more))
    # Without a state, --autoresume starts from these weights.
    words = [*words, base, "--network_weights", str(tmp_path / "cat.safetensors")]
    with pytest.raises(UserError, match="is also read by this command and would be lost"):
        check_output(options_of("", *words, "--autoresume"))
    check_output(options_of("", *words, "--resume", str(tmp_path / "another-state")))


def test_training_does_not_overwrite_wholes_that_are_not_reports(tmp_path: Path) -> None:
    (tmp_path / "cat-report.html").write_text("<p>mine")
    words = ["--network_module", "networks.lora", "--output_dir", str(tmp_path), "--output_name", "cat"]
    options = options_of("", *words, "--pretrained_model_name_or_path", "base.safetensors")
    with pytest.raises(UserError, match="not a report"):
        check_output(options)

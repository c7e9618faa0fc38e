"""Failed saves: where the weights are written instead, messages, and deletions."""

import logging
import os
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from library.options.output.saving import HubOptions
from library.options.train import TrainOptions
from library.training.reporting.progress import Progress
from library.training.saving import checkpoints, rescue
from library.training.saving.checkpoints import SavedElsewhere, Writer
from library.training.saving.hub import Uploads
from library.training.saving.names import Names
from library.training.saving.rescue import NotWrittenError, places, write_somewhere
from library.training.saving.schedule import Schedule
from library.training.saving.state import MANIFEST_FILE
from networks.core.protocol import AdoptedNetwork


class Network(torch.nn.Module):
    """A network that writes one tensor and fails for paths for which `refuses` is true."""

    def __init__(self, refuses: Callable[[Path], bool] = lambda path: False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0))
        self.refuses = refuses

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        if self.refuses(Path(file)):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_safetensors(file, {"weight": self.weight.detach()}, metadata)


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an --output_dir outside the folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "above" / "out").mkdir(parents=True)
    return tmp_path / "above" / "out"


def writer_to(output: Path, network: Network, **state: Any) -> Writer:
    hashes: Future[dict[str, str]] = Future()
    hashes.set_result({})

    def write_state(folder: Path, step: int, epoch: int, done: Collection[str]) -> None:
        if network.refuses(folder):
            raise OSError(28, "No space left on device")
        folder.mkdir()
        (folder / MANIFEST_FILE).write_text(" ".join(sorted(done)))

    return Writer(
        options=TrainOptions().with_values({"output_dir": str(output), "output_name": "x", **state}),
        is_main=True,
        names=Names(output, "x", "safetensors"),
        schedule=Schedule(1, None, 1, None, 1),
        network=AdoptedNetwork(network),
        architecture={},
        metadata={"ss_network_module": "networks.lora"},
        base_files=hashes,
        saved_weights=nullcontext,
        write_state=write_state,
        uploads=Uploads(HubOptions()),
    )


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_fallback_paths_are_ordered_and_replace_no_file(output: Path) -> None:
    (output / "x-rescued.safetensors").touch()
    (output / "x-rescued-2.safetensors").touch()
    assert list(places(output / "x.safetensors", ".safetensors")) == [
        output / "x.safetensors",
        output / "x-rescued-3.safetensors",
        output.parent / "x-rescued.safetensors",
        Path(tempfile.gettempdir()) / "x-rescued.safetensors",
    ]


def test_a_file_that_cannot_be_replaced_is_saved_under_another_name(
    output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, plain = output / "x.safetensors", os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == path:
            raise PermissionError(1, "Operation not permitted")
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SavedElsewhere, match=r"training is complete, but .*x\.safetensors could not be written"):
        writer_to(output, Network()).save_end(Progress(3), 1)
    assert files_below(output.parent) == {"out/x-rescued.safetensors"}
    assert load_state_dict(output / "x-rescued.safetensors")["weight"].tolist() == [0, 1, 2, 3]
    assert f"{path} ([Errno 1] Operation not permitted) cannot be written; it is saved as {output}" in caplog.text


def test_on_a_full_disk_weights_are_saved_to_the_temporary_folder(
    output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = writer_to(output, Network(lambda path: path.is_relative_to(output.parent)))
    for step in (1, 2, 3):
        writer.save_after_step(Progress(step), 1)
    assert files_below(output.parent) == set()
    assert files_below(Path(tempfile.gettempdir())) == {"x-step00000003-rescued.safetensors"}, "only the newest stays"
    assert caplog.text.count("No space left on device") == 3


def test_a_foreign_file_with_the_name_of_an_outdated_one_is_not_deleted(output: Path) -> None:
    writer = writer_to(output, Network(), save_state=True)
    for step in (1, 2):
        writer.save_after_step(Progress(step), 1)
    save_safetensors(output / "x-step00000001.safetensors", {"model.out": torch.ones(1)})
    state = output / "x-step00000001-state"
    (state / "notes.txt").write_text("mine")
    for step in (3, 4):
        writer.save_after_step(Progress(step), 1)
    remaining = {"x-step00000001.safetensors", "x-step00000003.safetensors", "x-step00000004.safetensors"}
    assert {path.name for path in output.glob("*.safetensors")} == remaining
    assert (state / "notes.txt").read_text() == "mine" and not (output / "x-step00000002-state").exists()


def test_no_older_file_is_deleted_if_the_newer_one_was_saved_elsewhere(output: Path) -> None:
    writer = writer_to(output, Network(lambda path: "step00000003." in path.name))  # including its temporary name
    for step in (1, 2, 3):
        writer.save_after_step(Progress(step), 1)
    remaining = {"x-step00000001.safetensors", "x-step00000002.safetensors", "x-step00000003-rescued.safetensors"}
    assert files_below(output) == remaining
    writer.save_after_step(Progress(4), 1)
    assert "x-step00000002.safetensors" not in files_below(output)


def test_training_continues_if_no_path_is_writable(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = writer_to(output, Network(lambda path: True), save_state=True)
    progress = Progress(1)
    writer.save_after_step(progress, 1)
    assert "cannot be written anywhere" in caplog.text and "training continues" in caplog.text
    assert not progress.done
    with pytest.raises(NotWrittenError, match=r"x\.safetensors cannot be written anywhere: .*out/x\.saf.*x-rescued"):
        writer.save_end(progress, 1)


def test_a_state_that_cannot_be_saved_is_reported_with_a_way_to_continue(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = writer_to(output, Network(lambda path: path == output / "x-step00000007-state"))
    writer.save_interrupted(Progress(7), 1)
    place = output / "x-step00000007-state-rescued"
    assert (place / MANIFEST_FILE).is_file()
    assert f"give the same command with --resume {place}\n" in capsys.readouterr().out


def test_a_state_saved_with_rescued_weights_does_not_count_them_as_written(output: Path) -> None:
    writer = writer_to(output, Network(lambda path: "step00000001." in path.name), save_state=True)
    writer.save_after_step(Progress(1), 1)
    assert (output / "x-step00000001-state" / MANIFEST_FILE).read_text() == ""


def test_free_space_is_checked_before_writing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = {output: 100, output.parent: 2000}
    monkeypatch.setattr(rescue.shutil, "disk_usage", lambda folder: SimpleNamespace(total=9999, free=usage[folder]))
    written: list[Path] = []
    place = write_somewhere(output / "x.ckpt", ".ckpt", 1500, written.append)
    assert written == [place] == [output.parent / "x-rescued.ckpt"]


def test_a_drive_that_reports_no_free_space_is_tried(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescue.shutil, "disk_usage", lambda folder: SimpleNamespace(total=0, free=0))
    assert write_somewhere(output / "x.ckpt", ".ckpt", 1500, Path.touch) == output / "x.ckpt"


def test_the_run_does_not_start_if_its_file_does_not_fit(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 15)
    with pytest.raises(ValueError, match=r"--output_dir .*: 0\.0 MB are free on its disk, and the adapter takes"):
        writer_to(output, Network()).check_space()


def test_a_run_whose_files_do_not_all_fit_starts_with_a_warning(
    output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 16 * 3)
    writer_to(output, Network(), max_train_steps=2).check_space()
    assert not caplog.records
    writer_to(output, Network(), max_train_steps=90).check_space()  # three at a time, and the last one
    assert "4 files of 0.0 MB" in caplog.text and "--save_last_n_steps" in caplog.text


def test_a_base_model_that_cannot_be_hashed_only_omits_the_hash(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone: Future[dict[str, str]] = Future()
    gone.set_exception(OSError(5, "Input/output error"))
    writer = writer_to(output, Network())
    with caplog.at_level(logging.WARNING):
        writer.__class__(**{**vars(writer), "base_files": gone}).save_end(Progress(1), 1)
    assert files_below(output) == {"x.safetensors"} and "the base model cannot be hashed" in caplog.text

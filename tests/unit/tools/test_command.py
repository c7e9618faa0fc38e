"""library/commands/command.py: behaviour that all commands share."""

import argparse
import importlib.util
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from library.base.errors import UserError
from library.commands.command import check_output, check_output_folder, run
from library.options.output.console import ConsoleOptions
from library.training.command_line.console import setup_logging
from tests.unit.tools import adapter_files
from tools.resize_lora import main as resize

NAME = "bitsandbytes"


def test_a_command_does_not_import_a_library_that_it_never_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers imports bitsandbytes if it is installed, which takes seconds and logs lines about kernels."""
    for module in (NAME, "diffusers.utils.import_utils"):  # as in a new process
        monkeypatch.delitem(sys.modules, module, raising=False)
    hidden = []
    parser = argparse.ArgumentParser()
    assert run(parser, lambda _: hidden.append(importlib.util.find_spec(NAME)), []) == 0
    assert hidden == [None]
    assert NAME not in sys.modules


def test_each_line_is_logged_once_after_a_command_sets_up_logging_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own

    def act(_: argparse.Namespace) -> None:
        logging.getLogger("tools").info("before")
        setup_logging(ConsoleOptions())
        logging.getLogger("tools").info("after")

    assert run(argparse.ArgumentParser(), act, []) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[-1] for line in lines] == ["before", "after"]


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.safetensors").write_bytes(b"in")
    (tmp_path / "link.safetensors").symlink_to("in.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    paths = [None, Path("none.safetensors"), tmp_path / "in.safetensors"]
    check_output("--save_to", Path("new/folder/out.safetensors"), "tools/x.py", paths)
    check_output_folder("--save_to", Path("new/folder"), "tools/x.py")
    for name, words in (
        ("in.safetensors", "is also read by this command and would be lost"),
        ("link.safetensors", "is also read by this command and would be lost"),
        ("folder.safetensors", "is a folder; use the name of a file"),
        ("in.safetensors/out.safetensors", "in.safetensors is a file, not a folder"),
        ("out.gguf", "the name must end in one of"),
    ):
        with pytest.raises(UserError, match=words):
            check_output("--save_to", Path(name), "tools/x.py", paths)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root can write everywhere
    with pytest.raises(UserError, match=f"{tmp_path} is not writable; change its permissions"):
        check_output("--save_to", Path("new/out.safetensors"), "tools/x.py")
    with pytest.raises(UserError, match="exists and is a folder of 3 entries, not a model"):
        check_output_folder("--save_to", tmp_path, "tools/x.py")
    assert sorted(os.listdir()) == ["folder.safetensors", "in.safetensors", "link.safetensors"]


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_full_disk_is_reported_in_one_line_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    """The writers of both formats raise different errors for this, one of them without naming the cause."""
    model = adapter_files.write(tmp_path / "in.safetensors", 71)

    def fill(*_: object, **__: object) -> None:
        if ending == ".pt":
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fill)
    monkeypatch.setattr("torch.save", fill)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096))
    out = tmp_path / f"out{ending}"
    assert resize(["--model", str(model), "--save_to", str(out), "--new_rank", "1"]) == 1
    error_lines = capsys.readouterr().err.splitlines()
    assert [line for line in error_lines if line.startswith("error")] == [
        f"error: [Errno 28] No space left on device: '{out}'"
    ]
    assert os.listdir(tmp_path) == ["in.safetensors"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    if ending == ".pt":
        with pytest.raises(RuntimeError, match="unexpected pos"):  # another error of the writer is not reworded
            resize(["--model", str(model), "--save_to", str(out), "--new_rank", "1"])

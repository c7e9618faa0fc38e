"""tools/capabilities.py, and behaviour that all commands share."""

import argparse
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from safetensors import SafetensorError

from library.architectures.scripts import list_scripts
from library.base.errors import UserError
from library.commands.command import check_output, check_output_folder, run
from library.commands.reference_page import render_page
from library.options.other_programs import read_program
from library.options.output.console import ConsoleOptions
from library.training.command_line.console import setup_logging
from networks.core.registry.layouts import list_kinds
from tests.running import ROOT
from tests.unit.tools import adapter_files
from tools.capabilities import main
from tools.resize_lora import main as resize


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["--json"]) == 0
    return dict(json.loads(printed.getvalue()))


def test_the_output_fits_its_schema(described: dict[str, Any]) -> None:
    schema = json.loads((ROOT / "docs" / "capabilities.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(described)


def test_every_script_has_the_options_of_its_parser(described: dict[str, Any]) -> None:
    names = {script["name"] for script in described["scripts"]}
    assert names == {path.name for path in ROOT.glob("*train_*.py")}
    assert {script.name for script in list_scripts()} <= names
    for script in described["scripts"]:
        parser = importlib.import_module(script["name"][:-3]).setup_parser()
        assert {option["flag"] for option in script["options"]} == parser._option_string_actions.keys() - {
            "-h",
            "--help",
        }
        for option in script["options"]:
            assert option["default"] == parser.get_default(option["name"])


def test_options_carry_type_range_and_group(described: dict[str, Any]) -> None:
    (script,) = (entry for entry in described["scripts"] if entry["name"] == "sdxl_train_network.py")
    options = {entry["name"]: entry for entry in script["options"]}
    assert options["lr_warmup_steps"]["type"] == "steps" and options["max_train_steps"]["type"] == "int"
    assert options["network_args"]["is_list"] and not options["seed"]["is_list"]
    assert options["gradient_checkpointing"]["type"] == "flag"
    assert options["prior_loss_weight"]["minimum"] == 0 and options["caption_dropout_rate"]["maximum"] == 1
    assert options["network_dim"]["minimum"] == 1 or options["network_dim"]["exclusive_minimum"] == 0
    assert options["mixed_precision"]["choices"] == ["no", "fp16", "bf16"]
    assert not options["fit"]["in_sd_scripts"] and options["fit"]["group"]


def test_options_without_effect_on_a_model_carry_the_reason_that_its_runs_log(described: dict[str, Any]) -> None:
    scripts = {script["name"]: {item["name"]: item for item in script["options"]} for script in described["scripts"]}
    for name in ("v2", "clip_skip", "min_snr_gamma"):
        assert scripts["flux_2_train_network.py"][name]["has_no_effect"]
        assert scripts["train_network.py"][name]["has_no_effect"] is None
    flux = scripts["flux_train_network.py"]
    assert flux["clip_l"]["has_no_effect"] is None, "FLUX.1 reads it, only Chroma does not"
    models = {model["name"]: model["has_no_effect"] for model in described["base_models"]}
    assert "clip_l" in models["chroma"] and "clip_l" not in models["flux"]


def test_forms_know_paths_choices_and_commands(described: dict[str, Any]) -> None:
    (script,) = (entry for entry in described["scripts"] if entry["name"] == "flux_2_train_network.py")
    options = {entry["name"]: entry for entry in script["options"]}
    paths = {name: item["path_kind"] for name, item in options.items() if item["type"] == "path"}
    assert paths["output_dir"] == "new folder" and paths["dit"] == "model" and paths["in_json"] == "file"
    undeclared = {
        name
        for name, item in options.items()
        if item["path_kind"] is None and item["type"] != "flag" and re.match(r"(File|Folder)\b(?! name)", item["help"])
    }
    assert undeclared == {"huggingface_path_in_repo"}  # not on this machine
    assert "Prodigy" in options["optimizer_type"]["choices"] and options["optimizer_type"]["takes_other_values"]
    assert "rex" in options["lr_scheduler"]["choices"] and "networks.lokr" in options["network_module"]["choices"]
    assert options["recipe"]["choices"] and not options["recipe"]["takes_other_values"]
    assert {"resolution", "cache_directory"} <= {key["name"] for key in described["dataset_keys"]}
    assert "src/musubi_tuner/flux_2_cache_latents.py" in {script["name"] for script in described["caching_scripts"]}
    tools = {tool["name"]: {item["flag"] for item in tool["options"]} for tool in described["tools"]}
    assert "--save_to" in tools["tools/merge_lora.py"]


def test_every_network_module_lists_its_arguments(described: dict[str, Any]) -> None:
    modules = {
        module["network_module"]: {item["name"] for item in module["arguments"]}
        for module in described["network_modules"]
    }
    assert modules.keys() == {kind.network_module for kind in list_kinds() if kind.network_module}
    assert {"conv_dim", "loraplus_lr_ratio", "dora_wd"} <= modules["networks.lora"]
    assert "split_qkv" in modules["networks.lora"] and "split_qkv" not in modules["networks.loha"]


def test_an_unknown_script_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--script", "sdxl_train_networks.py"]) == 1
    assert "is not a training script; use sdxl_train_network.py" in capsys.readouterr().err


def test_every_setting_has_a_help_text(described: dict[str, Any]) -> None:
    settings = [*described["dataset_keys"], *(a for kind in described["network_modules"] for a in kind["arguments"])]
    assert len(described["dataset_keys"]) > 47 and all(setting["help"].endswith(".") for setting in settings)


def test_the_page_of_settings_is_what_the_declarations_say(described: dict[str, Any], tmp_path: Path) -> None:
    """`python3 tools/capabilities.py --docs docs/reference.md` writes it anew."""
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == render_page(described)
    assert all(f"| `{entry.name}` | " in page for entry in read_program("diffusers").values() if not entry.option)
    (tmp_path / "mine.md").write_text("mine")
    assert main(["--docs", str(tmp_path / "mine.md")]) == 1 and (tmp_path / "mine.md").read_text() == "mine"
    assert main(["--docs", str(tmp_path / "new.md")]) == 0 and (tmp_path / "new.md").read_text("utf-8") == page


def test_scripts_that_train_on_prompts_say_which_options_have_no_effect(described: dict[str, Any]) -> None:
    scripts = {script["name"]: {o["name"]: o for o in script["options"]} for script in described["scripts"]}
    for name in ("train_leco.py", "sdxl_train_leco.py"):
        assert scripts[name]["flip_aug"]["has_no_effect"] == "prompts are trained alone, without images"
    assert scripts["train_network.py"]["flip_aug"]["has_no_effect"] is None
    assert "as small as the adapter" in scripts["train_network.py"]["fused_backward_pass"]["has_no_effect"]


# library/commands/command.py: behaviour that all commands share.

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

"""Which adapters and states a run takes for its own, among them those of sd-scripts."""

import json
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from library.checkpoints.hashes import with_hashes
from library.checkpoints.overwriting import judge
from library.checkpoints.saving import save_pickle_state_dict, save_safetensors
from library.training.reporting.event_stream import Events
from library.training.saving.names import Names
from library.training.saving.own_files import move_changed, remove

LORA = {"lora_unet_x.lora_down.weight": torch.ones(1), "lora_unet_x.alpha": torch.ones(())}
BASE = {"model.diffusion_model.out.0.weight": torch.ones(1)}
MODULE = {"ss_network_module": "networks.lora"}
SD_SCRIPTS = ("model.safetensors", "optimizer.bin", "scheduler.bin", "sampler.bin", "random_states_0.pkl")


def names_of(folder: Path, output_name: str | None = "cat") -> Names:
    return Names(folder, output_name, "safetensors")


@pytest.mark.parametrize(
    ("output_name", "metadata", "expected"),
    [
        ("cat", {**MODULE, "ss_output_name": "cat"}, "ours"),
        ("cat", MODULE, "ours"),  # --no_metadata of either program
        ("cat", {**MODULE, "ss_output_name": "dog"}, "foreign"),
        (None, {**MODULE, "ss_output_name": "None"}, "ours"),
        (None, {**MODULE, "ss_output_name": "dog"}, "foreign"),
        ("cat", {"ss_output_name": "cat"}, "foreign"),
        ("cat", {**MODULE, "ss_output_name": "cat", "written_by": "tools/resize_lora.py: cat.safetensors"}, "foreign"),
        ("cat", {}, "foreign"),
    ],
)
def test_an_adapter_is_known_by_module_and_name(
    tmp_path: Path, output_name: str | None, metadata: dict[str, str], expected: str
) -> None:
    mark = metadata.pop("written_by", None) if "written_by" in metadata else None
    save_safetensors(tmp_path / "cat.safetensors", LORA, metadata, mark)
    assert judge(tmp_path / "cat.safetensors", names_of(tmp_path, output_name).adapter_kind) == expected


@pytest.mark.parametrize("extension", ["safetensors", "ckpt"])
def test_a_file_that_cannot_be_read_is_not_ours(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"cat.{extension}"
    path.write_bytes(b"half a file")
    assert judge(path, names_of(tmp_path).adapter_kind) == "foreign"


def test_a_pickled_adapter_is_known_by_its_keys_or_its_mark(tmp_path: Path) -> None:
    kind, path = names_of(tmp_path).adapter_kind, tmp_path / "cat.ckpt"
    for tensors, mark, expected in (
        (LORA, None, "ours"),
        (BASE, None, "foreign"),
        (BASE, "training: cat.ckpt", "ours"),
        (LORA, "training: dog.ckpt", "foreign"),
    ):
        save_pickle_state_dict(path, tensors, mark=mark)
        assert judge(path, kind) == expected, (mark, expected)


def write_state(folder: Path, names: tuple[str, ...], output_name: str | None = None) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x")
    if output_name is not None:
        (folder / "train_state.json").write_text(json.dumps({"options": {"output_name": output_name}}))
    return folder


def test_a_state_is_known_by_its_files_and_the_name_that_it_records(tmp_path: Path) -> None:
    kind = names_of(tmp_path).state_kind
    ours = ("network.safetensors", "training.safetensors")
    for name, files, output_name, expected in (
        ("a", ours, "cat", "ours"),
        ("b", SD_SCRIPTS, None, "ours"),
        ("c", (*SD_SCRIPTS, ".DS_Store", "train_state.json"), None, "ours"),
        ("d", (*ours, "photo.png"), "cat", "foreign"),
        ("e", (*SD_SCRIPTS, "unet"), None, "foreign"),
        ("f", ("model.safetensors", "model_index.json"), None, "foreign"),
        ("g", ours, None, "foreign"),
        ("h", (), None, "free"),
    ):
        assert judge(write_state(tmp_path / f"{name}-state", files, output_name), kind) == expected, name


def test_a_state_of_another_run_is_foreign_but_one_that_was_renamed_is_not(tmp_path: Path) -> None:
    kind, files = names_of(tmp_path).state_kind, ("network.safetensors",)
    assert judge(write_state(tmp_path / "cat-251130-state", files, "cat-251130"), kind) == "foreign"
    assert judge(write_state(tmp_path / "cat-state", files, "dog"), kind) == "ours"


@pytest.mark.parametrize("extension", ["safetensors", "ckpt"])
def test_an_outdated_adapter_that_another_program_changed_is_not_deleted(
    tmp_path: Path, extension: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, path = names_of(tmp_path).adapter_kind, tmp_path / f"cat.{extension}"
    metadata = with_hashes(LORA, {**MODULE, "ss_output_name": "cat"})
    changed = {name: tensor + 1 for name, tensor in LORA.items()}
    for tensors, is_kept in ((LORA, False), (changed, True)):
        if extension == "safetensors":
            save_safetensors(path, tensors, metadata)
        else:
            save_pickle_state_dict(path, LORA, mark=f"training: {path.name}")
            with ZipFile(path) as archive:
                comment = archive.comment
            save_pickle_state_dict(path, tensors)
            with ZipFile(path, "a") as archive:
                archive.comment = comment
        remove("checkpoint", path, kind, Events([]))
        assert path.exists() == is_kept
    assert f"{path} is outdated, but kept" in caplog.text


def test_an_adapter_that_another_program_saved_as_a_pickle_makes_way_and_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a program keeps no mark, so nothing tells of what the file held before."""
    path = tmp_path / "cat.ckpt"
    save_pickle_state_dict(path, LORA, mark=f"training: {path.name}")
    move_changed(path)
    assert path.exists()
    torch.save(torch.load(path), path)
    remove("checkpoint", path, names_of(tmp_path).adapter_kind, Events([]))
    assert path.exists() and f"{path} is outdated, but kept" in caplog.text
    move_changed(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cat.changed.ckpt"]

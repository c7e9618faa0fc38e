"""Uploads and downloaded states, tested with a local stand-in for the huggingface_hub client."""

import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from library.options.output.saving import HubOptions
from library.training.saving.hub import Uploads, check_repository, fetch_state

OPTIONS = replace(HubOptions(), huggingface_repo_id="me/cats", huggingface_token="secret")


class FolderHub:
    """Repositories as folders, with the HfApi methods that are used and their parameter names."""

    root: Path
    made: dict[str, bool]
    fails = False

    def __init__(self, token: str | None = None) -> None:
        assert token == "secret"

    def repo_exists(self, repo_id: str, *, repo_type: str | None = None) -> bool:
        if self.fails:
            raise ConnectionError("no route")
        return (self.root / repo_id).is_dir()

    def create_repo(self, repo_id: str, *, repo_type: str | None = None, private: bool, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.made[repo_id] = private

    def upload_file(self, *, path_or_fileobj: str, path_in_repo: str, repo_id: str, repo_type: str | None) -> None:
        target = self.root / repo_id / path_in_repo
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path_or_fileobj, target)

    def upload_folder(self, *, folder_path: str, path_in_repo: str, repo_id: str, repo_type: str | None) -> None:
        shutil.copytree(folder_path, self.root / repo_id / path_in_repo, dirs_exist_ok=True)

    def snapshot_download(
        self, *, repo_id: str, revision: str | None, repo_type: str | None, allow_patterns: list[str]
    ) -> str:
        assert revision in (None, "main") and repo_type in (None, "model")
        assert allow_patterns[0].endswith("/*")
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FolderHub]:
    stand_in: Any = type("Hub", (FolderHub,), {"root": tmp_path / "hub", "made": {}})
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in)
    return stand_in  # type: ignore[no-any-return]


def test_the_real_client_has_the_methods_and_parameters_that_are_used() -> None:
    import inspect

    for name in ("repo_exists", "create_repo", "upload_file", "upload_folder", "snapshot_download"):
        used_parameters = set(inspect.signature(getattr(FolderHub, name)).parameters)
        assert used_parameters <= set(inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters), name


@pytest.mark.parametrize("is_async", [False, True])
def test_files_and_states_are_uploaded_to_the_folder_of_the_repository(
    hub: type[FolderHub], tmp_path: Path, is_async: bool
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    (tmp_path / "a-state").mkdir()
    (tmp_path / "a-state" / "train_state.json").write_text("{}")
    uploads = Uploads(replace(OPTIONS, huggingface_path_in_repo="runs", async_upload=is_async))
    uploads.send(tmp_path / "a.safetensors", is_last=False)
    uploads.send(tmp_path / "a-state", is_last=True)
    assert (hub.root / "me/cats/runs/a.safetensors").read_bytes() == b"weights"
    assert (hub.root / "me/cats/runs/a-state/train_state.json").read_text() == "{}"
    assert hub.made == {"me/cats": True}


def test_a_new_repository_is_public_only_on_request(hub: type[FolderHub]) -> None:
    check_repository(replace(OPTIONS, huggingface_repo_visibility="public"))
    assert hub.made == {"me/cats": False}


def test_nothing_is_uploaded_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    Uploads(HubOptions()).send(tmp_path / "a.safetensors", is_last=True)
    check_repository(HubOptions())


def test_a_failed_upload_is_only_logged(hub: type[FolderHub], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.fails = True
    with caplog.at_level(logging.ERROR):
        Uploads(OPTIONS).send(tmp_path / "a.safetensors", is_last=True)
    assert "could not be uploaded to me/cats: ConnectionError: no route" in caplog.text
    with pytest.raises(ValueError, match="--huggingface_repo_id me/cats cannot be reached or made"):
        check_repository(OPTIONS)


def test_a_state_is_downloaded_by_its_repository_path(hub: type[FolderHub]) -> None:
    folder = hub.root / "me/cats/runs/a-state"
    folder.mkdir(parents=True)
    assert fetch_state("me/cats/runs/a-state", OPTIONS) == folder
    assert fetch_state("me/cats/runs/a-state:main:model", OPTIONS) == folder
    with pytest.raises(ValueError, match="has no folder runs/b-state"):
        fetch_state("me/cats/runs/b-state", OPTIONS)


@pytest.mark.parametrize("name", ["a-state", "me/cats", "me/cats/", "/cats/x"])
def test_a_malformed_repository_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"write owner/repository/path"):
        fetch_state(name, OPTIONS)


def test_a_file_is_not_deleted_before_it_is_uploaded(
    hub: type[FolderHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, last = tmp_path / "a.safetensors", tmp_path / "last.safetensors"
    for file in (path, last):
        file.write_bytes(b"weights")
    network_is_back = threading.Event()
    upload = FolderHub.upload_file

    def slow(self: FolderHub, **words: Any) -> None:
        assert network_is_back.wait(10)
        upload(self, **words)

    monkeypatch.setattr(hub, "upload_file", slow)
    uploads = Uploads(replace(OPTIONS, async_upload=True))
    uploads.send(path, is_last=False)
    uploads.afterwards(path.unlink)
    assert path.exists()
    network_is_back.set()
    uploads.send(last, is_last=True)
    assert {file.name for file in (tmp_path / "hub" / "me" / "cats").iterdir()} == {path.name, last.name}
    assert not path.exists()
    uploads.afterwards(last.unlink)
    assert not last.exists()

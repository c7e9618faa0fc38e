"""tools/release.py: the archives, unpacked, are the suite."""

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from library.base.version import NAME, VERSION
from tools import release

# What start imports.
ENVIRONMENT = ("lock_file", "module_names", "package_sources", "requirements", "running", "torch_builds")
OTHERS = ("pyproject.toml", "requirements.txt")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository with the files that start needs, committed."""
    root = tmp_path / "repository"
    environment = [f"library/environment/{name}.py" for name in ("__init__", *ENVIRONMENT)]
    base = [f"library/base/{name}.py" for name in ("__init__", "command_parser", "terminal", "version")]
    for name in ("tools/start.py", "tools/__init__.py", "library/__init__.py", *base, *environment, *OTHERS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((release.ROOT / name).read_bytes())
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(release, "ROOT", root)
    return root


def test_the_archives_unpack_to_the_suite_and_have_their_sums(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "a new folder"
    assert release.main([str(out)]) == 0
    sums = [line.split("  ") for line in (out / release.SUMS).read_text().splitlines()]
    assert sums == [[hashlib.sha256((out / name).read_bytes()).hexdigest(), name] for _, name in sums]
    with tarfile.open(out / f"{NAME}-{VERSION}.tar.gz") as archive:
        archive.extractall(tmp_path / "tar", filter="data")
    with zipfile.ZipFile(out / f"{NAME}-{VERSION}.zip") as packed:
        packed.extractall(tmp_path / "zip")
    for kind in ("tar", "zip"):
        start = tmp_path / kind / f"{NAME}-{VERSION}" / "tools" / "start.py"
        done = subprocess.run(
            [sys.executable, "-S", str(start), "--version"], capture_output=True, text=True, check=True
        )
        assert VERSION in done.stdout


def test_uncommitted_changes_and_existing_folders_are_refused(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert release.main([str(tmp_path)]) == 1
    assert "exists; name a new folder" in capsys.readouterr().err
    (repository / "requirements.txt").write_text("changed\n")
    assert release.main([str(tmp_path / "new")]) == 1
    assert "git commit" in capsys.readouterr().err and not (tmp_path / "new").exists()

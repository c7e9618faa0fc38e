"""The archives of a release, unpacked, are the suite, and every command tells its version."""

import hashlib
import importlib
import json
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


# --version and --errors_json of every script and command.

ROOT = Path(__file__).parents[3]
SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in (".", "tools", "networks", "finetune")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_its_version(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--version"])
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as ended:
        module.setup_parser().parse_args() if hasattr(module, "setup_parser") else module.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{Path(script).name} {VERSION}\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_a_wrong_command_line_as_json(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--errors_json"])
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if hasattr(module, "setup_parser"):
        assert "--errors_json" in module.setup_parser()._option_string_actions
    with pytest.raises(SystemExit):
        module.setup_parser().error("no file") if hasattr(module, "setup_parser") else module.main()
    fields = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]
    assert fields["message"] and fields["cause"] == "wrong value"

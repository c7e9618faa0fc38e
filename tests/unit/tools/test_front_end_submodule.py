"""A front end whose sd-scripts is a git submodule: git leaves the installed folder alone until it is restored."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.front_end_kills import read_tree
from tests.unit.tools.small_suite import SmallSuite, write_files

UPDATE = ("submodule", "update", "--init", "--recursive")
SETTING = "submodule.sd-scripts.update"
THEIRS = {"train_network.py": "theirs, 1", "sdxl_train.py": "theirs, 1", "library/strategy.py": "theirs, 1"}

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")

Git = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Git:
    """Return a function that runs git in a folder, without the user's own settings."""
    settings = tmp_path / "gitconfig"
    settings.write_text(
        '[user]\nname = a\nemail = a@b\n[init]\ndefaultBranch = main\n[protocol "file"]\nallow = always'
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")

    def run(folder: Path, *words: str, fails: bool = False) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=60)
        assert fails or done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def gui(tmp_path: Path, git: Git) -> Path:
    """Return a clone of a front end with sd-scripts as a submodule, as its documentation clones it."""
    for name in ("scripts", "upstream"):
        (tmp_path / name).mkdir()
        git(tmp_path / name, "init", "--quiet")
    commit(git, tmp_path / "scripts", THEIRS)
    git(tmp_path / "upstream", "submodule", "--quiet", "add", str(tmp_path / "scripts"), "sd-scripts")
    commit(git, tmp_path / "upstream", {"gui.py": ""})
    git(tmp_path, "clone", "--quiet", "--recurse-submodules", str(tmp_path / "upstream"), "gui")
    return tmp_path / "gui"


def commit(git: Git, folder: Path, files: dict[str, str]) -> None:
    write_files(folder, files)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "a change")


def move_pin(git: Git, tmp_path: Path, files: dict[str, str]) -> None:
    """Publish a new version of sd-scripts, and of the front end with it."""
    commit(git, tmp_path / "scripts", files)
    git(tmp_path / "upstream" / "sd-scripts", "pull", "--quiet")
    commit(git, tmp_path / "upstream", {})


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
def test_updates_of_the_front_end_leave_the_suite_alone(
    suite: SmallSuite, gui: Path, git: Git, tmp_path: Path, force: tuple[str, ...]
) -> None:
    done = suite.run(gui)
    assert done.returncode == 0 and "git submodule update skips sd-scripts" in done.stderr
    installed = read_tree(gui / "sd-scripts")
    for version in range(3):
        git(gui, *UPDATE, *force)
        assert read_tree(gui / "sd-scripts") == installed
        move_pin(git, tmp_path, {"train_network.py": f"theirs, {version + 2}"})
        git(gui, "pull", "--quiet")
        git(gui, *UPDATE, *force)
        assert read_tree(gui / "sd-scripts") == installed
        assert suite.run(gui).returncode == 0  # the documented update of this suite
    assert suite.run(gui, "--check").returncode == 0
    assert suite.run(gui, "--restore").returncode == 0
    assert read_tree(gui / "sd-scripts") == read_tree_of(THEIRS, tmp_path)
    git(gui, *UPDATE)
    assert (gui / "sd-scripts/train_network.py").read_text() == "theirs, 4"
    check_clean(git, gui)


def read_tree_of(files: dict[str, str], tmp_path: Path) -> dict[str, str]:
    write_files(tmp_path / "wanted", files)
    return read_tree(tmp_path / "wanted")


def check_clean(git: Git, gui: Path) -> None:
    """Raise AssertionError if git sees anything of this suite."""
    assert git(gui, "status", "--porcelain", "--ignored").stdout == ""
    assert git(gui / "sd-scripts", "status", "--porcelain", "--ignored").stdout == ""
    assert git(gui, "config", "--get", SETTING, fails=True).stdout == ""


def test_without_an_update_everything_is_as_before(suite: SmallSuite, gui: Path, git: Git) -> None:
    settings = (gui / ".git/config").read_text()
    assert suite.run(gui).returncode == 0
    assert suite.run(gui, "--restore").returncode == 0
    check_clean(git, gui)
    assert (gui / ".git/config").read_text() == settings


@pytest.mark.parametrize(
    "changed",
    [{"train_network.py": "theirs, 2"}, {"library/strategy.py": "theirs, 2"}, {"library/new.py": "theirs, 2"}],
    ids=["a script of ours", "a file that we lack", "a new file"],
)
def test_a_pull_that_recurses_changes_no_file_of_ours(
    suite: SmallSuite, gui: Path, git: Git, tmp_path: Path, changed: dict[str, str]
) -> None:
    assert suite.run(gui).returncode == 0
    installed = read_tree(gui / "sd-scripts")
    move_pin(git, tmp_path, changed)
    for _ in range(2):  # git refuses to check out over changed files
        git(gui, "pull", "--quiet", "--recurse-submodules", fails=True)
        git(gui, *UPDATE)
    assert installed.items() <= read_tree(gui / "sd-scripts").items()
    assert suite.run(gui, "--check").returncode == 0
    assert suite.run(gui, "--restore").returncode == 0
    assert read_tree(gui / "sd-scripts") == read_tree_of(THEIRS, tmp_path)
    assert git(gui / "sd-scripts", "status", "--porcelain").stdout == ""
    shutil.rmtree(gui / "sd-scripts.aside", ignore_errors=True)
    git(gui, *UPDATE)
    check_clean(git, gui)
    assert {**THEIRS, **changed}.items() <= read_tree(gui / "sd-scripts").items()


def test_an_earlier_setting_comes_back_and_one_of_the_user_stays(suite: SmallSuite, gui: Path, git: Git) -> None:
    git(gui, "config", SETTING, "merge")
    for _ in range(2):
        assert suite.run(gui).returncode == 0
    assert git(gui, "config", SETTING).stdout == "none\n"
    assert suite.run(gui, "--restore").returncode == 0
    assert git(gui, "config", SETTING).stdout == "merge\n"
    assert suite.run(gui).returncode == 0
    git(gui, "config", SETTING, "checkout")
    wrong = suite.run(gui, "--check")
    assert wrong.returncode == 1 and SETTING in wrong.stderr
    assert suite.run(gui, "--restore").returncode == 0
    assert git(gui, "config", SETTING).stdout == "checkout\n"


def test_a_submodule_in_a_submodule_is_found(suite: SmallSuite, gui: Path, git: Git, tmp_path: Path) -> None:
    """LoRA_Easy's backend is a submodule, and sd_scripts one in it."""
    (tmp_path / "outer").mkdir()
    git(tmp_path / "outer", "init", "--quiet")
    git(tmp_path / "outer", "submodule", "--quiet", "add", str(tmp_path / "upstream"), "musubi-tuner")
    commit(git, tmp_path / "outer", {"main.py": ""})
    git(tmp_path / "outer", *UPDATE)
    done = suite.run(tmp_path / "outer" / "musubi-tuner")
    assert done.returncode == 0, done.stderr
    installed = read_tree(tmp_path / "outer")
    git(tmp_path / "outer", *UPDATE, "--force")
    assert read_tree(tmp_path / "outer") == installed


def test_an_installation_without_git_is_refused_in_a_repository(
    suite: SmallSuite, gui: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_tree(gui)
    monkeypatch.setenv("PATH", "")
    refused = suite.run(gui)
    assert refused.returncode == 1 and "git is not found" in refused.stderr
    assert read_tree(gui) == before


@pytest.mark.slow
def test_an_installation_killed_anywhere_leaves_a_submodule_that_git_knows(
    suite: SmallSuite, gui: Path, git: Git
) -> None:
    before = read_tree(gui)
    for kill in suite.kill_everywhere(gui, ["{}"], [["{}"], ["{}", "--restore"]]):
        assert kill["statuses"] == [0, 0] and kill["trees"][-1] == before
    assert suite.run(gui).returncode == 0
    for kill in suite.kill_everywhere(gui, ["{}", "--restore"], [["{}"], ["{}", "--restore"]]):
        assert kill["statuses"] == [0, 0] and kill["trees"][-1] == before


def test_the_commit_in_saved_files_is_never_that_of_sd_scripts(gui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.checkpoints import metadata

    write_files(gui / "sd-scripts", {"library/checkpoints/metadata.py": ""})
    monkeypatch.setattr(metadata, "__file__", str(gui / "sd-scripts/library/checkpoints/metadata.py"))
    assert metadata.commit_hash.__wrapped__() is None
    monkeypatch.undo()
    commit = metadata.commit_hash.__wrapped__()
    assert commit is None or len(commit) == 40


@pytest.fixture
def nested(tmp_path: Path, git: Git) -> Path:
    """Return a front end that is a repository, with a clone of sd-scripts below a folder with special characters."""
    (tmp_path / "scripts").mkdir()
    git(tmp_path / "scripts", "init", "--quiet")
    commit(git, tmp_path / "scripts", THEIRS)
    gui = tmp_path / "my [gui]"
    gui.mkdir()
    git(gui, "init", "--quiet")
    commit(git, gui, {"app.py": "", ".gitignore": "sd-scripts/\nscripts/sd-scripts/\n"})
    git(tmp_path, "clone", "--quiet", str(tmp_path / "scripts"), str(gui / "scripts" / "sd-scripts"))
    return gui


TAKING = [("clean", "-fd"), ("stash", "--include-untracked"), ("add", "--all")]


@pytest.mark.parametrize("words", TAKING, ids=[words[0] for words in TAKING])
def test_git_leaves_alone_what_is_kept_beside_the_folder(
    suite: SmallSuite, nested: Path, git: Git, words: tuple[str, ...]
) -> None:
    exclude = nested / ".git/info/exclude"
    exclude.write_text("mine", "utf-8")  # without a final line break
    assert suite.run(nested).returncode == 0
    write_files(nested, {"scripts/sd-scripts/train_network.py": "my edit"})
    assert suite.run(nested).returncode == 0  # moves the edited script aside
    kept = read_tree(nested)
    (nested / "other.txt").write_text("x")
    git(nested, *words)
    assert {path: text for path, text in read_tree(nested).items() if path != "other.txt"} == kept
    assert "sd-scripts" not in git(nested, "status", "--porcelain").stdout
    assert suite.run(nested, "--restore").returncode == 0
    assert exclude.read_text("utf-8") == "mine\n"


def test_files_that_git_brings_back_are_nobodys(suite: SmallSuite, nested: Path, git: Git, tmp_path: Path) -> None:
    """A nested clone is updated by hand, as fluxgym's page says: nothing of it is taken for the user's."""
    scripts = nested / "scripts/sd-scripts"
    assert suite.run(nested).returncode == 0
    installed = read_tree(scripts)
    commit(git, tmp_path / "scripts", {"train_network.py": "theirs, 2", "library/new.py": "theirs, 2"})
    git(scripts, "checkout", "--quiet", ".")
    git(scripts, "pull", "--quiet")
    write_files(scripts, {"library/mine.py": "mine"})
    again = suite.run(nested)
    assert again.returncode == 0 and "moved" not in again.stderr and not (nested / "scripts/sd-scripts.aside").exists()
    assert read_tree(scripts) == {**installed, "library/mine.py": "mine"}
    git(scripts, "checkout", "--quiet", ".")  # without another update
    done = suite.run(nested, "--restore")
    assert done.returncode == 0 and done.stderr.count("is moved to") == 1  # the user's module
    assert read_tree(nested / "scripts/sd-scripts.aside") == {"library": "folder", "library/mine.py": "mine"}
    assert (scripts / "train_network.py").read_text() == (scripts / "library/new.py").read_text() == "theirs, 2"
    assert git(scripts, "status", "--porcelain").stdout == ""


def test_a_script_that_the_user_edited_before_is_not_updated(
    suite: SmallSuite, nested: Path, git: Git, tmp_path: Path
) -> None:
    scripts = nested / "scripts/sd-scripts"
    write_files(scripts, {"train_network.py": "my edit"})
    assert suite.run(nested).returncode == 0
    commit(git, tmp_path / "scripts", {"train_network.py": "theirs, 2"})
    git(scripts, "checkout", "--quiet", ".")
    git(scripts, "pull", "--quiet")
    done = suite.run(nested, "--restore")
    assert done.returncode == 0 and "keeps files of an earlier commit" in done.stderr
    assert (scripts / "train_network.py").read_text() == "my edit"
    assert git(scripts, "status", "--porcelain").stdout == " M train_network.py\n"

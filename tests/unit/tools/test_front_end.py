"""tools/front_end.py keeps the user's files and runs without any package."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toml

from library.architectures.specs import list_specs
from library.front_ends.layouts import KEPT, ROOT, list_musubi, list_replacements, list_suite
from tests.front_end_kills import read_tree
from tests.unit.tools.small_suite import MINE, SmallSuite, build_small_suite, check_all_kept, write_files


def test_install_update_and_restore_keep_the_users_files_and_name_what_is_moved(suite: SmallSuite, gui: Path) -> None:
    before = read_tree(gui)
    assert suite.run(gui).returncode == 0
    installed = read_tree(gui)
    write_files(gui, MINE)
    again = suite.run(gui)
    assert again.returncode == 0, again.stderr
    tree = read_tree(gui)
    for path, content in MINE.items():
        place = path.replace("sd-scripts/", "sd-scripts.aside/", 1) if path in installed else path
        assert tree[place] == content
        assert (str(gui / path) in again.stderr) == (path in installed)
    assert {path: tree[path] for path in installed} == installed
    done = suite.run(gui, "--restore")
    assert done.returncode == 0, done.stderr
    tree = read_tree(gui)
    assert {path: text for path, text in tree.items() if not path.startswith("sd-scripts.aside")} == before
    check_all_kept(tree, MINE)
    for name in ("output", "logs", "library"):
        assert f"{gui}/sd-scripts/{name} is not as installed, or is yours" in done.stderr
    assert suite.run(gui, "--restore").returncode == 1


def test_an_update_removes_modules_that_the_suite_no_longer_has(suite: SmallSuite, gui: Path) -> None:
    write_files(suite.root, {"library/formats/old.py": "", "library/formats/edited.py": ""})
    assert suite.run(gui).returncode == 0
    (gui / "sd-scripts/library/formats/edited.py").write_text("my edit")
    for path in (suite.root / "library/formats").iterdir():
        path.unlink()
    assert suite.run(gui).returncode == 0
    assert not (gui / "sd-scripts/library/formats").exists()
    assert (gui / "sd-scripts.aside/library/formats/edited.py").read_text() == "my edit"


def test_an_update_puts_a_folder_in_place_of_a_module(suite: SmallSuite, gui: Path) -> None:
    """library/processes.py was a module of an earlier layout."""
    write_files(suite.root, {"library/processes.py": ""})
    assert suite.run(gui).returncode == 0
    (suite.root / "library/processes.py").unlink()
    write_files(suite.root, {"library/processes/__init__.py": ""})
    assert suite.run(gui).returncode == 0
    installed = gui / "sd-scripts/library"
    assert (installed / "processes/__init__.py").is_file() and not (installed / "processes.py").exists()
    assert suite.run(gui, "--restore").returncode == 0


@pytest.mark.parametrize("name", ["sd-scripts.original", "sd-scripts.journal.json", "sd-scripts.journal.part"])
def test_files_of_other_programs_beside_the_folder_are_not_touched(suite: SmallSuite, gui: Path, name: str) -> None:
    write_files(gui, {f"{name}/x" if name.endswith("original") else name: "mine"})
    before = read_tree(gui)
    refused = suite.run(gui)
    assert refused.returncode == 1 and name in refused.stderr and "rename" in refused.stderr
    assert read_tree(gui) == before


def test_a_link_in_the_folder_is_moved_and_not_followed(suite: SmallSuite, gui: Path, tmp_path: Path) -> None:
    assert suite.run(gui).returncode == 0
    own = tmp_path / "own_networks"
    (gui / "sd-scripts/networks").rename(own)
    (gui / "sd-scripts/networks").symlink_to(own)
    (own / "lora.py").write_text("my edit")
    assert suite.run(gui).returncode == 0
    assert (own / "lora.py").read_text() == "my edit" and not (gui / "sd-scripts/networks").is_symlink()
    assert (gui / "sd-scripts.aside/networks").is_symlink()


def test_check_names_what_another_program_changed(suite: SmallSuite, gui: Path) -> None:
    assert suite.run(gui, "--check").returncode == 1  # nothing is installed
    assert suite.run(gui).returncode == 0
    fine = suite.run(gui, "--check")
    assert fine.returncode == 0 and "lora-training-suite" in fine.stderr
    write_files(gui, {"sd-scripts/train_network.py": "theirs again", "sd-scripts/library/mine.py": ""})
    (gui / "sd-scripts/networks/lora.py").unlink()
    wrong = suite.run(gui, "--check")
    assert wrong.returncode == 1
    assert "changed: train_network.py; missing: networks/lora.py" in wrong.stderr and "mine.py" not in wrong.stderr


@pytest.mark.parametrize("folder", ["scripts/sd-scripts", "backend/sd_scripts", "scripts/stable"])
def test_the_folders_of_front_ends_are_known(suite: SmallSuite, tmp_path: Path, folder: str) -> None:
    write_files(tmp_path / "gui", {f"{folder}/train_network.py": "theirs", f"{folder}/.git/HEAD": "ref: x"})
    assert suite.run(tmp_path / "gui").returncode == 0
    assert (tmp_path / "gui" / folder / "train_network.py").read_text() == "print('ours')\n"
    assert (tmp_path / "gui" / folder / ".git/HEAD").exists()


MUSUBI = {
    "zimage_train_network.py": "class ZImageNetworkTrainer: pass\nif __name__ == '__main__': print('theirs')\n",
    "wan_train_network.py": "print('theirs')\n",
    "zimage_train.py": "from musubi_tuner.zimage_train_network import ZImageNetworkTrainer\nprint('fine-tuning')\n",
    "networks/lora_wan.py": "",
}


@pytest.mark.parametrize("folder", ["src/musubi_tuner", "musubi-tuner", "musubi-tuner/src/musubi_tuner"])
def test_musubi_tuner_gets_short_files_and_keeps_its_other_scripts(
    suite: SmallSuite, tmp_path: Path, folder: str
) -> None:
    gui = tmp_path / "gui"
    write_files(gui, {f"{folder}/{name}": text for name, text in MUSUBI.items()})
    before = read_tree(gui)
    assert suite.run(gui).returncode == 0
    assert start(gui / folder / "zimage_train_network.py", "--dit", "x") == "ours ['--dit', 'x']\n"
    assert start(gui / folder / "wan_train_network.py") == "theirs\n"
    if folder.startswith("musubi-tuner/src") or folder.startswith("src"):
        # Full fine-tuning imports the trainer's class from the script.
        assert start(gui / folder / "zimage_train.py", path=(gui / folder).parent) == "fine-tuning\n"
    assert (gui / folder / "zimage_cache_latents.py").exists()
    write_files(gui, {f"{folder}/notes.txt": "mine"})
    assert suite.run(gui, "--check").returncode == 0
    assert suite.run(gui, "--restore").returncode == 0
    assert read_tree(gui) == {**before, f"{folder}/notes.txt": "mine"}


@pytest.mark.parametrize("folder", ["src/musubi_tuner", "musubi-tuner/src/musubi_tuner"])
def test_scripts_in_musubis_own_folder_train_with_this_suite(suite: SmallSuite, tmp_path: Path, folder: str) -> None:
    """They import `main` of the package, whose other packages this suite's environment may lack."""
    gui = tmp_path / "gui"
    theirs = "import a_package_that_is_missing\nclass ZImageNetworkTrainer: pass\ndef main(): print('theirs')\n"
    root = "from musubi_tuner.zimage_train_network import main\nif __name__ == '__main__':\n    main()\n"
    write_files(gui, {f"{folder}/zimage_train_network.py": theirs, "zimage_train_network.py": root})
    assert suite.run(gui).returncode == 0
    assert start(gui / "zimage_train_network.py", "--dit", "x", path=(gui / folder).parent) == "ours ['--dit', 'x']\n"


ORIGINAL = """
print('executed')
from musubi_tuner.helpers import DOUBLE
class ZImageNetworkTrainer:
    pass
def main(): raise SystemExit('theirs')
if __name__ == '__main__': main()
"""
IMPORTING = """
import pickle
import musubi_tuner.zimage_train_network as script
from musubi_tuner.zimage_train_network import ZImageNetworkTrainer, DOUBLE
assert pickle.loads(pickle.dumps(ZImageNetworkTrainer)) is script.ZImageNetworkTrainer
print(DOUBLE, hasattr(script, 'absent'), hasattr(script, '__wrapped__'))
"""


def test_other_names_are_those_of_the_original_which_is_executed_once(suite: SmallSuite, tmp_path: Path) -> None:
    gui = tmp_path / "gui"
    helpers = "import musubi_tuner.zimage_train_network as script\nDOUBLE = 2\nprint(hasattr(script, 'DOUBLE'))\n"
    files = {
        "zimage_train_network.py": ORIGINAL,
        "helpers.py": helpers,
        "__init__.py": "",
        "zimage_train.py": IMPORTING,
    }
    write_files(gui, {f"src/musubi_tuner/{name}": text for name, text in files.items()})
    assert suite.run(gui).returncode == 0
    assert start(gui / "src/musubi_tuner/zimage_train.py", path=gui / "src") == "executed\nFalse\n2 False False\n"


def start(script: Path, *words: str, path: Path | None = None) -> str:
    """Start a script as a front end does, and return what it prints."""
    environment = {"PYTHONDONTWRITEBYTECODE": "1", **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, "-S", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", [*KEPT[:6], *KEPT[-5:]])
def test_scripts_that_this_suite_lacks_are_those_of_the_original(suite: SmallSuite, gui: Path, path: str) -> None:
    """They import the modules beside them and the original's `library`, in whatever folder they are."""
    text = "import sys\nimport beside\nfrom library.train_util import WHOSE\nprint(WHOSE, sys.argv[1:])\n"
    beside = Path("sd-scripts", path).parent / "beside.py"
    write_files(gui, {f"sd-scripts/{path}": text, beside.as_posix(): ""})
    assert suite.run(gui).returncode == 0
    # kohya_ss puts the scripts' folder on the path.
    printed = start(gui / "sd-scripts" / path, "images", path=gui / "sd-scripts")
    assert printed == "theirs ['images']\n"
    (gui / "sd-scripts.original" / path).unlink()
    missing = subprocess.run([sys.executable, str(gui / "sd-scripts" / path)], capture_output=True, text=True)
    assert missing.returncode == 1 and f"{path} needs the front end's own script" in missing.stderr
    assert "use another program" in missing.stderr and missing.stderr.count("\n") == 1


def test_the_commands_of_the_page_start_the_originals_or_refuse() -> None:
    """docs/tools.md names commands of sd-scripts that are not here."""
    table = (ROOT / "docs/tools.md").read_text("utf-8").split("## Commands of sd-scripts that are not here")[1]
    rows = [row for row in table.split("\n## ")[0].splitlines() if row.startswith("| `")]
    patterns = re.findall(r"`([^`]+\.py)`", " ".join(row.split("|")[1] for row in rows))
    names = {Path(path).name for path in list_replacements()}
    assert len(patterns) > 15
    assert all(fnmatch.filter(names, Path(pattern).name) for pattern in patterns)


def test_a_journal_with_paths_outside_its_folder_is_refused(suite: SmallSuite, gui: Path) -> None:
    assert suite.run(gui).returncode == 0
    journal = gui / "sd-scripts.journal.json"
    facts: dict[str, Any] = json.loads(journal.read_text())
    journal.write_text(json.dumps({**facts, "files": {"../mine": ["0"]}}))
    refused = suite.run(gui, "--restore")
    assert refused.returncode == 1 and "not a journal" in refused.stderr


def test_names_of_files_cannot_steer_the_terminal(suite: SmallSuite, gui: Path) -> None:
    assert suite.run(gui).returncode == 0
    write_files(gui, {"sd-scripts/\x1b[31mred 猫.txt": "mine"})
    done = suite.run(gui, "--restore")
    assert done.returncode == 0 and "/\\x1b[31mred 猫.txt" in done.stderr and "\x1b" not in done.stderr


def test_a_front_end_that_was_restored_by_hand_is_left_alone(suite: SmallSuite, gui: Path) -> None:
    before = read_tree(gui)
    assert suite.run(gui).returncode == 0
    for name in ("library", "networks", "finetune"):
        shutil.rmtree(gui / "sd-scripts" / name)
    shutil.copytree(gui / "sd-scripts.original", gui / "sd-scripts", dirs_exist_ok=True)
    shutil.rmtree(gui / "sd-scripts.original")
    tree = read_tree(gui)
    for words in ((), ("--restore",)):
        refused = suite.run(gui, *words)
        assert refused.returncode == 1 and "delete" in refused.stderr and "sd-scripts.journal.json" in refused.stderr
        assert read_tree(gui) == tree
    (gui / "sd-scripts.journal.json").unlink()
    assert before.items() <= read_tree(gui).items()
    assert suite.run(gui).returncode == 0


def test_a_file_where_files_are_moved_to_is_named(suite: SmallSuite, gui: Path) -> None:
    assert suite.run(gui).returncode == 0
    write_files(gui, {"sd-scripts.aside": "mine", "sd-scripts/output/cat.safetensors": "my LoRA"})
    refused = suite.run(gui, "--restore")
    assert refused.returncode == 1 and "sd-scripts.aside" in refused.stderr and "rename" in refused.stderr
    (gui / "sd-scripts.aside").rename(gui / "mine.txt")
    assert suite.run(gui, "--restore").returncode == 0
    assert (gui / "sd-scripts.aside/output/cat.safetensors").read_text() == "my LoRA"


def test_a_copy_of_this_suite_is_no_front_end(suite: SmallSuite, tmp_path: Path) -> None:
    """Its src/musubi_tuner is a folder that musubi-tuner has too."""
    clone = build_small_suite(tmp_path / "clone of mine")
    before = read_tree(clone.root)
    done = suite.run(clone.root)
    assert (
        done.returncode == 1
        and "clone of mine is a copy of this suite; give the folder of the front end" in done.stderr
    )
    assert read_tree(clone.root) == before


def test_the_docs_name_every_base_model_whose_commands_replace_those_of_musubi_tuner() -> None:
    prefixes = {name.partition("cache_latents")[0] for name in list_musubi() if "cache_latents" in name}
    titles = {spec.title for spec in list_specs() if spec.script.removesuffix("train_network.py") in prefixes}
    text = " ".join((ROOT / "docs" / "front_ends.md").read_text(encoding="utf-8").split())
    listed = re.search(r"commands of (.+?) are replaced", text)
    assert listed and titles == set(re.split(", | and ", listed[1]))


def test_the_installed_package_has_the_version_of_the_lock_files_of_front_ends() -> None:
    installed = toml.loads(bytes(list_suite()["pyproject.toml"]).decode())  # type: ignore[arg-type]
    ours = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert installed["project"].pop("version") == "0.0.0" and ours["project"].pop("dynamic") == ["version"]
    del ours["tool"]["setuptools"]["dynamic"]
    assert installed == ours


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_keeps_the_lock_file_of_a_front_end(tmp_path: Path) -> None:
    (tmp_path / "sd-scripts").mkdir()
    project = tmp_path / "sd-scripts" / "pyproject.toml"
    project.write_text('[project]\nname = "library"\nversion = "0.0.0"\nrequires-python = ">=3.10"\n')
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "gui"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = ["library"]\n'
        '[tool.uv.sources]\nlibrary = { path = "sd-scripts" }\n'
    )
    subprocess.run(["uv", "lock", "--offline"], cwd=tmp_path, check=True, capture_output=True)
    project.write_bytes(bytes(list_suite()["pyproject.toml"]))  # type: ignore[arg-type]
    done = subprocess.run(["uv", "lock", "--check", "--offline"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""tools/front_end.py killed at any file operation: the same command repeats it, --restore undoes it."""

from pathlib import Path

import pytest

from tests.front_end_kills import read_tree
from tests.unit.tools.small_suite import MINE, SmallSuite, check_all_kept, write_files

pytestmark = pytest.mark.slow


def clean_trees(suite: SmallSuite, gui: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the tree before and after an installation that is not interrupted; the folder is as before."""
    before = read_tree(gui)
    assert suite.run(gui).returncode == 0
    installed = read_tree(gui)
    assert suite.run(gui, "--restore").returncode == 0
    assert read_tree(gui) == before
    return before, installed


def test_an_installation_killed_anywhere_can_be_repeated_and_restored(suite: SmallSuite, gui: Path) -> None:
    before, installed = clean_trees(suite, gui)
    repeated = suite.kill_everywhere(gui, ["{}"], [["{}"], ["{}", "--check"], ["{}", "--restore"]])
    assert len(repeated) > 60
    for kill in repeated:
        assert kill["statuses"] == [0, 0, 0]
        assert kill["trees"] == [installed, installed, before]
    kills = suite.kill_everywhere(gui, ["{}"], [["{}", "--restore"]])
    assert all(kill["trees"] == [before] for kill in kills)
    # Only before the journal is in its place nothing is installed.
    statuses = [kill["statuses"] for kill in kills]
    assert statuses == sorted(statuses, reverse=True) and statuses.count([1]) < 6


def test_an_update_killed_anywhere_can_be_repeated_and_restored(suite: SmallSuite, gui: Path) -> None:
    write_files(suite.root, {"library/formats/old.py": "", "train_network.py": "print('an older one')"})
    before = read_tree(gui)
    assert suite.run(gui).returncode == 0
    write_files(gui, MINE)
    (suite.root / "library/formats/old.py").unlink()
    write_files(suite.root, {"train_network.py": "print('ours')\n", "library/formats/new.py": ""})
    kills = suite.kill_everywhere(gui, ["{}"], [["{}"], ["{}", "--check"], ["{}", "--restore"]])
    assert len(kills) > 10
    for kill in kills + suite.kill_everywhere(gui, ["{}"], [["{}", "--restore"]]):
        assert set(kill["statuses"]) == {0}
        for tree in kill["trees"]:
            check_all_kept(tree, MINE)
        assert without_aside(kill["trees"][-1]) == before
    assert all("sd-scripts/library/formats/old.py" not in kill["trees"][0] for kill in kills)


def test_a_restoration_killed_anywhere_can_be_repeated_or_taken_back(suite: SmallSuite, gui: Path) -> None:
    before, installed = clean_trees(suite, gui)
    assert suite.run(gui).returncode == 0
    write_files(gui, MINE)
    kills = suite.kill_everywhere(gui, ["{}", "--restore"], [["{}", "--restore"]])
    assert len(kills) > 40
    for kill in kills:
        assert kill["statuses"] == [0]
        check_all_kept(kill["trees"][0], MINE)
        assert without_aside(kill["trees"][0]) == before
    for kill in suite.kill_everywhere(gui, ["{}", "--restore"], [["{}"], ["{}", "--restore"]]):
        assert kill["statuses"] == [0, 0]
        assert installed.items() <= kill["trees"][0].items()
        assert without_aside(kill["trees"][1]) == before
        check_all_kept(kill["trees"][1], MINE)


def without_aside(tree: dict[str, str]) -> dict[str, str]:
    return {path: content for path, content in tree.items() if not path.startswith("sd-scripts.aside")}

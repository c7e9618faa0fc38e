"""An option, a key of a dataset file and a network argument are a declaration each, added to a copy of the project."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT

ADDED = {  # file -> the declaration that stands before a line of it, and that line
    "library/options/dataset.py": (
        '    mad_option: int = option(3, kind=whole(2, 9), usual=True)\n    """A made-up option."""\n',
        "    masked_loss: bool",
    ),
    "library/data/description/schema.py": (
        '    mad_key: float = key(SHARE, 0.5, "A made-up key.")\n',
        "    image_dir: str",
    ),
    "networks/core/arguments/common.py": (
        '    mad_argument: float = declare(PROBABILITY, 0.0, "A made-up argument.")\n',
        "    rank_dropout: float",
    ),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made_up") / "project"
    for name in ("library", "networks", "tools"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    for name, (line, following) in ADDED.items():
        text = (root / name).read_text(encoding="utf-8")
        assert text.count(f"\n{following}") == 1
        (root / name).write_text(text.replace(following, line + following), encoding="utf-8")
    return root


def run(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=project, capture_output=True, text=True)


def test_the_option_is_in_the_help_and_its_range_is_checked(project: Path) -> None:
    done = run(project, "train_network.py", "--help")
    assert "--mad_option int" in done.stdout and "A made-up option. (default: 3)" in done.stdout
    done = run(project, "train_network.py", "--mad_option", "1")
    assert done.returncode == 1 and "--mad_option is 1; use at least 2" in done.stderr


def test_the_key_is_checked_where_it_stands_and_a_misspelt_one_is_told_it(project: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from library.data.description.dataset_file import read_content; "
        "from library.options.dataset import DatasetOptions; "
        "print(read_content(DatasetOptions(dataset_config=Path(sys.argv[1])))[1][0].text)"
    )
    file = tmp_path / "data.toml"
    for line, problem in (
        ("mad_key = 2", "['mad_key'] is 2, but must be a number from 0 to 1"),
        ("mad_kye = 1", "is not a key (did you mean mad_key?)"),
    ):
        file.write_text(f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "x"\n{line}\n')
        assert problem in run(project, "-c", code, str(file)).stdout


def test_the_argument_is_parsed_checked_and_suggested(project: Path) -> None:
    code = (
        "import sys; from networks.core.registry.parsing import parse_arguments; "
        "print(parse_arguments(dict(word.split('=') for word in sys.argv[1:])).given)"
    )
    assert run(project, "-c", code, "mad_argument=0.5").stdout.strip() == "{'mad_argument': 0.5}"
    wrong = run(project, "-c", code, "mad_argument=1").stderr
    assert "--network_args mad_argument=1: expected a chance from 0 to below 1" in wrong
    assert "did you mean mad_argument? A made-up argument." in run(project, "-c", code, "mad_argumnet=1").stderr


def test_the_page_of_settings_has_all_three(project: Path) -> None:
    assert run(project, "tools/capabilities.py", "--docs", "reference.md").returncode == 0
    page = (project / "reference.md").read_text(encoding="utf-8")
    assert "| `--mad_option` | int (3) | A made-up option. |" in page
    assert "| `mad_key` | float (0.5) | A made-up key. |" in page
    assert "| `mad_argument` | float (0.0) | A made-up argument. |" in page


def test_the_json_has_all_three(project: Path) -> None:
    described: dict[str, Any] = json.loads(run(project, "tools/capabilities.py", "--json").stdout)
    (script,) = (script for script in described["scripts"] if script["name"] == "train_network.py")
    (option,) = (option for option in script["options"] if option["name"] == "mad_option")
    (key,) = (key for key in described["dataset_keys"] if key["name"] == "mad_key")
    (argument,) = (a for a in described["network_modules"][0]["arguments"] if a["name"] == "mad_argument")
    assert [one["help"] for one in (option, key, argument)] == [
        "A made-up option.",
        "A made-up key.",
        "A made-up argument.",
    ]
    assert (option["minimum"], option["maximum"], option["default"]) == (2, 9, 3)
    assert (key["minimum"], key["maximum"], key["default"]) == (0, 1, 0.5)
    assert (argument["minimum"], argument["exclusive_maximum"]) == (0, 1)

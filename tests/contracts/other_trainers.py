"""Configurations of other trainers' examples and documentation, as facts: keys and values, with their source.

Texts of prompts are replaced. `data/lines_of_other_trainers.json` says for each name where the trainer has it.
`python3 -m tests.contracts.other_trainers` writes the table of docs/come_over.md.
"""

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import toml
import yaml

from library.translation.reading import read_configuration
from library.translation.translating import Translation, translate

DATA = Path(__file__).parent / "data"
PAGE = Path(__file__).parents[2] / "docs" / "come_over.md"
START = "| configuration | script | equal | converted | missing |"
HOWS = ("equal", "converted", "missing")


@dataclass(frozen=True)
class Example:
    """A configuration in a public repository."""

    program: str
    repository: str
    commit: str
    path: str
    form: str  # yaml, json, toml or command
    content: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)  # other files, by path
    script: str = ""  # of a command
    launch: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the file as the trainer has it."""
        path = (
            folder
            / {"yaml": "config.yaml", "json": "config.json", "command": "train.sh", "toml": "config.toml"}[self.form]
        )
        for name, content in self.beside.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        forms = {"yaml": yaml.safe_dump, "json": json.dumps, "toml": toml.dumps}
        path.write_text(
            self.render_command() if self.form == "command" else forms[self.form](self.content), encoding="utf-8"
        )
        return path

    def render_command(self) -> str:
        launch = [f"--{name} {value}" for name, value in self.launch.items()]
        options = [" ".join((f"--{name}", *map(shlex.quote, words_of(value)))) for name, value in self.options.items()]
        return " \\\n  ".join([" ".join(["accelerate launch", *launch]), self.script, *options]) + "\n"

    def translate(self) -> Translation:
        with TemporaryDirectory() as folder:
            configuration = read_configuration(self.write(Path(folder)), "config")
        assert configuration is not None, self.path
        return translate(configuration)


def words_of(value: Any) -> list[str]:
    return [] if value is True else [str(item) for item in (value if isinstance(value, list) else [value])]


def list_examples() -> list[Example]:
    content = json.loads((DATA / "configurations_of_other_trainers.json").read_text(encoding="utf-8"))
    return [Example(**entry) for entry in content]


def find_example(repository: str, path: str) -> Example:
    return next(e for e in list_examples() if e.repository == repository and path in e.path)


def count(translation: Translation) -> Counter[str]:
    return Counter(outcome.how for outcome in translation.outcomes)


def render_table() -> Iterator[str]:
    """Yield the lines of the table, the sum last."""
    total = Counter[str]()
    yield START
    yield "|---|---|---|---|---|"
    for example in list_examples():
        translation = example.translate()
        counts = count(translation)
        total += counts
        numbers = " | ".join(str(counts[how]) for how in HOWS)
        yield f"| {example.repository}@{example.commit} `{example.path}` | `{translation.script}` | {numbers} |"
    share = (total["equal"] + total["converted"]) / sum(total[how] for how in HOWS)
    numbers = " | ".join(str(total[how]) for how in HOWS)
    yield f"| all: {share:.1%} of the settings that act are equal or converted | | {numbers} |"


def main() -> int:
    before = PAGE.read_text(encoding="utf-8").partition(START)[0]
    PAGE.write_text(before + "\n".join(render_table()) + "\n", encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

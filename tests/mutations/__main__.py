"""The mutation score: seeded faults, each tried in a copy of the project against the tests of its area.

    python -m tests.mutations [--areas buckets captions] [--limit 90] [--only TEXT] [--report score.txt]

`*.toml` list the areas, their tests, and the mutations, which may name tests of their own. A mutation is killed if one
of its tests fails, or if they do not end within the limit though the unchanged project's do. It survives if they all
pass, unless the table calls it `equivalent` and says why. Exits with 1 if a mutation survives, with 2 if one's text is
gone.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from library.options.config_file import tomllib

ROOT = Path(__file__).parents[2]
TABLES = sorted(Path(__file__).parent.glob("*.toml"))
HEAVY = ("torch", "diffusers", "transformers.models.clip", "peft", "hypothesis")  # imported once, not in every child
OWN = ("library", "networks", "tests", "tools")
PASSED, FAILED = 0, 1  # exit codes of pytest


@dataclass(frozen=True)
class Mutation:
    """A fault: `find` in `file` becomes `replace`, with this `effect` on what the program does."""

    file: str
    find: str
    replace: str
    effect: str
    equivalent: str = ""  # why no test can tell it from the unchanged program
    tests: tuple[str, ...] = ()  # those of the area are tried if it names none

    def apply(self, root: Path) -> str:
        """Write the mutation and return the text before it. Raises ValueError unless `find` occurs once."""
        path = root / self.file
        before = path.read_text(encoding="utf-8")
        if before.count(self.find) != 1:
            raise ValueError(f"{self.file} has {before.count(self.find)} times {self.find!r}")
        path.write_text(before.replace(self.find, self.replace), encoding="utf-8")
        return before


@dataclass(frozen=True)
class Area:
    """Some mutations and the tests that have to notice them."""

    name: str
    tests: tuple[str, ...]
    mutations: tuple[Mutation, ...]


def read_areas(names: list[str], only: str) -> list[Area]:
    """Read the tables, restricted to some areas, and to mutations whose file or effect contains `only`."""
    areas = []
    for name, table in (row for path in TABLES for row in tomllib.loads(path.read_text(encoding="utf-8")).items()):
        mutations = tuple(Mutation(**one) for one in table["mutations"])
        chosen = tuple(one for one in mutations if only in f"{one.file} {one.effect}")
        if chosen and (not names or name in names):
            areas.append(Area(name, tuple(table["tests"]), chosen))
    return areas


def copy_project(target: Path) -> None:
    """Copy what git knows or would add, as it is in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(root: Path, tests: tuple[str, ...], log: Path, limit: float) -> int | None:
    """Run some tests of a copy and return pytest's exit code; None if they did not end within `limit` seconds."""
    child: Any = multiprocessing.get_context("fork").Process(target=run_pytest, args=(root, tests, log))
    child.start()
    child.join(limit)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
        return None
    code: int = child.exitcode
    return code


def run_pytest(root: Path, tests: tuple[str, ...], log: Path) -> None:
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    sys.dont_write_bytecode = True  # a mutation and its undoing may have the same time and size
    sys.path[:] = [str(root), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
        del sys.modules[name]
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", f"--basetemp={root.parent / 'tests'}"]
    os._exit(int(pytest.main([*options, "-m", "not nightly", *tests])))


def try_mutation(mutation: Mutation, area: Area, root: Path, log: Path, limit: float) -> str:
    """Return what became of a mutation, and which test noticed it."""
    try:
        before = mutation.apply(root)
    except ValueError as error:
        return f"gone: {error}"
    try:
        code = run_tests(root, tuple(mutation.tests) or area.tests, log, limit)
    finally:
        (root / mutation.file).write_text(before, encoding="utf-8")
    if code == PASSED:
        return f"equivalent: {mutation.equivalent}" if mutation.equivalent else "survived"
    failed = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return f"killed by {'the limit' if code is None else (failed or ['a crash'])[0].split(' - ')[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--areas", nargs="*", default=[], help="only these areas of the tables")
    parser.add_argument("--only", default="", help="only mutations whose file or effect contains this")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for the tests of an area")
    parser.add_argument("--report", type=Path, help="also write the results to this file")
    given = parser.parse_args()
    for name in HEAVY:
        __import__(name)
    lines, counts = [], Counter[str]()

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if given.report:
            given.report.write_text("\n".join(lines) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root, log = Path(folder) / "project", Path(folder) / "log"
        copy_project(root)
        for area in read_areas(given.areas, given.only):
            start = monotonic()
            if run_tests(root, area.tests, log, given.limit) != PASSED:
                tell(
                    f"{area.name}: its tests fail or take over {given.limit:g} s without a mutation\n{log.read_text()}"
                )
                return 2
            tell(f"{area.name}: {len(area.mutations)} mutations, tests of {monotonic() - start:.0f} s")
            for mutation in area.mutations:
                outcome = try_mutation(mutation, area, root, log, given.limit)
                counts[outcome.split()[0].rstrip(":")] += 1
                tell(f"  {outcome}: {mutation.file}: {mutation.effect}")
    decided = counts["killed"] + counts["survived"]
    tell(f"{counts['killed']} of {decided} killed, {counts['survived']} survived, "
         f"{counts['equivalent']} equivalent, {counts['gone']} gone")  # fmt: skip
    return 2 if counts["gone"] else int(counts["survived"] > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Run the commands of a documentation page as a reader would type them."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.contracts.test_docs import ROOT, commands_of


def run_commands(page: Path, pattern: str, folder: Path, options: Sequence[str] = ()) -> str:
    """Run the Python commands of a page that match `pattern`, in order, in a folder with the project's configs/.

    `options` are added to trainings. Return the output.
    """
    if not (folder / "configs").is_symlink():
        (folder / "configs").symlink_to(ROOT / "configs")
    printed = ""
    for command in (command_line for command_line in commands_of(page) if re.search(pattern, command_line)):
        _, script, *words = shlex.split(command)
        start = (script,) if script == "-m" else (ROOT / script,)
        line = [sys.executable, *start, *words, *(options if "train" in script else ())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # where -m finds benchmarks/
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    return printed

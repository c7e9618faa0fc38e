"""Run the commands of a documentation page as a reader would type them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.contracts.test_docs_commands import ROOT, commands_of


def run_commands(page: Path, pattern: str, folder: Path, seed: int | None = None) -> str:
    """Run the Python commands of a page that match `pattern`, in order, in a folder with the project's configs/.

    `seed` replaces that of trainings, if given. Return their output.
    """
    if not (folder / "configs").is_symlink():
        (folder / "configs").symlink_to(ROOT / "configs")
    printed = ""
    for command in (command_line for command_line in commands_of(page) if re.search(pattern, command_line)):
        _, script, *words = shlex.split(command)
        if seed is not None and "train" in script:
            words[words.index("--seed") + 1] = str(seed)
        line = [sys.executable, ROOT / script, *words]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    return printed

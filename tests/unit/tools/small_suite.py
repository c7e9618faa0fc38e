"""A copy of this suite with a handful of files, which tools/front_end.py installs in milliseconds."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PYTHON = [sys.executable, "-I", "-S"]  # the standard library alone

LIBRARY = (
    "library/__init__.py", "library/base/__init__.py", "library/base/command_parser.py", "library/base/error_lines.py",
    "library/base/errors.py", "library/base/launcher.py", "library/base/terminal.py", "library/base/version.py",
    "library/environment/__init__.py", "library/environment/module_names.py",
    "library/environment/requirements.py",
)  # fmt: skip

THEIRS = {
    "sd-scripts/train_network.py": "print('theirs')\n",
    "sd-scripts/sdxl_train.py": "print('theirs')\n",
    "sd-scripts/library/__init__.py": "",  # equal to a file of ours in many versions
    "sd-scripts/library/train_util.py": "WHOSE = 'theirs'\n",
    "sd-scripts/networks/lora.py": "",
    "sd-scripts/venv/bin/python": "",
    "sd-scripts.new/mine.txt": "a folder of the user's",
}

MINE = {
    "sd-scripts/networks/lora.py": "my edit",
    "sd-scripts/library/mine.py": "my module",
    "sd-scripts/output/cat.safetensors": "my LoRA",
    "sd-scripts/output/cat.toml": "my config",
    "sd-scripts/logs/events": "my log",
    "sd-scripts/train_db.py": "my script",
}
"""Files that a user puts into the installed folder; the first one replaces a file of ours."""

MUSUBI_DOOR = """import sys
sys.path.insert(0, __file__.rsplit('/', 3)[0])
import networks.lora
print('ours', sys.argv[1:])
"""


@dataclass(frozen=True)
class SmallSuite:
    """The folder of the copy."""

    root: Path

    def run(self, *words: object) -> "subprocess.CompletedProcess[str]":
        """Run its tools/front_end.py on a Python without any package."""
        command = [*PYTHON, str(self.root / "tools" / "front_end.py"), *map(str, words)]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    def kill_everywhere(self, template: Path, killed: list[str], after: list[list[str]]) -> list[dict[str, Any]]:
        """Kill a command at each of its file operations, see tests/front_end_kills.py."""
        job = self.root.parent / "job.json"
        facts = {"suite": str(self.root), "template": str(template), "killed": killed, "after": after}
        job.write_text(json.dumps(facts))
        command = [*PYTHON, "-B", str(ROOT / "tests" / "front_end_kills.py"), str(job)]
        results = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=300).stdout)
        assert isinstance(results, list)
        return results


def build_small_suite(folder: Path) -> SmallSuite:
    """Copy the tool and write a few scripts and modules."""
    for name in ("tools/front_end.py", "tools/__init__.py", *LIBRARY):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(
        ROOT / "library" / "front_ends", folder / "library" / "front_ends", ignore=shutil.ignore_patterns("__pycache__")
    )
    files = {
        "train_network.py": "print('ours')\n",
        "zimage_train_network.py": "import sys, networks.lora\nprint('ours', sys.argv[1:])\n",
        "src/musubi_tuner/zimage_train_network.py": MUSUBI_DOOR,
        "src/musubi_tuner/zimage_cache_latents.py": "",
        "src/musubi_tuner/zimage_cache_text_encoder_outputs.py": "",
        "networks/lora.py": "",
        "requirements.txt": "torch>=2.6\ndiffusers\n",
    }
    write_files(folder, files)
    return SmallSuite(folder)


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Write files of these paths and contents."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def check_all_kept(tree: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise AssertionError unless each content is somewhere in the tree."""
    assert set(wanted.values()) <= set(tree.values())

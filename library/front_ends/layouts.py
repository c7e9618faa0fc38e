"""Which folders front ends start scripts in, and what is installed into each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.front_ends.journal import Place
from library.front_ends.place import Content

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (  # of sd-scripts
    "sd-scripts", "sd_scripts", "backend/sd_scripts", "scripts/stable", "scripts/dev", "scripts/sd-scripts",
)  # fmt: skip
MUSUBI_FOLDERS = ("src/musubi_tuner", "musubi-tuner", "musubi-tuner/src/musubi_tuner")
FILES = ("*.py", "*.txt", "pyproject.toml", "LICENSE", "README.md")
LOCKED_VERSION = "0.0.0"  # of the package `library` in kohya_ss' uv.lock
PACKAGES = ("configs", "docs", "finetune", "library", "networks", "src", "tools")

WHOLE = "trains every weight of a model, but this suite trains only adapters. Use {own}, or sd-scripts"
OTHER = "{what}, which this suite does not support. Use sd-scripts"
INVERSION = OTHER.format(what="trains a word of the text encoder (textual inversion)")
CONTROL = OTHER.format(what="trains a ControlNet")
PREFIXES = sorted(path.name.removesuffix("train_network.py") for path in ROOT.glob("*train_network.py"))
ABSENT = {
    **{f"{prefix}train.py": WHOLE.format(own=f"{prefix}train_network.py") for prefix in PREFIXES if prefix},
    **dict.fromkeys(("train_db.py", "fine_tune.py"), WHOLE.format(own="train_network.py")),
    **{f"{prefix}train_textual_inversion.py": INVERSION for prefix in PREFIXES},
    **{f"{prefix}train_control_net{ending}.py": CONTROL for prefix in PREFIXES for ending in ("", "_lllite")},
}
"""Scripts of sd-scripts that front ends start and this suite lacks, with the message that each one exits with."""
KEPT = (
    *(f"finetune/{name}.py" for name in ("make_captions", "make_captions_by_git", "tag_images_by_wd14_tagger")),
    "gen_img_diffusers.py",
    *(f"{prefix}{name}.py" for prefix in PREFIXES for name in ("gen_img", "minimal_inference")),
    *(f"tools/{name}.py" for name in ("canny", "detect_face_rotate", "latent_upscaler")),
    *("networks/lora_diffusers.py", "networks/merge_lora_old.py"),
)
"""Scripts of sd-scripts that this suite lacks and that train nothing: the front end's own are started."""

REFUSING = '''"""Written by tools/front_end.py."""

raise SystemExit({message!r})
'''

STARTING = '''"""Written by tools/front_end.py: starts the front end's own {path}."""

import os
import runpy
import sys
from pathlib import Path

scripts = Path(__file__).resolve().parents[{depth}]
original = scripts.with_name(scripts.name + ".original")
script = original / "{path}"
if not script.is_file():
    raise SystemExit(f"{path} needs the front end's own script, but {{script}} is missing; use another program")
# It imports the `library` of the front end's own scripts, also in processes that it starts.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(original), os.environ.get("PYTHONPATH")]))
sys.path[:1] = [str(script.parent), str(original)]
sys.argv[0] = str(script)
runpy.run_path(str(script), run_name="__main__")
'''

MUSUBI = '''"""Written by tools/front_end.py: starts {name} of lora-training-suite."""

import runpy
import sys
import types
from pathlib import Path

script = Path({script!r})
here = Path(__file__).resolve()
original = here.parent.with_name(here.parent.name + ".original") / "{name}"
modules = []


def main():  # scripts in musubi-tuner's own folder import it
    if not script.is_file():
        raise SystemExit(f"{{script}} is missing: run tools/front_end.py again from the suite's new folder")
    sys.path[:1] = [str(script.parent)]
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


def __getattr__(name):  # other scripts of musubi-tuner import classes and functions of the original
    # Every import asks for __path__ and the like, which must not execute the original: its packages may be missing.
    if (name.startswith("__") and name.endswith("__")) or not original.is_file():
        raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
    if not modules:
        module = types.ModuleType(__name__)
        module.__dict__.update(__file__=__file__, __package__=__package__, __spec__=__spec__, __loader__=__loader__)
        modules.append(module)  # first, as `import` does: the original may import a script that imports this one
        try:
            exec(compile(original.read_bytes(), str(original), "exec"), module.__dict__)
        except BaseException:
            modules.clear()
            raise
    return getattr(modules[0], name)


if __name__ == "__main__":
    main()
'''


@dataclass(frozen=True)
class Layout:
    """A folder of scripts in a front end."""

    folder: Path
    is_musubi: bool

    @property
    def place(self) -> Place:
        return Place(self.folder.resolve())

    def list_contents(self) -> Mapping[str, Content]:
        """Return what is installed: path in the folder -> content."""
        return list_musubi() if self.is_musubi else {**list_suite(), **list_replacements()}


def find_layouts(front_end: Path) -> list[Layout]:
    """Return the folders of scripts that a front end has, or had when this suite was installed."""
    layouts = [Layout(front_end / name, False) for name in FOLDERS]
    layouts += [Layout(front_end / name, True) for name in MUSUBI_FOLDERS]
    return [layout for layout in layouts if layout.folder.is_dir() or layout.place.journal.exists()]


def list_suite() -> dict[str, Content]:
    """Return the suite's own files. Torch is left out of the requirements, and the suite itself added.

    Front ends install torch for the user's GPU first, and `pip install -U` would replace it. LoRA_Easy imports
    `library` from its own folder, so the suite is installed too, as sd-scripts does.
    """
    found = [path for pattern in FILES for path in sorted(ROOT.glob(pattern))]
    found += [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*")) if "__pycache__" not in path.parts]
    contents: dict[str, Content] = {path.relative_to(ROOT).as_posix(): path for path in found if path.is_file()}
    requirements = (ROOT / "requirements.txt").read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in requirements if not line.startswith("torch>=") and line != "-e .\n"]
    project = contents.get("pyproject.toml")
    if isinstance(project, Path):
        contents["pyproject.toml"] = freeze_version(project.read_text("utf-8")).encode()
    return {**contents, "requirements.txt": "".join([*kept, "-e .\n"]).encode()}


def freeze_version(pyproject: str) -> str:
    """Return pyproject.toml with the version that sd-scripts' package has in the lock files of front ends; with another
    one, uv resolves their whole environment anew and rewrites the lock file, which is tracked."""
    fixed = pyproject.replace('dynamic = ["version"]', f'version = "{LOCKED_VERSION}"')
    return re.sub(r"\[tool\.setuptools\.dynamic\]\n.*?\n\n", "", fixed, flags=re.DOTALL)


def list_replacements() -> dict[str, Content]:
    """Return the files in place of scripts that this suite lacks: what trains refuses, the rest starts the original."""
    refusing = {name: REFUSING.format(message=f"{name} {sentence}") for name, sentence in ABSENT.items()}
    starting = {path: STARTING.format(path=path, depth=path.count("/")) for path in KEPT}
    return {path: text.encode() for path, text in {**refusing, **starting}.items()}


def list_musubi() -> dict[str, Content]:
    """Return short files that start this suite's scripts of the same names."""
    names = sorted(path.name for path in (ROOT / MUSUBI_FOLDERS[0]).glob("*.py"))
    return {name: MUSUBI.format(name=name, script=str(ROOT / MUSUBI_FOLDERS[0] / name)).encode() for name in names}

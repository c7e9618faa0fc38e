"""The options of each script, found by listing the packages next to this file; imports no torch."""

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from library.options.model import ModelFile
from library.options.train import TrainOptions
from library.options.training.concepts import ConceptOptions

ROOT = Path(__file__).parents[2]  # the folder of the scripts
BY_PROMPTS = "train_leco.py"  # endings of scripts that train concepts from prompts alone


@dataclass(frozen=True)
class Script:
    """A training script: the options class in its package's options.py, and hints for options of other scripts."""

    name: str  # "knots_train_network.py"
    options: type[TrainOptions]
    instead: Mapping[str, str]  # option of another script -> what to use here
    files: tuple[ModelFile, ...]  # where the base models and their parts are to be had
    parts: str  # options of the example in the help, besides the base model


def list_scripts() -> tuple[Script, ...]:
    """List the script of every package with options.py; a package without its own class has the common options."""
    packages = [p.name for p in pkgutil.iter_modules([str(Path(__file__).parent)]) if p.ispkg]
    names = [name for name in packages if (Path(__file__).parent / name / "options.py").is_file()]
    return tuple(script_of(name) for name in names)


def script_of(package: str) -> Script:
    module = importlib.import_module(f"library.architectures.{package}.options")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, TrainOptions)]
    script_classes = [cls for cls in classes if cls is not TrainOptions]
    name = getattr(module, "SCRIPT", f"{package}_train_network.py")
    # A module may import a class that it extends. Its own class is the last one, because names keep their order.
    options = script_classes[-1] if script_classes else TrainOptions
    hints, files, parts = getattr(module, "INSTEAD", {}), getattr(module, "FILES", ()), getattr(module, "PARTS", "")
    return Script(name, options, hints, files, parts)


@dataclass(frozen=True)
class OtherScripts:
    """Hints about options that this script lacks but that other scripts, earlier versions or other programs have."""

    name: str

    @cached_property
    def scripts(self) -> Mapping[str, tuple[frozenset[str], Mapping[str, str]]]:
        """Script -> (its options, its hints for others); computed only after a mistake."""
        return {script.name: (frozenset(script.options.defaults()), script.instead) for script in list_scripts()}

    def suggest_files(self, flags: Collection[str]) -> str:
        """Return where the files of these options are to be had, or ""."""
        script = next((script for script in list_scripts() if script.name == self.name), None)
        files = [file for file in script.files if f"--{file.flag}" in flags] if script else []
        return f"on the hub: {'; '.join(map(str, files))}" if files else ""

    def __call__(self, option: str) -> str:
        """Return the hint for an option; "" for one that this script has, or that is unknown."""
        if option in ConceptOptions.defaults() and not self.name.endswith(BY_PROMPTS):
            names = sorted((path.name for path in ROOT.glob(f"*{BY_PROMPTS}")), key=len)
            return f" (an option of {' and '.join(names)}, which train concepts from prompts alone)"
        from library.options.other_programs import explain_name  # only after a mistake

        has = [script for script, (options, _) in self.scripts.items() if option in options]
        if self.name in has:
            return ""
        own, replacements = self.scripts.get(self.name, (TrainOptions.defaults(), {}))
        instead = replacements.get(option) or ("" if has else explain_name(option, own))
        owners = describe_scripts(has, list(self.scripts)) if has else None
        hint = "; ".join(part for part in (owners, instead) if part)
        return f" ({hint})" if hint else ""


def describe_scripts(has: list[str], scripts: list[str]) -> str:
    """Name the scripts that have the option, or those that lack it if that list is shorter."""
    lack = [script for script in scripts if script not in has]
    if not lack:
        return "an option of every other script"
    shorter = has if len(has) <= len(lack) else lack
    listed = " and ".join(filter(None, (", ".join(shorter[:-1]), shorter[-1])))
    return f"an option of {listed}" if shorter is has else f"an option of every script but {listed}"

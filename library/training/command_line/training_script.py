"""Start of every training script in the root. Only they and tests import it."""

import argparse
import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from library.architectures.scripts import OtherScripts, script_of
from library.base.collector import freeze_imports
from library.base.launcher import prepare_for_torch
from library.training.command_line.cli import build_parser, check_training, check_words


@dataclass(frozen=True)
class TrainingScript:
    """The training script of a package in library/architectures."""

    package: str

    def setup_parser(self) -> argparse.ArgumentParser:
        """Return the parser with every option of the script. Front ends read it."""
        script = script_of(self.package)
        return build_parser(script.options, parts=script.parts, elsewhere=OtherScripts(script.name))

    def spec(self) -> Any:
        """Import the package and return the spec of its first base model."""
        return importlib.import_module(f"library.architectures.{self.package}.spec").SPECS[0]

    def run(self) -> int:
        """Train as the command line says, and return the exit status."""
        kind = script_of(self.package).options
        command_line = check_words(self.setup_parser(), partial(check_training, kind))
        if command_line.args.sweep:
            from library.training.command_line.sweeps import sweep_by_command

            return sweep_by_command(command_line, kind, partial(find_build, self.package))
        prepare_for_torch()
        with freeze_imports("scripts"):
            from library.training.command_line.main import main

            spec = self.spec()
        functions = {"latents": spec.latents, "objective": spec.objective}
        return main(command_line.parser, spec.options, spec.build, **functions, command_line=command_line)


class ScriptTrainer:
    """Base class of the trainers that sd-scripts' scripts have, for programs that import a script."""

    SCRIPT: ClassVar[TrainingScript]

    def __init_subclass__(cls, script: TrainingScript | None = None) -> None:
        if script is not None:  # a program's own subclass names none
            cls.SCRIPT = script

    def train(self, args: argparse.Namespace) -> None:
        """Train with the options in `args`. Raises UserError for errors that the user can fix."""
        from library.training.command_line.main import train_for_program

        spec = self.SCRIPT.spec()
        parser = self.SCRIPT.setup_parser()
        train_for_program(self, args, parser, spec.options, spec.build, spec.latents, spec.objective)


def find_build(package: str) -> Any:
    """Import a package, and return the function that builds the architecture of its base models."""
    return importlib.import_module(f"library.architectures.{package}.spec").SPECS[0].build

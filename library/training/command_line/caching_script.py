"""Start of the caching commands in src/musubi_tuner/. Only they, tools/cache_latents.py and tests import it."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from library.architectures.scripts import Script, script_of
from library.training.command_line.caching_options import (
    add_command_options,
    show_for_caching,
    warn_of_drawing,
    with_command_options,
)
from library.training.command_line.cli import check_words
from library.training.command_line.option_checks import check_data, check_paths
from library.training.command_line.training_script import TrainingScript


@dataclass(frozen=True)
class CachingScript:
    """musubi-tuner's two commands that encode a dataset for a training script."""

    package: str  # in library/architectures

    def setup_parser(self, encoded: str = "images") -> argparse.ArgumentParser:
        """Return the options of the training script and those of musubi-tuner's commands."""
        parser = add_command_options(TrainingScript(self.package).setup_parser())
        return show_for_caching(parser, encoded, script_of(self.package).parts)

    def setup_captions_parser(self) -> argparse.ArgumentParser:
        return self.setup_parser("captions")

    def cache_latents(self, argv: Sequence[str] | None = None) -> int:
        """Encode the images as the command line says. Return the exit status."""

        def encode(caching: Any, assembly: Any, options: Any) -> None:
            caching.cache_images(options, assembly.CODEC, assembly.open_vae(options))

        return self._run(argv, self.setup_parser(), ("cache_latents", "vae_batch_size"), encode)

    def cache_captions(self, argv: Sequence[str] | None = None) -> int:
        """Encode the captions as the command line says. Return the exit status."""

        def encode(caching: Any, assembly: Any, options: Any) -> None:
            caching.cache_captions(options, assembly.build_for_caching(options))

        names = ("cache_text_encoder_outputs", "text_encoder_batch_size")
        return self._run(argv, self.setup_captions_parser(), names, encode)

    def _run(
        self,
        argv: Sequence[str] | None,
        parser: argparse.ArgumentParser,
        names: tuple[str, str],
        encode: Callable[[Any, Any, Any], None],
    ) -> int:
        script = script_of(self.package)

        def check(args: argparse.Namespace) -> None:
            check_caching(script, args, with_command_options(args, *names))

        command_line = check_words(parser, check, argv)
        command_line.start_log()
        from library.training.command_line import caching

        def run(args: argparse.Namespace) -> None:
            caching.select_backend(args.device, has_cudnn=not args.disable_cudnn_backend)
            warn_of_drawing(args, parser)
            assembly = importlib.import_module(f"library.architectures.{self.package}.assembly")
            encode(caching, assembly, script.options.from_args(with_command_options(args, *names)))

        return caching.run_caching(command_line, run)


def check_caching(script: Script, args: argparse.Namespace, encoded: argparse.Namespace) -> None:
    """Raise UserError for options that a caching command refuses. `encoded` are those that it encodes with, under which
    a missing file of the base model is no error."""
    check_data(script.options.from_args(encoded))
    check_paths(script.options.from_args(args))

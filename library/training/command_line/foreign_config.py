"""--config_file of another trainer's file: shown as options of the script, and used with --yes."""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from library.base.errors import about
from library.base.launcher import launched_rank
from library.base.terminal import print_error, print_line
from library.training.command_line.recipes import IMAGES
from library.training.config_file import CONFIG_FLAG, Config, read_values
from library.translation.reading import read_configuration
from library.translation.translating import Translation, translate
from library.translation.writing import TranslatedFiles, check_files, describe, list_values, render_files, write_files

CONFIRM = "--yes trains with these options; tools/translate.py writes them to a file"


def read_foreign(
    typed: argparse.Namespace, script: str, actions: Mapping[str, argparse.Action], elsewhere: Callable[[str], str]
) -> Config:
    """Print the translation of another trainer's file in the main process, write its files to the output folder, and
    return its options.

    Exits with status 2 without --yes, before anything is written. Raises UserError for a file that is none, and for one
    of another script.
    """
    source = Path(typed.config_file)
    configuration = read_configuration(source, CONFIG_FLAG)
    if configuration is None:
        raise about(CONFIG_FLAG, source, cause="wrong value")(
            "is neither TOML with the name of an option a line nor the configuration of a trainer that is known here"
        )
    translation = without_images(translate(configuration, script), typed)
    if translation.script != script:
        raise about(CONFIG_FLAG, source, cause="does not fit")(f"is for {translation.script}, not for {script}")
    folder = typed.output_dir or translation.values.get("output_dir") or "."
    files = TranslatedFiles(Path(str(folder)) / f"{source.stem}.toml")
    texts = render_files(translation, source, files)
    is_main = launched_rank() == 0  # each process reads the file
    for line in describe(translation, source, texts) if is_main else ():
        print_line(line)
    if not typed.yes:
        if is_main:
            print_error(f"{CONFIG_FLAG} {source} is a file of {translation.title}; {CONFIRM}")
        sys.exit(2)
    check_files(files, CONFIG_FLAG, source)
    write_files(texts)
    warnings = list[str]()
    raw_values = {name: line.value for name, line in list_values(translation, files).items()}
    return Config(source, read_values(raw_values, str(source), actions, warnings, elsewhere), warnings)


def without_images(translation: Translation, typed: argparse.Namespace) -> Translation:
    """Leave out the images of the file if the command line names others."""
    names = ("dataset_config", *IMAGES)
    if not any(getattr(typed, name, None) for name in names):
        return translation
    options = {name: line for name, line in translation.options.items() if name not in names}
    return replace(translation, options=options, datasets=())

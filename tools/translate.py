"""Translate a configuration of another trainer into options and a dataset file for a script here.

Reads ai-toolkit's YAML, OneTrainer's, SimpleTuner's and kohya_ss' JSON, LoRA_Easy_Training_Scripts' TOML, TOML and
command lines of sd-scripts, musubi-tuner, fluxgym and diffusers' scripts (.sh, .bat or text), and the metadata of an
adapter. Nothing of it is run. Every line says where it comes from, and what has no equal is listed with what happens
instead.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.base.command_parser import make_parser
from library.base.errors import about
from library.base.terminal import print_line
from library.commands.command import command
from library.environment.requirements import quote
from library.translation.reading import read_configuration
from library.translation.translating import translate
from library.translation.writing import TranslatedFiles, check_files, describe, list_values, render_files, write_files

EXAMPLES = """\
  python3 tools/translate.py train_lora_24gb.yaml
  python3 tools/translate.py train.sh -o my_cat.toml
  python3 tools/translate.py my_cat.safetensors -o my_cat.toml"""


def translate_file(args: argparse.Namespace) -> None:
    """Write NAME.toml and the files beside it. Raises UserError for what is no configuration of a trainer."""
    files = TranslatedFiles(args.output or Path(f"{args.config.stem}.toml"))
    check_files(files, "--output", args.config)
    configuration = read_configuration(args.config, "config")
    if configuration is None:
        raise about("config", args.config, cause="wrong value")(
            "is no configuration of ai-toolkit, OneTrainer, SimpleTuner, musubi-tuner, sd-scripts, kohya_ss, diffusers"
        )
    translation = translate(configuration)
    texts = render_files(translation, args.config, files)
    write_files(texts)
    for line in describe(translation, args.config, texts):
        print_line(line)
    if translation.script:
        print_line(f"\nTo train: python3 {translation.script} --config_file {quote(str(files.config))}")
    elif not list_values(translation, files):
        print_line("\nNothing in it is an option here.")


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the file of the other trainer")
    parser.add_argument("-o", "--output", type=Path, metavar="NAME.toml", help="file to write (default: CONFIG's name)")
    return parser


main = command(setup_parser, translate_file)

if __name__ == "__main__":
    sys.exit(main())

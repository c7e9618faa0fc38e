"""Change concepts of any base model by prompts alone (LECO); the base model is recognised from its file."""

import argparse
from functools import partial

from library import train_util as train_util
from library.architectures.scripts import OtherScripts, list_scripts
from library.base.collector import freeze_imports
from library.base.launcher import prepare_for_torch
from library.options.leco import LecoOptions, leco_options
from library.options.model import BASE_FLAG
from library.training.command_line.cli import build_parser, build_parser_of_prompts
from library.training.command_line.prompt_words import check_common_words

ELSEWHERE = OtherScripts("train_leco.py")


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser with the options for Stable Diffusion 1.x and 2.x. Front ends read it. Other models have
    more options."""
    return build_parser_of_prompts(LecoOptions, ELSEWHERE)


if __name__ == "__main__":
    check_common_words(ELSEWHERE, [build_parser(leco_options(script.options)) for script in list_scripts()])
    prepare_for_torch()
    with freeze_imports("scripts"):
        from library.architectures.specs import recognise_base_model
        from library.training.command_line.prompt_training import main_by_prompts

    raise SystemExit(main_by_prompts(partial(recognise_base_model, BASE_FLAG), ELSEWHERE))

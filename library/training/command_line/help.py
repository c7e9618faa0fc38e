"""Short and long help, and one-line errors for wrong options."""

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from library.base.errors import UserError, error_in
from library.base.terminal import escape_text, print_line
from library.base.version import VERSION
from library.training.reporting.error_fields import print_json_error

EVERYTHING = "--help_all"
EXAMPLES = """\
Train a LoRA-family adapter. Three commands to begin with:

  a first training, of the images that a dataset file names
    python3 %(prog)s --pretrained_model_name_or_path model.safetensors \\
{parts}      --dataset_config dataset.toml --output_dir output --output_name my_cat \\
      --network_module networks.lora --network_dim 16 --network_alpha 8 \\
      --learning_rate 1e-4 --max_train_epochs 10 --mixed_precision bf16 \\
      --gradient_checkpointing --cache_latents_to_disk

  the same options kept in a file, a trial of the largest batch that writes nothing
    python3 %(prog)s --config_file train.toml --dry_run

  a long training that the same command goes on with after any stop
    python3 %(prog)s --config_file train.toml --save_every_n_epochs 1 \\
      --save_state --autoresume

--help shows the usual options, --help_all all of them, --version the version; docs/ explains the options."""


EXAMPLES_OF_PROMPTS = """\
Change concepts of a model from prompts alone, without images (LECO). Two commands to begin with:

  a first training; prompts.toml has [[prompts]] with target = "van gogh" and action = "erase"
    python3 %(prog)s --pretrained_model_name_or_path model.safetensors \\
{parts}      --prompts_file prompts.toml --output_dir output --output_name no_van_gogh \\
      --network_dim 8 --network_alpha 4 --learning_rate 1e-4 --max_train_steps 500 \\
      --mixed_precision bf16 --gradient_checkpointing

  the same options kept in a file, as a training that the same command goes on with after any stop
    python3 %(prog)s --config_file train.toml --save_every_n_steps 100 \\
      --save_state --autoresume

--help shows the usual options, --help_all all of them, --version the version; docs/train_leco.md explains them."""


# What a first command line sets, in the order in which people decide it.
FIRST = (
    "pretrained_model_name_or_path", "dataset_config", "train_data_dir", "prompts_file", "resolution",
    "output_dir", "output_name", "network_module", "network_dim", "network_alpha", "learning_rate",
    "max_train_epochs", "max_train_steps", "train_batch_size", "mixed_precision", "fit", "recipe", "config_file",
)  # fmt: skip


class FilteredHelp(
    argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter, argparse.MetavarTypeHelpFormatter
):
    """The options in `usual`, or all, with the type of the value, the help, and the default where that says something.

    Options in `left_out` are not shown; groups of which none is, are left out too.
    """

    def __init__(self, left_out: frozenset[str], usual: frozenset[str] | None, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left_out, self.usual, self.shown = left_out, usual, set[str]()

    def add_argument(self, action: argparse.Action) -> None:
        is_usual = self.usual is None or action.dest == "help" or action.dest in self.usual
        if is_usual and action.dest not in self.left_out and action.dest not in self.shown:
            self.shown.add(action.dest)
            super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "", argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class TrainingParser(argparse.ArgumentParser):
    """A parser that filters its help while printing, so that programs that inspect the parser find every option.

    The long help and the version are not options, so abbreviations of --help stay unambiguous and programs that list
    the options do not show them.
    """

    raises_errors = False  # as UserError, for a program that reads words in place of a person

    def __init__(
        self,
        usual: frozenset[str],
        parts: str = "",
        elsewhere: Callable[[str], str] = lambda option: "",
        examples: str = EXAMPLES,
        left_out: frozenset[str] = frozenset(),
        paths: frozenset[str] = frozenset(),
        follows: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    ) -> None:
        """Options in `left_out` have no effect here; they are accepted and hidden. Those in `paths` name files;
        `follows` is as in `Declared`."""
        self.elsewhere, self._left_out, self.paths, self.follows = elsewhere, left_out, paths, follows
        self._first = "What most trainings set"
        super().__init__(
            usage="%(prog)s [options]",
            description=examples.format(parts=f"      {parts} \\\n" if parts else ""),
            formatter_class=functools.partial(FilteredHelp, left_out, usual),
        )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse like argparse; the flags of the long help and the version print and exit."""
        words = sys.argv[1:] if args is None else args
        if "--version" in words:
            print_line(f"{self.prog} {VERSION}")
            self.exit(0)
        if EVERYTHING in words:
            full = copy.copy(self)
            full.formatter_class = functools.partial(FilteredHelp, self._left_out, None)
            full.print_help()
            self.exit(0)
        self.exit_on_error = False  # argparse would say of an error only what its text is
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            flag = error.argument_name and error.argument_name.partition("/")[0]
            self.refuse(error_in(flag, cause="wrong value")(str(error)), words)
        finally:
            self.exit_on_error = True

    def show_only(self, usual: frozenset[str], description: str, first: str) -> None:
        """Let --help show these options under another description; `first` is the heading of those that come first."""
        self.formatter_class = functools.partial(FilteredHelp, self._left_out, usual)
        self.description, self._first = description, first

    def format_help(self) -> str:
        """Format the help; the options that most trainings set come first, and not again in their groups."""
        actions = {action.dest: action for action in self._actions}
        first = argparse.ArgumentParser(add_help=False).add_argument_group(self._first)
        first._group_actions = [actions[name] for name in FIRST if name in actions]
        ordered = copy.copy(self)
        ordered._action_groups = [first, *self._action_groups]
        return super(TrainingParser, ordered).format_help()

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Return the options that an abbreviation may mean.

        If several match, options of our own are excluded; if the name is one of another script or program, none
        matches.
        """
        matches: list[Any] = super()._get_option_tuples(option_string)  # type: ignore[misc]
        # Front ends and guides abbreviate options of sd-scripts, which options of our own must not make ambiguous.
        if len(matches) > 1:
            matches = self._prefer_known(matches)
        name = option_string.partition("=")[0].lstrip("-")
        return [] if len(matches) > 1 and self.elsewhere(name) else matches

    def _prefer_known(self, matches: list[Any]) -> list[Any]:
        """Return the options of sd-scripts, or else of musubi-tuner, or else all."""
        from library.options.other_programs import ABBREVIATED, MUSUBI_TUNER, SD_SCRIPTS, has_option

        script = getattr(self.elsewhere, "name", self.prog)
        for program, version in ((SD_SCRIPTS, ABBREVIATED), (MUSUBI_TUNER, "")):
            matches = [m for m in matches if has_option(program, script, m[0].dest, version)] or matches
        return matches

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # 75 is not a choice of the caption length, but sd-scripts' documentation calls it the default.
        if (action.dest, value) != ("max_token_length", 75):
            super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        self.refuse(error_in(cause="wrong value")(message), sys.argv[1:])

    def refuse(self, error: UserError, words: Sequence[str], text: str | None = None) -> NoReturn:
        """Print a one-line error without the usage, or `text` in its place, and exit with status 2.

        The command line `words` may ask for the error as JSON too. Raises the error if the parser `raises_errors`.
        """
        if self.raises_errors:
            raise error
        self._print_message(f"{self.prog}: error: {escape_text(text or str(error))}; see --help\n", sys.stderr)
        print_json_error(error, words)
        self.exit(2)

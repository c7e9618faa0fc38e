"""Train one after another, or one on each GPU: `add` trainings, and `run` them over night. `stop` lets them save, and
after a crash they resume."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

from library.architectures.scripts import BY_PROMPTS, OtherScripts, Script, list_scripts
from library.base.command_parser import CommandParser, add_errors_json, make_parser
from library.base.errors import error_in
from library.base.terminal import print_line
from library.commands.exit_status import act
from library.options.leco import LecoOptions, leco_options
from library.options.train import TrainOptions
from library.training.command_line.cli import build_parser, build_parser_of_prompts
from library.training.run_queue.adding import make_job
from library.training.run_queue.folder import Queue
from library.training.run_queue.progress import format_queue
from library.training.run_queue.runner import run_queue
from library.training.run_queue.stopping import remove_job, stop_queue
from library.training.saving.run_lock import unwritable
from tools.start import split_at_dashes

FOLDER = Path("output") / "queue"
EXAMPLES = """\
  python3 tools/run_queue.py add cat.toml --script train_network.py
  python3 tools/run_queue.py add cat.toml --script train_network.py -- --network_dim 8 --output_name cat_8
  python3 tools/run_queue.py run --gpus 0,1
  python3 tools/run_queue.py list"""
logger = logging.getLogger(__name__)


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser of the words before `--`."""
    common = CommandParser(add_help=False)
    common.add_argument("--folder", type=Path, default=FOLDER, help="folder of the queue (default: %(default)s)")
    add_errors_json(common)
    parser = make_parser(__doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="add | list | run | remove | stop")
    add = commands.add_parser("add", parents=[common], help="add a training: `add NAME.toml -- MORE OPTIONS`")
    add.add_argument("config", type=Path, metavar="NAME.toml", help="options of the training, of which a copy is kept")
    add.add_argument("--script", help="training script; unset: that of the file's recipe, or of its first comment")
    commands.add_parser("list", parents=[common], help="show all jobs, with step, loss and time left")
    run = commands.add_parser("run", parents=[common], help="train until no job waits")
    run.add_argument("--gpus", type=parse_gpus, default=("",), help="GPUs such as 0,1, with one training on each")
    remove = commands.add_parser("remove", parents=[common], help="remove jobs; one that is training saves first")
    remove.add_argument("jobs", type=int, nargs="+", metavar="JOB", help="numbers, as `list` shows them")
    stop = commands.add_parser("stop", parents=[common], help="let all trainings save and end; `run` resumes them")
    for ends in (remove, stop):
        ends.add_argument("--now", action="store_true", help="end trainings at once, without saving")
    return parser


def parse_gpus(text: str) -> tuple[str, ...]:
    """Parse numbers or UUIDs of GPUs. Raises ArgumentTypeError for an empty or repeated one."""
    gpus = tuple(gpu.strip() for gpu in text.split(","))
    if not all(gpus) or len({*gpus}) < len(gpus):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different GPUs, such as 0,1")
    return gpus


def read_script(
    scripts: Sequence[Script], name: str, words: Sequence[str]
) -> tuple[argparse.ArgumentParser, type[TrainOptions]]:
    """Return the parser and the options of a training script, of train_leco.py those of the first base model that has
    all of the words."""
    elsewhere = OtherScripts(name)
    own = next((script.options for script in scripts if script.name == name), None)
    if own is not None:
        return build_parser(own, elsewhere=elsewhere), own
    # Both scripts of a base model begin with its name.
    start = name.removesuffix(BY_PROMPTS)
    kinds: list[type[TrainOptions]] = [LecoOptions] if not start else []
    kinds += [leco_options(script.options) for script in scripts if script.name.startswith(start)]
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    parsers = [(build_parser_of_prompts(kind, elsewhere), kind) for kind in kinds]
    return next(((parser, kind) for parser, kind in parsers if flags <= {*parser._option_string_actions}), parsers[0])


def list_script_names(scripts: Sequence[Script]) -> list[str]:
    """Return the names of all training scripts."""
    root = Path(__file__).resolve().parents[1]
    return [*(script.name for script in scripts), *(path.name for path in sorted(root.glob(f"*{BY_PROMPTS}")))]


def add(queue: Queue, args: argparse.Namespace, words: Sequence[str]) -> None:
    scripts = list_scripts()
    job = make_job(args.config, args.script, words, list_script_names(scripts), partial(read_script, scripts))
    queue.create()
    ticket = queue.add(job)
    logger.info("job %d: %s, trained by %s; `run` starts the queue", ticket.number, job.output, job.script)


def execute(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run a command. Return the exit status. Raises UserError naming --folder if the system refuses a file in it."""
    queue = Queue(Path(os.path.abspath(args.folder)))
    try:
        return run_command(queue, args, words)
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(queue.folder):
            raise
        raise unwritable("--folder", queue.folder, error) from error


def run_command(queue: Queue, args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run a command of a queue. Return the exit status."""
    if args.command == "add":
        add(queue, args, words)
        return 0
    if words:
        raise error_in(args.command)(f"`{args.command}` takes no options after --: {' '.join(words)}")
    queue.require()
    if args.command == "run":
        queue.create()
        return run_queue(queue, args.gpus)
    if args.command == "list":
        print_line("\n".join(format_queue(queue)))
    elif args.command == "stop":
        stop_queue(queue, args.now)
    for number in args.jobs if args.command == "remove" else ():
        remove_job(queue, number, args.now)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    words, more = split_at_dashes(list(sys.argv[1:] if argv is None else argv))
    return act(partial(execute, setup_parser().parse_args(words), more), words)


if __name__ == "__main__":
    sys.exit(main())

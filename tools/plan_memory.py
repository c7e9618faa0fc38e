"""Predict memory and time of a training: of usual trainings of every model, or with its options of one. Needs no GPU.

With --script and a training's options only the headers of the checkpoint are read. Without, the counts kept in
library/memory/planner/models.json are used, and no package and no file of a model is needed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

NEEDS_PACKAGES = False  # read by library/environment/requirements.py
if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.base.command_parser import make_parser  # noqa: E402
from library.base.error_lines import fail  # noqa: E402
from library.base.errors import UserError, error_in  # noqa: E402
from library.base.formatting import columns  # noqa: E402
from library.base.terminal import ERRORS_JSON, print_line  # noqa: E402
from library.environment.requirements import describe_missing, list_missing  # noqa: E402
from library.memory.planner.gpus import GIB, SYSTEMS, Gpu, find_system, parse_cards, parse_size  # noqa: E402
from library.memory.planner.known import load_models, plan, rows  # noqa: E402

SYSTEM_BYTES = 6 * GIB  # of main memory: a desktop, and Python with the libraries [derived]
EXAMPLES = """\
  python3 tools/plan_memory.py --cards "RTX 3060 12GB"
  python3 tools/plan_memory.py --cards 4090,16GB --main_memory 64GB
  python3 tools/plan_memory.py --script flux_train_network.py --cards 8GB,12GB,16GB,24GB \\
    --pretrained_model_name_or_path flux1-dev.safetensors --clip_l clip_l.safetensors --t5xxl t5xxl.safetensors \\
    --ae ae.safetensors --network_module networks.lora_flux --network_dim 16 --mixed_precision bf16 \\
    --cache_latents --cache_text_encoder_outputs --resolution 1024"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES, allow_abbrev=False)
    parser.add_argument("--script", help="training script; all other options are then those of the training")
    parser.add_argument(
        "--cards", default="8GB,12GB,16GB,24GB", help='names or memory of GPUs, "3060 12GB,4090" (default: %(default)s)'
    )
    parser.add_argument(
        "--main_memory", default="32GB", help="main memory of the machine, for offloaded weights (default: %(default)s)"
    )
    parser.add_argument(
        "--system",
        choices=SYSTEMS,
        default=find_system(),
        help="system of the machine; without Triton, as on Windows "
        "without triton-windows, a step needs more memory and time (default: this one, %(default)s)",
    )
    return parser


def show_models(gpus: Sequence[Gpu], system: str) -> None:
    """Print a table of all models for each GPU."""
    models = load_models()
    for gpu in gpus:
        size = "" if gpu.nominal_bytes is None else f" of {gpu.nominal_bytes / GIB:g} GB"
        print_line(f"\n{gpu.name}, {gpu.memory_bytes / GIB:.1f} GiB free{size}: LoRA of rank 16, batch 1, predicted")
        print_line("\n".join(columns([*rows([plan(model, gpu, system) for model in models])])))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0 success, 1 user error."""
    args, training = setup_parser().parse_known_args(argv)
    try:
        main_memory = parse_size("--main_memory", args.main_memory).num_bytes - SYSTEM_BYTES
        named = [gpu for card in args.cards.split(",") for gpu in parse_cards(card)]
        gpus = [replace(gpu, main_memory_bytes=main_memory) for gpu in named]
        if args.script is None:
            if training:
                raise error_in("--script", cause="needs")(
                    f"{training[0]} belongs to a training", "add --script, such as flux_train_network.py"
                )
            show_models(gpus, args.system)
            return 0
        if missing := list_missing():
            raise UserError(describe_missing(missing))
    except UserError as error:
        return fail(error, argv)
    from library.commands.counted_plan import plan as plan_counted
    from library.commands.exit_status import act

    training += [ERRORS_JSON] * args.errors_json
    return act(lambda: plan_counted(args.script, training, gpus, args.system), argv)


if __name__ == "__main__":
    sys.exit(main())

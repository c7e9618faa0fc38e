"""Predict what a training needs and how long a step takes, on any machine: from the options and the headers of the
checkpoint, without a card and without reading a weight."""

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from library.data.description.schema import load_dataset_config, parse_numbers  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.memory.planner.cards import parse_size, typical_card  # noqa: E402
from library.options.train import TrainOptions  # noqa: E402
from library.protocols import Architecture  # noqa: E402
from library.training.command_line.checks import check_network, check_precision  # noqa: E402
from library.training.command_line.cli import parse  # noqa: E402
from library.training.planning.counting import BatchShape, CountedRun, count_run  # noqa: E402
from library.training.planning.fit import fit_to  # noqa: E402
from library.training.run.rehearsal import quiet  # noqa: E402
from tools.command import make_parser, run  # noqa: E402

CARD = torch.device("cuda")  # whose rules count; none need be there
EXAMPLES = """\
  python3 tools/plan_memory.py --script flux_train_network.py --cards 8GB,12GB,16GB,24GB \\
    --pretrained_model_name_or_path flux1-dev.safetensors --clip_l clip_l.safetensors --t5xxl t5xxl.safetensors \\
    --ae ae.safetensors --network_module networks.lora_flux --network_dim 16 --mixed_precision bf16 \\
    --cache_latents --cache_text_encoder_outputs --resolution 1024"""


@dataclass(frozen=True)
class Script:
    """Where a training script has its options and its base model."""

    package: str  # of library.architectures
    options: str  # module and class

    def options_type(self) -> type[TrainOptions]:
        module, _, name = self.options.rpartition(".")
        found: type[TrainOptions] = getattr(importlib.import_module(module), name)
        return found

    def build(self) -> Callable[[Any], Architecture]:
        found: Callable[[Any], Architecture] = importlib.import_module(
            f"library.architectures.{self.package}.assembly"
        ).build
        return found


SCRIPTS: Mapping[str, Script] = {
    "train_network": Script("sd", "library.options.train.TrainOptions"),
    "sdxl_train_network": Script("sdxl", "library.architectures.sdxl.options.SdxlOptions"),
    "sd3_train_network": Script("sd3", "library.architectures.sd3.options.Sd3Options"),
    "flux_train_network": Script("flux", "library.architectures.flux.options.FluxOptions"),
    "lumina_train_network": Script("lumina", "library.architectures.lumina.options.LuminaOptions"),
    "anima_train_network": Script("anima", "library.architectures.anima.options.AnimaOptions"),
    "hunyuan_image_train_network": Script(
        "hunyuan_image", "library.architectures.hunyuan_image.options.HunyuanImageOptions"
    ),
}


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.allow_abbrev = False  # an abbreviation is one of an option of the training
    parser.add_argument("--script", required=True, help="training script, such as flux_train_network.py")
    parser.add_argument(
        "--cards", default="8GB,12GB,16GB,24GB", help="memory of the cards, by commas (default: %(default)s)"
    )
    parser.epilog = f"all other options are those of the training.\n\n{parser.epilog}"
    return parser


def count(name: str, arguments: Sequence[str]) -> tuple[TrainOptions, Architecture, BatchShape, CountedRun]:
    """Options, base model, largest batch and count of a training that has this script and these options.

    Raises UserError for whatever the options are wrong in.
    """
    script = SCRIPTS.get(name.removesuffix(".py"))
    if script is None:
        raise UserError(f"--script {name} is no training script; use one of {', '.join(f'{n}.py' for n in SCRIPTS)}")
    parser = importlib.import_module(name.removesuffix(".py")).setup_parser()
    options = script.options_type().from_args(parse(parser, arguments))
    if not options.network.network_module:
        raise UserError("--network_module is not set; networks.lora trains a LoRA")
    check_precision(options)
    check_network(options)
    batch = described_batch(options)
    with quiet():  # the run itself will say it
        arch = script.build()(options)
        return options, arch, batch, count_run(options, arch, batch, CARD)


def described_batch(options: TrainOptions) -> BatchShape:
    """The largest batch by --resolution and --train_batch_size, or by the --dataset_config; pictures need not be
    there. Buckets have as many pixels or a little fewer."""
    data = options.dataset
    if data.dataset_config is None:
        if not data.resolution:
            raise UserError("--resolution is not set; give the training size with it, such as 512 or 512,768")
        sides = parse_numbers("--resolution", data.resolution, int, (1, 2), "512 or 768,512")
        return BatchShape(data.train_batch_size, sides[0], sides[-1])
    shapes = [BatchShape(d.batch_size, *d.resolution) for d in load_dataset_config(options).datasets]
    return max(shapes, key=lambda shape: shape.num_pixels)


def plan(args: argparse.Namespace, training: Sequence[str]) -> None:
    """Print a table for each card."""
    sizes = [parse_size("--cards", text) for text in args.cards.split(",")]
    options, arch, batch, counted = count(args.script, training)
    print(f"{arch.name}, {batch.count} x {batch.width}x{batch.height}, {options.network.network_module}")
    for size in sizes:
        print()
        for line in fit_to(counted, options, typical_card(size)).lines():
            print(line)


def main(argv: Sequence[str] | None = None) -> int:
    parser = setup_parser()
    own, training = parser.parse_known_args(argv)
    return run(parser, partial(plan, training=training), ["--script", own.script, "--cards", own.cards])


if __name__ == "__main__":
    raise SystemExit(main())

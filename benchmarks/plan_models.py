"""Predicted memory and time of all base models on common cards, as the tables of docs/memory.md.

Nothing is measured and no weight is read: the base models are files with nothing but a header. Takes about two minutes.

    python benchmarks/plan_models.py
    python benchmarks/plan_models.py --models FLUX.1 --formats bf16 int8 nf4
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from library.memory.planner.gpus import parse_size, typical_gpu  # noqa: E402
from library.memory.planner.table import in_gib  # noqa: E402
from library.training.planning.fit import Fit, fit_to  # noqa: E402
from library.training.planning.settings import describe  # noqa: E402
from tests.contracts.header_only import FULL_SIZE, FullSize  # noqa: E402
from tools.plan_memory import count  # noqa: E402

RANK = 16
CACHES_TEXT = {"train_network"}  # that cannot


def arguments_for(model: FullSize, folder: Path) -> list[str]:
    """A usual training: batch 1, rank 16, bf16, the denoiser alone, everything cached."""
    caches = [] if model.script in CACHES_TEXT else ["--cache_text_encoder_outputs"]
    return [
        *model.build(folder), "--network_module", model.module, "--network_dim", str(RANK), "--mixed_precision", "bf16",
        "--network_train_unet_only", "--cache_latents", "--resolution", str(model.side), *caches,
    ]  # fmt: skip


def cell(found: Fit) -> str:
    """Return the choice for a GPU, or the least memory that is needed."""
    chosen = found.choice.chosen
    if chosen is None:
        return f"needs {in_gib(found.choice.least.device_bytes)}"
    way = describe(replace(chosen.way, weight_format=None))  # the line says it
    return f"{in_gib(chosen.device_bytes)}, {chosen.seconds:.2f} s: `{way}`"


def rows(names: Sequence[str], formats: Sequence[str], cards: Sequence[str]) -> Iterator[str]:
    """A table of markdown: a line for each model and format of its weights, a column for each card."""
    yield f"| base model | {' | '.join(cards)} |"
    yield f"|---|{'---|' * len(cards)}"
    for name in names:
        model = FULL_SIZE[name]
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            options, _, _, counted = count(model.script, arguments_for(model, Path(folder) / "model"))
            seconds = time.perf_counter() - began
        sizes = [parse_size("--cards", card) for card in cards]
        for form in formats:
            wanted = options.with_values({"fit_formats": [form]})
            cells = [cell(fit_to(counted, wanted, typical_gpu(size))) for size in sizes]
            yield f"| {name}, {model.side} px, {form} | {' | '.join(cells)} |"
        print(f"{name}: counted in {seconds:.1f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(FULL_SIZE), choices=list(FULL_SIZE))
    parser.add_argument("--cards", nargs="+", default=["8GB", "12GB", "16GB", "24GB"])
    parser.add_argument("--formats", nargs="+", default=["bf16"], help="values of --base_format, a line for each")
    args = parser.parse_args()
    for line in rows(args.models, args.formats, args.cards):
        print(line, flush=True)


if __name__ == "__main__":
    main()

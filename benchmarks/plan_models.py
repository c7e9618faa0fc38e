"""Predict memory and time of all base models on common GPUs, as tables for docs/memory.md.

Nothing is measured and no weights are read: the base models are files that contain only a header. Takes about two
minutes.

    python benchmarks/plan_models.py
    python benchmarks/plan_models.py --models FLUX.1 --formats bf16 int8 nf4
    python benchmarks/plan_models.py --write docs/memory.md
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from library.memory.planner.gpus import parse_size, typical_gpu  # noqa: E402
from library.memory.planner.table import format_gib  # noqa: E402
from library.options.train import TrainOptions  # noqa: E402
from library.training.planning.counting import CountedRun  # noqa: E402
from library.training.planning.fit import Fit, fit_to  # noqa: E402
from library.training.planning.settings import describe  # noqa: E402
from tests.contracts.header_only import FULL_SIZE, FullSize  # noqa: E402
from tools.plan_memory import count  # noqa: E402

CARDS = ("8GB", "12GB", "16GB", "24GB")
RANK = 16
CACHES_TEXT = {"train_network"}  # scripts that cannot cache text encoder outputs


def arguments_for(model: FullSize, folder: Path) -> list[str]:
    """Return the options of a usual training: batch 1, rank 16, bf16, denoiser only, everything cached."""
    caches = [] if model.script in CACHES_TEXT else ["--cache_text_encoder_outputs"]
    return [
        *model.build(folder), "--network_module", model.module, "--network_dim", str(RANK), "--mixed_precision", "bf16",
        "--network_train_unet_only", "--cache_latents", "--resolution", str(model.side), *caches,
    ]  # fmt: skip


def cell(found: Fit) -> str:
    """Return the table cell of one GPU: the chosen settings, or the memory that the model needs at least."""
    chosen = found.choice.chosen
    if chosen is None:
        return f"needs {format_gib(found.choice.least.device_bytes)}"
    mode = describe(replace(chosen.mode, weight_format=None))  # the row names the format
    return f"{format_gib(chosen.device_bytes)}, {chosen.seconds:.2f} s: `{mode}`"


@dataclass(frozen=True)
class Table:
    """A table of docs/memory.md, between comments with its name."""

    name: str
    models: Sequence[str]
    formats: Sequence[str]

    def rows(self, cards: Sequence[str]) -> Iterator[str]:
        """Yield the Markdown lines: one row per model and weight format, one column per GPU."""
        yield f"| base model | {' | '.join(cards)} |"
        yield f"|---|{'---|' * len(cards)}"
        for name in self.models:
            yield from rows_of(name, self.formats, cards)

    def put_into(self, page: str, lines: Sequence[str]) -> str:
        """Return the page with the table's content replaced by `lines`."""
        begin, end = f"<!-- plan_models: {self.name} -->\n", f"<!-- end: {self.name} -->"
        before, rest = page.split(begin)
        return before + begin + "".join(f"{line}\n" for line in lines) + end + rest.split(end)[1]


FLUX_2 = tuple(name for name in FULL_SIZE if name.startswith("FLUX.2"))
TABLES = (
    Table("all models", tuple(FULL_SIZE), ("bf16",)),
    Table(
        "fewer bits", ("FLUX.1", *FLUX_2, "Krea 2", "Qwen-Image 2.1", "Z-Image", "HunyuanImage 2.1"), ("int8", "nf4")
    ),
)


@cache
def counted(name: str) -> tuple[TrainOptions, CountedRun]:
    """Count the operations and memory of a usual training of a base model."""
    model = FULL_SIZE[name]
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        options, _, _, found = count(model.script, arguments_for(model, Path(folder) / "model"))
        print(f"{name}: {time.process_time() - began:.1f} CPU seconds", file=sys.stderr)
    return options, found


def rows_of(name: str, formats: Sequence[str], cards: Sequence[str]) -> Iterator[str]:
    """Yield the rows of one base model, one per weight format."""
    options, found = counted(name)
    sizes = [parse_size("--cards", card) for card in cards]
    for weight_format in formats:
        wanted = options.with_values({"fit_formats": [weight_format]})
        cells = [cell(fit_to(found, wanted, typical_gpu(size))) for size in sizes]
        yield f"| {name}, {FULL_SIZE[name].side} px, {weight_format} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(FULL_SIZE), choices=list(FULL_SIZE))
    parser.add_argument("--cards", nargs="+", default=CARDS)
    parser.add_argument("--formats", nargs="+", default=["bf16"], help="values of --base_format, one row each")
    parser.add_argument("--write", metavar="PAGE", help="page, such as docs/memory.md, with tables to replace")
    args = parser.parse_args()
    if args.write is None:
        for line in Table("asked for", args.models, args.formats).rows(args.cards):
            print(line, flush=True)
        return
    path = Path(args.write)
    page = path.read_text(encoding="utf-8")
    for table in TABLES:
        page = table.put_into(page, list(table.rows(CARDS)))
    path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

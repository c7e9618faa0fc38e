"""Extract plain LoRA files of smaller ranks from a file trained with networks.dylora.

DyLoRA trains the first k rows of lora_down and the first k columns of lora_up as an adapter of rank k. Training at rank
k computes (alpha / R) * up[:, :k] @ down[:k] with the full rank R, so every rank has the same scale. A file cut at rank
r therefore gets alpha * r / R as its alpha, which keeps the trained strength. Modules of another rank R' (convolutions
with conv_dim) are cut in proportion, as in training: to R' * r / R, rounded to their own unit if the file records it.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import torch
from tqdm import tqdm

from library.base.atomic_files import atomic_path
from library.base.command_parser import make_parser
from library.base.errors import UserError, about, error_in
from library.base.json_text import parse_json
from library.base.terminal import print_line
from library.checkpoints.marks import mark_of
from library.commands import command as tool
from networks.core.files.adapter_file import AdapterFile, read_adapter_file, require_layouts, save_adapter_file
from networks.core.files.module_weights import ModuleWeights
from networks.core.kinds import lora, norm
from networks.core.kinds.dylora import resolve_nested_rank

WRITER = "tools/extract_lora_from_dylora.py"
EXAMPLES = """\
  python3 tools/extract_lora_from_dylora.py --model cat.safetensors --save_to cat_cut.safetensors --unit 4
      cat_cut-0004.safetensors, cat_cut-0008.safetensors, ... up to the full rank
  python3 tools/extract_lora_from_dylora.py --model cat.safetensors --save_to cat_cut.safetensors --rank 8 16
  python3 tools/extract_lora_from_dylora.py --model cat.safetensors --unit 4 --report
      only print how far each rank is from the full one"""


@dataclass(frozen=True)
class Nested:
    """A DyLoRA file and its ranks."""

    file: AdapterFile
    full_rank: int  # of the Linear layers; of the convolutions if there are no Linear layers
    unit: int | None  # the block size in training; None if the file does not record it
    conv_unit: int  # for larger kernels; 1 if the file does not record it

    @property
    def possible_ranks(self) -> list[int]:
        """Every trained rank, in ascending order."""
        unit = self.unit or 1
        return list(range(unit, self.full_rank + 1, unit))

    def rank_of(self, module: ModuleWeights, rank: int) -> int:
        """Return a module's rank if the file is cut at `rank`, computed as in training."""
        unit = self.conv_unit if module.form == "conv" else self.unit or 1
        if module.rank % unit:  # recorded for other modules
            unit = 1
        return resolve_nested_rank(module.rank, rank, self.full_rank, unit)


def open_nested(path: Path) -> Nested:
    """Read a DyLoRA file. Raises UserError if it cannot be cut."""
    file = read_adapter_file(path, "--model")
    require_layouts(file, (lora.LAYOUT, norm.LAYOUT), "cut to a smaller rank")
    dora = [module.name for module in file.modules.values() if module.is_dora]
    if dora:
        raise UserError(
            f"{file.origin}: {dora[0]} is DoRA; its magnitudes belong to the full rank, so it cannot be cut. "
            "tools/resize_lora.py reduces the rank of such files"
        )
    full_rank = max((module.rank for module in list_ranked(file.modules.values())), default=0)
    if not full_rank:
        raise UserError(f"{file.origin} contains only norm weights, which have no rank")
    arguments = read_network_arguments(file.metadata)
    unit = read_unit(arguments, ("unit", "dyloRA", "dylora"))
    is_unit = unit is not None and full_rank % unit == 0
    return Nested(file, full_rank, unit if is_unit else None, read_unit(arguments, ("conv_unit",)) or 1)


def list_ranked(modules: Iterable[ModuleWeights]) -> list[ModuleWeights]:
    """Return the modules whose ranks and alphas the file records: Linear layers, or convolutions if there are none."""
    ranked = [module for module in modules if module.is_low_rank]
    return [module for module in ranked if module.form == "low_rank"] or ranked


def read_network_arguments(metadata: Mapping[str, str]) -> Mapping[str, object]:
    """Return the content of `ss_network_args`; empty if it is missing or unreadable."""
    try:
        arguments = parse_json(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def read_unit(arguments: Mapping[str, object], names: Sequence[str]) -> int | None:
    """Return the block size recorded under the first of these names that has one, or None."""
    for name in names:
        text = str(arguments.get(name, ""))
        if text.isdecimal() and int(text) > 0:
            return int(text)
    return None


def choose_ranks(nested: Nested, unit: int | None, ranks: Sequence[int] | None) -> list[int]:
    """Return the ranks to cut at. Raises UserError listing the possible ones."""
    possible = nested.possible_ranks
    trained = f", trained in units of {nested.unit}" if nested.unit else ""
    if ranks:
        wrong = [rank for rank in ranks if rank not in possible]
        if wrong:
            raise about("--rank")(
                f"{wrong[0]}: the file has rank {nested.full_rank}{trained}", f"use one of {format_ranks(possible)}"
            )
        return sorted(set(ranks))
    unit = unit if unit is not None else nested.unit
    if unit is None:
        raise error_in("--unit", others=["--rank"], cause="needs")(
            f"use --unit N for the ranks N, 2N, ... or --rank R [R ...]: the file has rank {nested.full_rank} and "
            "does not record its unit"
        )
    smallest = nested.unit or 1
    if unit < 1 or nested.full_rank % unit or unit % smallest:
        units = [n for n in possible if nested.full_rank % n == 0]
        raise about("--unit")(
            f"{unit}: the file has rank {nested.full_rank}{trained}", f"use one of {format_ranks(units)}"
        )
    return list(range(unit, nested.full_rank + 1, unit))


def format_ranks(numbers: Sequence[int]) -> str:
    """Format numbers for a message: all of up to 16, else only the ends."""
    if len(numbers) > 16:
        step = numbers[1] - numbers[0]
        return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]}" if step > 1 else f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def cut_module(nested: Nested, module: ModuleWeights, rank: int) -> ModuleWeights:
    """Cut a module to its first ranks without changing its scale; norm weights have no rank and are kept."""
    if not module.is_low_rank:
        return module
    module_rank = nested.rank_of(module, rank)
    up_OR, down_RN = module.factors(dtype=None)
    return module.with_factors(up_OR[:, :module_rank], down_RN[:module_rank], module.scale)


def cut_file(nested: Nested, rank: int) -> AdapterFile:
    """Return the plain LoRA of one rank, with updated metadata."""
    modules = [cut_module(nested, module, rank) for module in nested.file.modules.values()]
    alphas = {module.alpha for module in list_ranked(modules)}
    alpha = str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
    metadata = {**nested.file.metadata, "ss_network_dim": str(rank), "ss_network_alpha": alpha}
    convs = {(module.rank, module.alpha) for module in modules if module.form == "conv"}
    recorded = read_network_arguments(metadata)
    if "conv_dim" in recorded and len(convs) == 1:
        ((conv_rank, conv_alpha),) = convs
        arguments = {**recorded, "conv_dim": str(conv_rank), "conv_alpha": str(conv_alpha)}
        metadata["ss_network_args"] = json.dumps(arguments)
    comment = f"cut from DyLoRA of rank {nested.full_rank} at rank {rank}"
    return nested.file.with_modules(modules, tool.with_comment(metadata, comment))


def name_file(save_to: Path, rank: int) -> Path:
    """Return the file name with the rank as 4 digits: cat.safetensors -> cat-0008.safetensors."""
    return save_to.with_name(f"{save_to.stem}-{rank:04d}{save_to.suffix}")


def measure_differences(nested: Nested, ranks: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Yield (rank, ||full - cut|| / ||full||) in Frobenius norms over all modules, in float64."""
    # Gram matrices avoid matrices of a weight's size: full - cut is scale * up[:, r:] @ down[r:], and
    # ||up @ down||^2 is the sum of (up^T up) * (down down^T).
    ranked = [module for module in nested.file.modules.values() if module.is_low_rank]
    grams = []
    for module in ranked:
        up_OR, down_RN = module.factors(torch.float64)
        grams.append(module.scale**2 * (up_OR.T @ up_OR) * (down_RN @ down_RN.T))
    full = sum(float(gram_RR.sum()) for gram_RR in grams)
    for rank in ranks:
        kept = (nested.rank_of(module, rank) for module in ranked)
        missed = sum(float(gram_RR[k:, k:].sum()) for gram_RR, k in zip(grams, kept, strict=True))
        # Rounding can leave a sum near 0 negative.
        yield rank, (max(missed, 0.0) / full) ** 0.5 if full > 0 else 0.0


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    save_to = {"required": False, "help": "base name of the files, which gets the rank: cat.safetensors"}
    model = {"help": "the file trained with networks.dylora"}
    tool.add_options(parser, "model", "save_to", model=model, save_to=save_to)
    parser.add_argument("--unit", type=int, help="cut at every multiple of this, the full rank too; unset: as trained")
    parser.add_argument("--rank", type=int, nargs="+", help="cut at only these ranks")
    parser.add_argument("--report", action="store_true", help="print how far each rank is from the full rank")
    return parser


def extract(args: argparse.Namespace) -> None:
    """Write the files and print the report, as requested."""
    if args.unit is not None and args.rank is not None:
        raise about("--unit", cause="does not fit", others=["--rank"])(
            "and --rank exclude each other: --unit cuts at every multiple, --rank at given ranks"
        )
    if args.save_to is None and not args.report:
        raise about("--save_to", cause="missing")(
            "is missing: set the base name of the files, or use --report to only print the ranks"
        )
    if args.save_to is not None:
        tool.check_extension("--save_to", args.save_to)
    nested = open_nested(args.model)
    ranks = choose_ranks(nested, args.unit, args.rank)
    files = {} if args.save_to is None else {name_file(args.save_to, rank): rank for rank in ranks}
    for path in files:
        tool.check_output("--save_to", path, WRITER, [args.model])
    # All files or none: an exit status of 1 says that nothing was written.
    with ExitStack() as unfinished:
        for path, rank in tqdm(files.items(), desc="cutting", unit="file", disable=not files):
            temporary = unfinished.enter_context(atomic_path(path))
            save_adapter_file(temporary, cut_file(nested, rank), mark=mark_of(WRITER, path))
    if args.report:
        print_line("rank  relative difference to the full update")
        for rank, difference in measure_differences(nested, ranks):
            print_line(f"{rank:4d}  {difference:.4f}")
    if files:
        print_line(f"{len(files)} files: {min(files)} to {max(files).name}")


main = tool.command(setup_parser, extract)

if __name__ == "__main__":
    sys.exit(main())

"""Extract plain LoRA files of smaller ranks from a file trained with networks.dylora.

DyLoRA trains the first k rows of lora_down and the first k columns of lora_up as an adapter of rank k. Training at rank
k computes (alpha / R) * up[:, :k] @ down[:k] with the full rank R, so every rank has the same scale. A file cut at rank
r therefore gets alpha * r / R as its alpha, which keeps the trained strength. Modules of another rank R' (convolutions
with conv_dim) are cut in proportion, as in training: to R' * r / R, rounded to their own unit if the file records it.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from library.commands.command import add_options, check_extension, check_output, command, with_comment
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
    modules = [module for module in file.modules.values() if module.is_low_rank]
    if not modules:
        raise UserError(f"{file.origin} contains only norm weights, which have no rank")
    ranks = [m.rank for m in modules if m.form == "low_rank"] or [m.rank for m in modules]
    arguments = read_network_arguments(file.metadata)
    unit = read_unit(arguments, ("unit", "dyloRA", "dylora"))
    return Nested(
        file=file,
        full_rank=max(ranks),
        unit=unit if unit and max(ranks) % unit == 0 else None,
        conv_unit=read_unit(arguments, ("conv_unit",)) or 1,
    )


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
    alphas = {module.alpha for module in modules if module.is_low_rank and module.form == "low_rank"} or {
        module.alpha for module in modules if module.is_low_rank
    }
    metadata = dict(nested.file.metadata)
    metadata["ss_network_dim"] = str(rank)
    metadata["ss_network_alpha"] = str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
    comment = f"cut from DyLoRA of rank {nested.full_rank} at rank {rank}"
    metadata["ss_training_comment"] = with_comment(metadata.get("ss_training_comment"), comment)
    convs = {(module.rank, module.alpha) for module in modules if module.form == "conv"}
    arguments = set_conv_rank(metadata.get("ss_network_args"), convs)
    if arguments is not None:
        metadata["ss_network_args"] = arguments
    return nested.file.with_modules(modules, metadata)


def set_conv_rank(arguments: str | None, convs: set[tuple[int, float]]) -> str | None:
    """Return `ss_network_args` with the new rank and alpha of the convolutions; None if it does not record them."""
    try:
        recorded = dict(parse_json(arguments or "{}"))
    except (ValueError, TypeError):
        return None
    if "conv_dim" not in recorded or len(convs) != 1:
        return None
    ((rank, alpha),) = convs
    return json.dumps({**recorded, "conv_dim": str(rank), "conv_alpha": str(alpha)})


def name_file(save_to: Path, rank: int) -> Path:
    """Return the file name with the rank as 4 digits: cat.safetensors -> cat-0008.safetensors."""
    return save_to.with_name(f"{save_to.stem}-{rank:04d}{save_to.suffix}")


def measure_differences(nested: Nested, ranks: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Yield (rank, ||full - cut|| / ||full||) in Frobenius norms over all modules, in float64."""
    # Gram matrices avoid matrices of a weight's size: full - cut is scale * up[:, r:] @ down[r:], and
    # ||up @ down||^2 is the sum of (up^T up) * (down down^T).
    grams = []
    for module in nested.file.modules.values():
        if module.is_low_rank:
            up_OR, down_RN = module.factors(torch.float64)
            grams.append((module, module.scale**2 * (up_OR.T @ up_OR) * (down_RN @ down_RN.T)))
    full = sum(float(gram_RR.sum()) for _, gram_RR in grams)
    for rank in ranks:
        missed = 0.0
        for module, gram_RR in grams:
            module_rank = nested.rank_of(module, rank)
            missed += float(gram_RR[module_rank:, module_rank:].sum())
        # Rounding can leave a sum near 0 negative.
        yield rank, (max(missed, 0.0) / full) ** 0.5 if full > 0 else 0.0


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    save_to = {"required": False, "help": "base name of the files, which gets the rank: cat.safetensors"}
    add_options(parser, "model", "save_to", model={"help": "the file trained with networks.dylora"}, save_to=save_to)
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
        check_extension("--save_to", args.save_to)
    nested = open_nested(args.model)
    ranks = choose_ranks(nested, args.unit, args.rank)
    if args.save_to is not None:
        for rank in ranks:
            check_output("--save_to", name_file(args.save_to, rank), WRITER, [args.model])
        # All files or none: an exit status of 1 says that nothing was written.
        with ExitStack() as unfinished:
            for rank in tqdm(ranks, desc="cutting", unit="file"):
                path = name_file(args.save_to, rank)
                temporary = unfinished.enter_context(atomic_path(path))
                save_adapter_file(temporary, cut_file(nested, rank), mark=mark_of(WRITER, path))
    if args.report:
        print_line("rank  relative difference to the full update")
        for rank, difference in measure_differences(nested, ranks):
            print_line(f"{rank:4d}  {difference:.4f}")
    if args.save_to is not None:
        print_line(
            f"{len(ranks)} files: {name_file(args.save_to, ranks[0])} to {name_file(args.save_to, ranks[-1]).name}"
        )


main = command(setup_parser, extract)

if __name__ == "__main__":
    sys.exit(main())

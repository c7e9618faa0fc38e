"""Inspect an adapter file: ranks, alphas and norms by block, problems, and the programs that can use it.

The norms are those of the factors and of the change alpha / rank * up @ down. With --base_model the last line says how
large the change is beside the weights that it changes. The exit status is 0 for a usable file and 1 for an unusable
one: truncated, with non-finite values, or with one half of a pair missing.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

from torch import Tensor
from tqdm import tqdm

from library.architectures.specs import list_specs
from library.base.command_parser import make_parser
from library.base.errors import about
from library.base.terminal import print_json, print_line
from library.checkpoints.base_model import BaseModel
from library.checkpoints.base_model_spec import BaseModelSpec
from library.checkpoints.compatibility import Reading, describe, problems, readings
from library.checkpoints.files import file_in_folder, load_state_dict
from library.checkpoints.headers import read_metadata
from library.checkpoints.recognition import recognise_adapter
from library.checkpoints.relative_change import format_change, relative_norm
from library.commands.base_models import open_base_model
from library.commands.command import add_file, command
from library.models.identify import find_spec
from networks.core.changes.parameter_keys import ALPHA
from networks.core.files import adapter_file, inspection
from networks.core.files.module_weights import ModuleWeights, value_problems
from networks.core.files.renaming import list_some_keys

EXAMPLES = """\
  python3 tools/check_lora_weights.py --model my_cat.safetensors
  python3 tools/check_lora_weights.py --model my_cat.safetensors --base_model sd15.safetensors
  python3 tools/check_lora_weights.py --model my_cat.safetensors --json > report.json"""

MOST_PROBLEMS = 8  # shown as text


@dataclass(frozen=True)
class Report:
    """The findings about one adapter file."""

    origin: str
    base: str | None
    dtypes: dict[str, int]
    modules: list[inspection.ModuleSummary]
    blocks: list[inspection.BlockSummary]
    programs: tuple[Reading, ...]
    relative_change: float | None  # |W' - W| / |W| over the weights that the base model has; None without one
    num_compared: int  # modules with such a weight
    problems: list[str]  # the file cannot be used
    warnings: list[str]  # the file can be used, but is unusual


def check(path: Path, base_model: BaseModel | None = None) -> Report:
    """Read and check an adapter file or a folder saved by PEFT, beside the base model's weights if there is one.

    Raises UserError if it cannot be read or belongs to another base model.
    """
    origin = str(path)
    path = file_in_folder(path, origin)
    settings = adapter_file.peft_settings(path)
    return judge(load_state_dict(path), read_metadata(path), origin, settings, base_model)


def judge(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    origin: str,
    settings: adapter_file.PeftSettings | None = None,
    base_model: BaseModel | None = None,
) -> Report:
    """Check the tensors of an adapter file; `settings` are those of PEFT's adapter_config.json, if there is one."""
    file = adapter_file.sort_tensors(tensors, metadata, origin)
    tensors, modules = adapter_file.adapter_tensors(file), file.modules
    recorded = adapter_file.diffusers_settings(metadata) if settings is None else settings
    shapes, specs = {key: tuple(tensor.shape) for key, tensor in tensors.items()}, list_specs()
    base = recognise_adapter(specs, shapes, metadata)
    file_problems, summaries, norms = list[str](), list[inspection.ModuleSummary](), list[tuple[float, float]]()
    lone_alphas = [module.keys[ALPHA] for module in modules.values() if module.tensors.keys() == {ALPHA}]
    for module in tqdm(modules.values(), desc="modules", disable=None, leave=False):
        file_problems += value_problems(module)
        if module.keys.get(ALPHA) in lone_alphas:
            continue
        if problem := inspection.structure_problem(module):
            file_problems.append(problem)
            continue
        # Applied once, here: PEFT's recorded alpha is multiplied into a LoKr of whole matrices.
        module = adapter_file.with_alpha(module, recorded)
        summaries.append(inspection.summarise_module(module))
        weight = None if base_model is None else find_weight(module, base_model)
        if weight is not None and module.changes("weight"):
            norms.append(module.change_norms(weight))
    if len(modules) == len(lone_alphas):
        first_keys = ", ".join(list(tensors)[:3]) or "none"
        file_problems.append(f"the file contains no adapter weights (first keys: {first_keys})")
    warnings = list(find_warnings(list(modules.values()), summaries, list(file.unknown), base))
    if lone_alphas and len(modules) > len(lone_alphas):
        warnings.append(f"alphas without weights, which have no effect: {list_some_keys(lone_alphas)}")
    if base_model is not None and summaries and not norms:
        raise about("--base_model", base_model.path)(f"has none of the modules of {origin}", "name its own base model")
    alphas = {key: float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha") and tensor.numel() == 1}
    return Report(
        origin, base.name if base else None, inspection.count_dtypes(tensors), summaries,
        inspection.group_by_block(summaries), readings(specs, shapes, metadata, alphas), relative_norm(norms),
        len(norms), file_problems, warnings,
    )  # fmt: skip


def find_weight(module: ModuleWeights, base: BaseModel) -> Tensor | None:
    """Return the base model's weight that a module changes; None if the checkpoint has none of its name."""
    if module.layout.read is None:  # only recognised
        return None
    names = base.names.find(module.name)
    candidates = [module.name, *([] if names is None else [names.kohya])]
    return next((base.read(name) for name in candidates if base.shape(name) is not None), None)


def find_warnings(
    modules: Sequence[ModuleWeights],
    summaries: Sequence[inspection.ModuleSummary],
    unknown: Sequence[str],
    base: BaseModelSpec | None,
) -> Iterator[str]:
    """Yield warnings about a file that is usable."""
    if unknown:
        yield f"keys that belong to no adapter: {list_some_keys(unknown)}"
    if base is None:
        yield "the base model cannot be recognised from the keys"
    elif not base.is_general:
        foreign = [module.name for module in modules if base.names.find(module.name) is None]
        if foreign:
            yield f"{base.title} has no modules of these names: {list_some_keys(foreign)}"
    unchanged = [module.name for module in summaries if module.update_norm == 0]
    if unchanged:
        yield f"all zeros, without effect: {list_some_keys(unchanged)}"


def make_json(report: Report) -> Any:
    """Return the report as values of JSON, with null for non-finite numbers."""
    content = asdict(report)
    for program, reading in zip(content["programs"], report.programs, strict=True):
        program |= {"amount": reading.amount, "num_used": reading.num_used}
    content["is_usable"] = not report.problems
    return json.loads(json.dumps(content), parse_constant=lambda nonfinite: None)


def format_text(report: Report) -> Iterator[str]:
    base = "unknown base model" if report.base is None else find_spec(list_specs(), report.base).title
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in report.dtypes.items())
    yield f"{report.origin}: {sum(report.dtypes.values())} keys ({dtypes}), {len(report.modules)} modules, {base}"
    yield from format_blocks(report.blocks)
    yield describe(report.programs)
    yield from (f"  {reason}" for reason in problems(report.programs))
    yield from (f"warning: {text}" for text in report.warnings)
    yield from (f"problem: {text}" for text in report.problems[:MOST_PROBLEMS])
    if len(report.problems) > MOST_PROBLEMS:
        yield f"problem: {len(report.problems) - MOST_PROBLEMS} more, which --json lists"
    yield format_size(report)


def format_size(report: Report) -> str:
    """Return the line about the size of the change, beside the base model's weights if they were given."""
    if report.relative_change is None:
        size = math.hypot(*(module.update_norm or 0 for module in report.modules))
        return f"|change| is {size:.4g}; --base_model tells how much of the base model's weights that is"
    share = f"{report.num_compared} of {len(report.modules)} modules"
    return f"compared with the base model ({share}), {format_change(report.relative_change)}"


def format_blocks(blocks: Sequence[inspection.BlockSummary]) -> Iterator[str]:
    """Yield one line per block, below a heading per part."""
    width = max((len(block.block) for block in blocks), default=0)
    for part in dict.fromkeys(block.part for block in blocks):
        rows = [block for block in blocks if block.part == part]
        if not any(block.ranks or block.update_norm for block in rows):
            yield f"{part}: {len(rows)} blocks, modules of a kind that is only recognised"
            continue
        yield f"{part}:"
        norms = f"{'|down|':>10} {'|up|':>10} {'|change|':>10}"
        yield f"  {'block':{width}} {'modules':>7}  {'rank':10} {'alpha':10} {norms}"
        for block in rows:
            yield (
                f"  {block.block:{width}} {block.num_modules:7}  {join(block.ranks):10} {join(block.alphas):10} "
                f"{block.down_norm:10.4g} {block.up_norm:10.4g} {block.update_norm:10.4g}"
            )


def join(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers) or "-"


def list_keys(path: Path) -> Iterator[str]:
    """Yield every key with its dtype, shape and norm."""
    for key, tensor in adapter_file.read_adapters(path).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield f"{key} {dtype} {list(tensor.shape)} norm {float(tensor.double().norm()):.4g}"


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    add_file(parser, "the adapter file, or a folder saved by PEFT")
    parser.add_argument("--base_model", help="its base model, whose weights the change is compared with")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print everything as JSON, single modules included")
    formats.add_argument("-s", "--show_all_keys", action="store_true", help="also list every key: dtype, shape, norm")
    return parser


def print_report(args: argparse.Namespace) -> int:
    """Print the report. Return 1 if the file is unusable, else 0."""
    path = args.model or args.file
    base = None if args.base_model is None else open_base_model("--base_model", Path(args.base_model))
    report = check(path, base)
    if args.json:
        print_json(make_json(report), indent=2)
    else:
        for line in [*format_text(report), *(list_keys(path) if args.show_all_keys else ())]:
            print_line(line)
    return int(bool(report.problems))


main = command(setup_parser, print_report)

if __name__ == "__main__":
    sys.exit(main())

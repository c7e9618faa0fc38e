"""Reduce the rank of a LoRA file, to a fixed rank or to one chosen for each module by its singular values.

Each module's change is decomposed exactly from its small factors. The result is the best approximation at the new rank,
with the same alpha / rank as before. Modules with a Tucker core become plain convolutions of the same effect, LoHa and
LoKr become LoRA; DoRA magnitudes and norm weights are kept.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import torch
from torch import Tensor
from tqdm import tqdm

from library.base.command_parser import make_parser
from library.base.errors import UserError, about
from library.base.randomness import generator_for
from library.base.terminal import print_line
from library.commands import command as tool
from library.commands.adapter_files import write_adapter
from networks.core.changes import svd
from networks.core.files.adapter_file import COMPUTED, AdapterFile, read_adapter_file, require_layouts
from networks.core.files.module_weights import ModuleWeights
from networks.core.kinds import lora, norm

logger = logging.getLogger(__name__)

WRITER = "tools/resize_lora.py"
EXAMPLES = """\
  python3 tools/resize_lora.py --model cat.safetensors --save_to cat_8.safetensors --new_rank 8
  python3 tools/resize_lora.py --model cat.safetensors --save_to cat_small.safetensors --new_rank 32 \\
      --dynamic_method sv_fro --dynamic_param 0.9 --verbose"""

# A LoHa of rank 52 on a layer of 2560 x 2560, resized to rank 16 on one thread, takes 21.4 s exactly and 5.9 s with 2
# power iterations. On random factors these miss 1.003 times as much as the best approximation.
MANY_SINGULAR_VALUES = 2048  # up to here the exact decomposition takes seconds

METHODS = {"sv_ratio": svd.rank_by_ratio, "sv_fro": svd.rank_by_norm, "sv_cumulative": svd.rank_by_sum}


@dataclass(frozen=True)
class Measure:
    """The choice of a module's rank: a fixed rank, or up to that rank by `method`."""

    new_rank: int
    new_conv_rank: int
    method: str | None
    param: float
    lowrank_niter: int = 0  # power iterations in place of the exact decomposition of large modules; 0 disables them

    def most_of(self, module: ModuleWeights) -> int:
        return self.new_conv_rank if module.is_larger_kernel else self.new_rank

    def rank_of(self, module: ModuleWeights, s_K: Tensor) -> int:
        if self.method is None:
            return min(self.most_of(module), len(s_K))
        if float(s_K[0]) <= svd.MIN_SINGULAR_VALUE:
            return 1
        return min(METHODS[self.method](s_K, self.param), self.most_of(module))


class Resized(NamedTuple):
    """One resized module, with what its new rank keeps."""

    module: ModuleWeights
    kept_norm: float  # share of the Frobenius norm
    line: str  # for --verbose


def resize_module(module: ModuleWeights, measure: Measure, device: torch.device) -> Resized:
    """Resize a module in float32 on `device`. Large modules with a fixed rank are approximated if requested."""
    up_OR, down_RN = (factor.to(device) for factor in module.factors())
    num_values = min(*up_OR.shape, len(down_RN.T))
    if measure.method is None and measure.lowrank_niter and num_values > MANY_SINGULAR_VALUES:
        rank, total = measure.most_of(module), None
        # A generator per module, so that equal files give equal results.
        generator = generator_for(0, "resize_lora", module.name)
        u, s_K, v, norm = svd.largest_of_product(up_OR, down_RN, rank, measure.lowrank_niter, generator)
    else:
        u, s_K, v = svd.svd_of_product(up_OR, down_RN)
        rank = measure.rank_of(module, s_K)
        exact_K = s_K.cpu().double()  # not every device has float64
        total, norm = float(exact_K.sum()), float(exact_K.norm())
    up, down = svd.balance(u, s_K, v, rank)
    resized = module.with_factors(up.cpu(), down.cpu(), module.scale)
    kept_K = s_K[:rank].cpu().double()
    kept_norm = float(kept_K.norm()) / norm if norm > 0 else 1.0
    kept = f"{kept_norm:.1%} of the norm, largest / smallest {float(kept_K[0] / kept_K[-1].clamp(min=1e-30)):.1f}"
    if total is not None:  # all singular values were computed
        kept = f"{float(kept_K.sum()) / total if total > 0 else 1.0:.1%} of the sum of singular values, {kept}"
    return Resized(resized, kept_norm, f"{module.name}: rank {module.rank} to {resized.rank}, keeps {kept}")


def resize_file(file: AdapterFile, measure: Measure, device: torch.device, verbose: bool = False) -> AdapterFile:
    """Resize every module and update the metadata. Raises UserError for adapter kinds without a rank."""
    require_layouts(file, COMPUTED, "resized")
    rankless = next((m for m in file.modules.values() if not m.is_low_rank and m.layout is not norm.LAYOUT), None)
    if rankless is not None:
        raise UserError(
            f"{file.origin}: {rankless.name} is {rankless.layout.words}, which has no rank to reduce",
            "convert it to a LoRA with tools/merge_lora.py --base_model (the checkpoint that it was trained on) "
            "--new_rank",
        )
    modules, kept_norms = [], []
    for module in tqdm(file.modules.values(), desc="resizing", unit="module"):
        if module.is_low_rank:
            module, kept_norm, line = resize_module(module, measure, device)
            kept_norms.append(kept_norm)
            if verbose:
                with tqdm.external_write_mode():
                    print_line(line)
        modules.append(module)
    if not kept_norms:
        raise UserError(f"{file.origin} contains only norm weights, which have no rank")
    mean = sum(kept_norms) / len(kept_norms)
    logger.info("%d modules, on average %.1f%% of the Frobenius norm is kept", len(kept_norms), 100 * mean)
    return file.with_modules(modules, make_metadata(file, modules, measure))


def make_metadata(file: AdapterFile, modules: Sequence[ModuleWeights], measure: Measure) -> dict[str, str]:
    """Return the metadata with the new rank and alpha; "Dynamic" if the modules' values differ."""
    metadata = dict(file.metadata)
    low_rank = [m for m in modules if m.form == "low_rank"] or [m for m in modules if m.is_low_rank]
    ranks, alphas = {module.rank for module in low_rank}, {module.alpha for module in low_rank}
    old_rank = max(module.rank for module in file.modules.values() if module.is_low_rank)
    if any(module.layout is not old_module.layout and not old_module.layout.ends
           for module, old_module in zip(modules, file.modules.values(), strict=True)):  # fmt: skip
        metadata["ss_network_module"] = lora.LAYOUT.network_module
    is_dynamic = measure.method is not None
    metadata["ss_network_dim"] = "Dynamic" if is_dynamic else str(measure.new_rank if len(ranks) > 1 else ranks.pop())
    metadata["ss_network_alpha"] = "Dynamic" if is_dynamic or len(alphas) > 1 else str(alphas.pop())
    method_text = f"by {measure.method} {measure.param:g} " if is_dynamic else ""
    comment = f"resized {method_text}from rank {old_rank} to {'at most ' if is_dynamic else ''}{measure.new_rank}"
    return tool.with_comment(metadata, comment)


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    rank = {"default": 4, "help": "rank; with a method, the largest (default: 4)"}
    tool.add_options(parser, "model", "save_to", "new_rank", "new_conv_rank", new_rank=rank)
    method = (
        "choose each module's rank by its singular values: sv_ratio keeps those above the largest / PARAM, sv_fro "
        "keeps the share PARAM of the Frobenius norm, sv_cumulative the share PARAM of their sum"
    )
    parser.add_argument("--dynamic_method", choices=tuple(METHODS), help=method)
    parser.add_argument("--dynamic_param", type=float, help="PARAM of the method: 1 or more for sv_ratio, else 0 to 1")
    iterations = (
        f"compute only the singular values that a fixed rank keeps, with so many power iterations, for modules "
        f"with more than {MANY_SINGULAR_VALUES} of them, such as a LoHa of rank 46; fast and nearly the best "
        "(default: 0, exact)"
    )
    parser.add_argument("--svd_lowrank_niter", type=int, default=0, help=iterations)
    parser.add_argument("--verbose", action="store_true", help="show for each module what its new rank keeps")
    return tool.add_options(parser, "save_precision", "device")


def resolve_measure(args: argparse.Namespace) -> Measure:
    """Return the requested measure. Raises UserError for invalid option values."""
    tool.check_at_least_one(args, "new_rank", "new_conv_rank")
    conv = args.new_rank if args.new_conv_rank is None else args.new_conv_rank
    method, param = args.dynamic_method, args.dynamic_param
    if (method is None) != (param is None):
        raise about("--dynamic_method", others=["--dynamic_param"])(
            "and --dynamic_param belong together, for example sv_fro and 0.9"
        )
    if method == "sv_ratio" and not 1 <= param < math.inf:
        raise about("--dynamic_param")(f"is {param:g}; sv_ratio needs at least 1, for example 10")
    if method in ("sv_fro", "sv_cumulative") and not 0 < param <= 1:
        raise about("--dynamic_param")(f"is {param:g}; {method} needs a share above 0 and up to 1, for example 0.9")
    if args.svd_lowrank_niter < 0:
        raise about("--svd_lowrank_niter")(
            f"is {args.svd_lowrank_niter}", "use 0 for the exact decomposition, or a number such as 2"
        )
    if args.svd_lowrank_niter and method is not None:
        logger.warning("--svd_lowrank_niter has no effect with --dynamic_method, which needs all singular values")
    return Measure(args.new_rank, conv, method, param or 0.0, args.svd_lowrank_niter)


def resize(args: argparse.Namespace) -> None:
    """Read, resize and write the file. Programs that call this may leave out options. Raises UserError."""
    args = tool.complete_options(setup_parser(), args)
    measure = resolve_measure(args)
    tool.check_output("--save_to", args.save_to, WRITER, [args.model])
    file = read_adapter_file(args.model, "--model")
    resized = resize_file(file, measure, tool.resolve_device(args.device), args.verbose)
    write_adapter(args.save_to, resized, WRITER, tool.parse_dtype(args.save_precision))


main = tool.command(setup_parser, resize)

if __name__ == "__main__":
    sys.exit(main())

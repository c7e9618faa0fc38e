"""Merging of several adapter files into one LoRA, exactly or at a fixed rank. tools/merge_lora.py adds merging into a
checkpoint.

Letters: O outputs of a weight, N its flattened inputs, R rank.
"""

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import prod
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from library.base.errors import UserError, about, error_in
from library.checkpoints.adapter_keys import recognise_naming
from library.checkpoints.adapter_names import BaseNames
from library.checkpoints.base_model import BaseModel
from library.checkpoints.metadata import BOUNDARY, EXPERT
from library.commands.adapter_files import names_in, spec_for_file
from library.commands.command import parse_dtype, resolve_device
from library.memory.devices import SAVE_DTYPES
from networks.core.changes.svd import balance, best_factors, clamp_factors, concatenate, svd_of_product
from networks.core.files.adapter_file import COMPUTED, AdapterFile, require_layouts
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.renaming import rename
from networks.core.kinds import full, lora, norm
from networks.core.registry.layouts import PIECES

logger = logging.getLogger(__name__)

MIN_REPORTED_ERROR = 1e-5  # relative error above which it is logged


@dataclass(frozen=True)
class Weighted:
    """An adapter file with its strength, for the whole file and for each module."""

    file: AdapterFile
    ratio: float
    strength_of: Callable[[str], float] = lambda name: 1.0  # by module name in any naming

    def ratio_of(self, name: str) -> float:
        return self.ratio * self.strength_of(name)

    def is_omitted(self, name: str) -> bool:
        return self.strength_of(name) == 0


Terms = Sequence[tuple[ModuleWeights, float]]
"""One module's changes from all files, with their ratios."""


@dataclass(frozen=True)
class Arithmetic:
    """Precision and device of the computation, and precision of the file; None keeps the dtype of every tensor."""

    dtype: torch.dtype
    device: torch.device
    save_dtype: torch.dtype | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Arithmetic":
        return cls(SAVE_DTYPES[args.precision], resolve_device(args.device), parse_dtype(args.save_precision))


@dataclass(frozen=True)
class Joining:
    """Settings for concatenating the factors of several files."""

    squares: bool = False  # as sd-scripts: both factors are multiplied by the ratio; alpha is kept, ranks add up
    shuffling: torch.Generator | None = None  # shuffles the ranks so that no file can be recovered

    def strengths(self, ratios: Sequence[float], ranks: Sequence[int]) -> list[float]:
        """Return the strengths of one module's changes from their ratios and ranks."""
        squared = (ratio * abs(ratio) * rank / sum(ranks) for ratio, rank in zip(ratios, ranks, strict=True))
        return list(squared if self.squares else ratios)


@dataclass(frozen=True)
class Merged:
    """One module of the merged LoRA, with the squared norms of its error and of the exact sum."""

    module: ModuleWeights
    missed: float = 0.0
    total: float = 0.0


def merge_adapters(
    adapters: Sequence[Weighted],
    ranks: tuple[int, int] | None,
    arithmetic: Arithmetic,
    base: BaseModel | None = None,
    joining: Joining = Joining(),
) -> list[ModuleWeights]:
    """Merge adapters into the modules of one LoRA in kohya's naming, with the change sum(ratio * change).

    `ranks` is (rank of Linear layers and 1x1 convolutions, rank of larger convolutions). None concatenates the factors
    by `joining`: the result is exact and the ranks add up. The change of OFT, BOFT and DoRA depends on the base weight,
    which is read from `base`. Raises UserError for kinds that cannot be added.
    """
    sums: dict[str, list[tuple[ModuleWeights, float]]] = {}
    others = names_in(map(attrgetter("file"), adapters))
    for adapter in adapters:
        file = rename_to_kohya(adapter.file, others)
        require_layouts(file, COMPUTED, "merged")
        for name, module in file.modules.items():
            if adapter.is_omitted(name):
                continue
            if full.DIFF_B in module.tensors or (module.layout is full.LAYOUT and len(module.shape) == 1):
                raise UserError(
                    f"{file.origin}: {name} changes a bias or a norm, which a LoRA cannot",
                    "merge it into a checkpoint with --sd_model",
                )
            if needs_base(module) and (base is None or ranks is None):
                raise UserError(explain_refusal(file, module, has_base=base is not None))
            sums.setdefault(name, []).append((module, adapter.ratio_of(name)))
    if base is not None and not any(needs_base(module) for terms in sums.values() for module, _ in terms):
        logger.warning("--base_model has no effect: the changes of --models do not depend on it")
    merged = []
    for name, terms in tqdm(sums.items(), desc="merging", unit="module"):
        if terms[0][0].layout is norm.LAYOUT:
            merged.append(Merged(add_norms(name, terms, joining)))
        elif base is not None and ranks is not None and any(needs_base(module) for module, _ in terms):
            merged.append(approximate(name, terms, ranks, base.read(name), arithmetic))
        else:
            merged.append(add_factors(name, terms, ranks, arithmetic, joining))
    missed, total = sum_errors(merged)
    if missed > MIN_REPORTED_ERROR**2 * total:
        logger.info("the LoRA misses %.1f%% of the sum of the changes (norm)", 100 * (missed / total) ** 0.5)
    return [result.module for result in merged]


def sum_errors(merged: Sequence[Merged]) -> tuple[float, float]:
    """Return the squared norms (of the error, of the exact sum) of all modules."""
    return sum(result.missed for result in merged), sum(result.total for result in merged)


def needs_base(module: ModuleWeights) -> bool:
    """Return True if a module's change depends on the base weight, or is not a product of factors."""
    return module.layout is not norm.LAYOUT and (module.is_dora or not module.is_low_rank)


def explain_refusal(file: AdapterFile, module: ModuleWeights, has_base: bool) -> str:
    """Return the message for a module that cannot be merged into a LoRA with these options."""
    kind = "DoRA" if module.is_dora else module.layout.words
    if has_base:
        return f"{file.origin}: {module.name} is {kind}, not exactly a LoRA; use --new_rank instead of --concat"
    has_no_factors = module.layout in (full.LAYOUT, PIECES) and not module.is_dora
    reason = "which has no factors to add" if has_no_factors else "whose change depends on the base weight"
    return (
        f"{file.origin}: {module.name} is {kind}, {reason}; set --base_model to the checkpoint that it "
        "was trained on and a rank with --new_rank, or merge it into a checkpoint with --sd_model"
    )


def rename_to_kohya(file: AdapterFile, others: BaseNames) -> AdapterFile:
    """Return the file with kohya's module names. `others` are those of a pipeline without a table."""
    # networks.oft writes kohya's module names with a prefix of its own.
    if all(recognise_naming(name) == "kohya" and not name.startswith("oft_") for name in file.modules):
        return file
    spec = spec_for_file(file, file.origin)
    return rename(file, others if spec.is_general else spec.names, "kohya", keeps_pieces=True).file


def add_factors(
    name: str, terms: Terms, ranks: tuple[int, int] | None, arithmetic: Arithmetic, joining: Joining
) -> Merged:
    """Add low-rank changes of one module. Raises UserError if their shapes differ."""
    # A LoHa does not distinguish 1x1 convolutions from matrices.
    shape = max((module.shape for module, _ in terms), key=len)
    for module, _ in terms:
        if not module.is_low_rank or module.shape[:2] != shape[:2] or prod(module.shape) != prod(shape):
            raise error_in("--models", cause="does not fit")(
                f"{name} has different shapes in --models; they were made for different base models"
            )
    device = arithmetic.device
    pairs = (module.factors(arithmetic.dtype) for module, _ in terms)
    factors = [(up_OR.to(device), down_RN.to(device)) for up_OR, down_RN in pairs]
    strengths = joining.strengths([ratio for _, ratio in terms], [len(down_RN) for _, down_RN in factors])
    scales = [strength * module.scale for strength, (module, _) in zip(strengths, terms, strict=True)]
    up_OR, down_RN = concatenate(factors, scales)
    if ranks is None:
        if joining.shuffling is not None:
            order = torch.randperm(len(down_RN), generator=joining.shuffling).to(device)
            up_OR, down_RN = up_OR[:, order], down_RN[order]
        return Merged(lora_from_factors(name, up_OR, down_RN, shape))
    rank = rank_for(shape, ranks)
    wide = torch.promote_types(arithmetic.dtype, torch.float32)  # torch decomposes no 16 bits
    u_OK, s_K, v_KN = svd_of_product(up_OR.to(wide), down_RN.to(wide))
    up_OR, down_RN = (factor.to(arithmetic.dtype) for factor in balance(u_OK, s_K, v_KN, rank))
    s_K = s_K.cpu().double()  # not every device has float64
    return Merged(
        lora_from_factors(name, up_OR, down_RN, shape), float(s_K[rank:].square().sum()), float(s_K.square().sum())
    )


def approximate(name: str, terms: Terms, ranks: tuple[int, int], weight: Tensor, arithmetic: Arithmetic) -> Merged:
    """Return the best LoRA for a sum of changes that need the base weight. Raises UserError for non-finite weights."""
    dtype = torch.promote_types(arithmetic.dtype, torch.float32)  # the difference of nearly equal numbers
    weight = weight.to(arithmetic.device, dtype)
    change = torch.zeros_like(weight)
    for module, ratio in terms:
        change += module.merged(weight, ratio, dtype) - weight
    if not bool(torch.isfinite(change).all()):
        raise about("--base_model", cause="unreadable")(
            f"has values that are not finite in {name}; the checkpoint is damaged"
        )
    return approximate_change(name, change, rank_for(tuple(weight.shape), ranks), arithmetic.device, dtype)


def approximate_change(
    name: str, change: Tensor, rank: int, device: torch.device, dtype: torch.dtype, quantile: float = 1.0
) -> Merged:
    """Return the best LoRA for the change of a weight, computed in float64 if the device has it and stored in `dtype`;
    its factors are clamped to this quantile of their values."""
    matrix_ON = change.to(device, torch.float32 if device.type == "mps" else torch.float64).flatten(1)
    factors = best_factors(matrix_ON, rank)
    up_OR, down_RN = factors if quantile == 1 else clamp_factors(*factors, quantile)
    missed, total = (float(matrix.square().sum()) for matrix in (matrix_ON - up_OR @ down_RN, matrix_ON))
    return Merged(lora_from_factors(name, up_OR.to(dtype), down_RN.to(dtype), tuple(change.shape)), missed, total)


def rank_for(shape: tuple[int, ...], ranks: tuple[int, int]) -> int:
    return ranks[1] if len(shape) == 4 and shape[2:] != (1, 1) else ranks[0]


def lora_from_factors(name: str, up_OR: Tensor, down_RN: Tensor, shape: tuple[int, ...]) -> ModuleWeights:
    """Return a LoRA with alpha equal to its rank."""
    alpha = torch.tensor(float(down_RN.shape[0]))
    return ModuleWeights.with_kohyas_keys(name, lora.make_tensors(up_OR.cpu(), down_RN.cpu(), shape, alpha))


def add_norms(name: str, terms: Terms, joining: Joining) -> ModuleWeights:
    total: dict[str, Tensor] = {}
    strengths = joining.strengths([ratio for _, ratio in terms], [1] * len(terms))
    for (module, _), strength in zip(terms, strengths, strict=True):
        for key, tensor in module.tensors.items():
            total[key] = total.get(key, 0) + strength * tensor.float()  # type: ignore[assignment]
    return ModuleWeights.with_kohyas_keys(name, total)


def largest_ranks(adapters: Sequence[Weighted]) -> tuple[int, int] | None:
    """Return the largest (rank, rank of larger convolutions) among all modules; None if no module has a rank.

    LoKr of two whole matrices, OFT and BOFT have no rank.
    """
    modules = [module for adapter in adapters for module in adapter.file.modules.values()]
    ranked = [module for module in modules if module.is_low_rank and not module.layout.is_whole]
    plain = [module.rank for module in ranked if not module.is_larger_kernel]
    conv = [module.rank for module in ranked if module.is_larger_kernel]
    return (max(plain or conv), max(conv or plain)) if ranked else None


def make_metadata(
    adapters: Sequence[Weighted], modules: Sequence[ModuleWeights], save_to: Path, with_modelspec: bool
) -> dict[str, str]:
    """Return the merged LoRA's metadata: base model, ranks, sources."""
    plain = {m.rank for m in modules if m.form == "low_rank"}
    conv = {m.rank for m in modules if m.form == "conv"}
    metadata = {"ss_network_module": "networks.lora"}
    for key in ("ss_v2", "ss_base_model_version", EXPERT, BOUNDARY):
        values = list(dict.fromkeys(a.file.metadata[key] for a in adapters if key in a.file.metadata))
        if len(values) > 1:
            logger.warning("--models were made for different base models: %s is %s", key, " and ".join(values))
        if values:
            metadata[key] = values[0]
    if ranks := plain or conv:
        rank = next(iter(ranks)) if len(ranks) == 1 else None
        metadata |= rank_metadata(rank, next(iter(conv)) if plain and len(conv) == 1 else None)
    files = [adapter.file for adapter in adapters]
    if with_modelspec:
        first = next((f.metadata for f in files if "modelspec.architecture" in f.metadata), {})
        metadata["modelspec.sai_model_spec"] = "1.0.1"
        copied_keys = ("architecture", "implementation", "prediction_type", "resolution")
        metadata.update({key: first[key] for name in copied_keys if (key := f"modelspec.{name}") in first})
        metadata.update(modelspec(save_to, [find_path(file) for file in files]))
    return metadata


def find_path(file: AdapterFile) -> Path:
    """Return the path of a file of --models."""
    # The origin is the path as messages show it, with its flag.
    return Path(file.origin.removeprefix("--models "))


def rank_metadata(rank: int | None, conv_rank: int | None) -> dict[str, str]:
    """Return the metadata of a LoRA with alpha equal to its rank, None if its modules have several; `conv_rank` is that
    of larger convolutions, None to record none."""
    dim, alpha = ("Dynamic", "Dynamic") if rank is None else (str(rank), str(float(rank)))
    metadata = {"ss_network_dim": dim, "ss_network_alpha": alpha}
    if conv_rank is not None:
        arguments = {"conv_dim": str(conv_rank), "conv_alpha": str(float(conv_rank))}
        metadata["ss_network_args"] = json.dumps(arguments)
    return metadata


def modelspec(save_to: Path, sources: Sequence[Path] = ()) -> dict[str, str]:
    """Return title and date of a new file, and the sources of a merged one, as `modelspec.*` keys."""
    return {
        "modelspec.title": save_to.stem,
        "modelspec.date": datetime.now().isoformat(timespec="seconds"),
        **({"modelspec.merged_from": ", ".join(path.stem for path in sources)} if sources else {}),
    }

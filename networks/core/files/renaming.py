"""Adapter files from one naming to another, computing the same.

The generic and the diffusers naming have no alpha: the scale alpha / rank is multiplied into lora_B there. Read back,
such a file has the rank for alpha, so its scale is 1.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.checkpoints.adapter_names import BaseNames, FileNaming, ModuleNames
from networks.core.files.adapter_file import AdapterFile
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.reading_writing import ALPHA, B_NORM, DORA_SCALE, DOWN, UP, W_NORM

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
HELD: Mapping[FileNaming, frozenset[str] | None] = {  # leaves that a naming has a place for; None: all
    "kohya": None,
    "generic": frozenset((DOWN, UP, ALPHA, DORA_SCALE, W_NORM, B_NORM)),
    "diffusers": frozenset((DOWN, UP, ALPHA)),
}
SEPARABLE = frozenset((DORA_SCALE, W_NORM, B_NORM))  # without these the rest of a module still is an adapter


@dataclass(frozen=True)
class Renamed:
    """A file in another naming, and what that took."""

    file: AdapterFile
    dropped: tuple[str, ...]  # keys of the old file that the naming cannot hold
    widened: tuple[str, ...]  # modules whose factors became float32, so that the scale could be multiplied in


def rename(file: AdapterFile, names: BaseNames, to: FileNaming, drop_unsupported: bool = False) -> Renamed:
    """The file in the naming `to`.

    Raises ValueError naming the keys that `to` cannot hold, unless they are to be dropped, and for a file in which one
    module stands twice.
    """
    lost = list(unsupported_keys(file, names, to))
    if lost and not drop_unsupported:
        raise ValueError(
            f"{file.origin}: the {to} naming has no place for {some_keys(lost)}; --drop_unsupported leaves them out, "
            "which changes what the adapter does"
        )
    modules: dict[str, ModuleWeights] = {}
    widened = []
    for found, members in group_by_place(file, names, frozenset(lost)).items():
        dtypes = {member.tensors[DOWN].dtype for member in members if DOWN in member.tensors}
        for name, tensors in in_naming(found, members, to, file.origin):
            modules[name] = ModuleWeights(name, tensors, {leaf: f"{name}.{ending(leaf, to)}" for leaf in tensors})
            if DOWN in tensors and tensors[DOWN].dtype not in dtypes:
                widened.append(name)
    if not modules:
        raise ValueError(f"{file.origin}: the {to} naming can hold none of its {len(file.modules)} modules")
    renamed = file.with_modules(modules.values(), file.metadata)
    return Renamed(AdapterFile(file.origin, renamed.modules, renamed.metadata, {}), tuple(lost), tuple(widened))


def group_by_place(file: AdapterFile, names: BaseNames, lost: frozenset[str]) -> dict[ModuleNames, list[ModuleWeights]]:
    """The modules of a file, less what is lost, by the module of the base model that they are or are a piece of."""
    groups: dict[ModuleNames, list[ModuleWeights]] = {}
    for module in file.modules.values():
        found = names.find(module.name)
        kept = {leaf: tensor for leaf, tensor in module.tensors.items() if module.keys[leaf] not in lost}
        if found is not None and kept:
            groups.setdefault(found, []).append(replace(module, tensors=kept))
    return groups


def in_naming(
    found: ModuleNames, members: Sequence[ModuleWeights], to: FileNaming, origin: str
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, tensors) of one module of the base model, which can be several where diffusers has pieces of it."""
    pieces = {found.piece_of(member.name): member for member in members}
    if len(pieces) < len(members) or (len(members) > 1 and None in pieces):
        raise ValueError(f"{origin} has the module {found.kohya} twice, under different names; remove one of them")
    if None not in pieces and to == "diffusers":
        for i, piece in enumerate(found.pieces):
            if i in pieces:
                yield piece.diffusers, without_alpha(pieces[i])
        return
    whole = pieces[None] if None in pieces else join_pieces(found, pieces, origin)
    if found.swaps_pair and found.is_in_diffusers(whole.name) != (to == "diffusers"):
        whole = replace(whole, tensors=swap_pair(whole.tensors))
    if to == "kohya":
        yield found.kohya, with_alpha_tensor(whole)
    elif to == "generic":
        yield found.generic, without_alpha(whole)
    elif isinstance(found.diffusers, str):
        yield found.diffusers, without_alpha(whole)
    else:
        yield from split_rows(found, without_alpha(whole), origin)


def unsupported_keys(file: AdapterFile, names: BaseNames, to: FileNaming) -> Iterator[str]:
    """The keys that a naming has no place for: whole modules that make no sense without one, and single tensors."""
    for module in file.modules.values():
        found = names.find(module.name)
        if found is None:
            yield from module.keys.values()
            continue
        held = HELD[to]
        if found.piece_of(module.name) is not None:
            held = HELD["diffusers"]  # what is joined from pieces has nothing else
        foreign = [leaf for leaf in module.tensors if held is not None and leaf not in held]
        is_empty = held is not None and module.tensors.keys() == {ALPHA}
        loses_all = is_empty or any(leaf not in SEPARABLE for leaf in foreign)
        yield from (key for leaf, key in module.keys.items() if loses_all or leaf in foreign)
    yield from file.unknown


def with_alpha_tensor(module: ModuleWeights) -> dict[str, Tensor]:
    """The tensors with an alpha of their own and the magnitudes of DoRA in the dimensions of the weight."""
    tensors = dict(module.tensors)
    if module.is_low_rank and ALPHA not in tensors:
        tensors[ALPHA] = torch.tensor(module.alpha, dtype=torch.float32)
    if DORA_SCALE in tensors and DOWN in tensors and tensors[DORA_SCALE].dim() == 1:  # PEFT: one number per output
        tensors[DORA_SCALE] = tensors[DORA_SCALE].view(-1, *(1,) * (tensors[DOWN].dim() - 1))
    return tensors


def without_alpha(module: ModuleWeights) -> dict[str, Tensor]:
    """The tensors with the scale multiplied into lora_up."""
    tensors = {leaf: tensor for leaf, tensor in module.tensors.items() if leaf != ALPHA}
    if module.is_low_rank:
        tensors[UP], tensors[DOWN] = fold_scale(tensors[UP], tensors[DOWN], module.scale)
    return tensors


def split_rows(
    found: ModuleNames, tensors: Mapping[str, Tensor], origin: str
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """One LoRA per piece: each has its rows of lora_up and the same lora_down."""
    up, down = tensors[UP], tensors[DOWN]
    num_shares = sum(piece.share for piece in found.pieces)
    if up.shape[0] % num_shares:
        raise ValueError(f"{origin}: {found.kohya} has {up.shape[0]} outputs, which is no multiple of {num_shares}")
    for piece, rows in zip(found.pieces, rows_of_pieces(found, up.shape[0] // num_shares), strict=True):
        yield piece.diffusers, {DOWN: down.clone(), UP: up[rows].clone()}


def swap_pair(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the halves of the rows exchanged, where there are twice as many rows as inputs."""
    if UP not in tensors or DOWN not in tensors or tensors[UP].shape[0] != 2 * tensors[DOWN].shape[1]:
        return dict(tensors)
    num_rows = tensors[UP].shape[0]
    by_row = [leaf for leaf in (UP, DORA_SCALE) if leaf in tensors and tensors[leaf].shape[0] == num_rows]
    return {**tensors, **{leaf: tensors[leaf].roll(num_rows // 2, 0) for leaf in by_row}}


def rows_of_pieces(found: ModuleNames, unit: int) -> Iterator[slice]:
    """Where the rows of each piece lie, `unit` for every share."""
    first = 0
    for piece in found.pieces:
        yield slice(first, first + piece.share * unit)
        first += piece.share * unit


def join_pieces(found: ModuleNames, pieces: Mapping[int | None, ModuleWeights], origin: str) -> ModuleWeights:
    """One LoRA for all pieces: exact at the same rank where they share lora_down, else at the sum of their ranks.

    The rows of a piece that the file lacks are zero.
    """
    folded = {i: without_alpha(module) for i, module in pieces.items()}
    units = {folded[i][UP].shape[0] / piece.share for i, piece in enumerate(found.pieces) if i in folded}
    if len(units) > 1 or not next(iter(units)).is_integer():
        raise ValueError(f"{origin}: the sizes of the pieces of {found.kohya} do not fit together")
    downs = [tensors[DOWN] for tensors in folded.values()]
    ups = [tensors[UP] for tensors in folded.values()]
    is_shared = all(torch.equal(down, downs[0]) for down in downs)
    down = downs[0] if is_shared else torch.cat(downs)
    dtype = torch.float32 if any(up.dtype == torch.float32 for up in ups) else down.dtype
    rows = list(rows_of_pieces(found, int(next(iter(units)))))
    up = torch.zeros(rows[-1].stop, down.shape[0], dtype=dtype)
    for n, i in enumerate(folded):
        assert i is not None
        first = 0 if is_shared else sum(down.shape[0] for down in downs[:n])
        up[rows[i], first : first + ups[n].shape[1]] = ups[n].to(dtype)
    tensors = {DOWN: down.to(dtype), UP: up}
    return ModuleWeights(found.kohya, tensors, {leaf: f"{found.kohya}.{leaf}" for leaf in tensors})


def fold_scale(up: Tensor, down: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(scale * up, down), in their dtype where that is exact and in float32 where it is not.

    A power of two is exact in every dtype unless the product becomes too small for it. In float32 every product of a
    float16 or bfloat16 number and a scale of up to 13 binary digits is exact, others are rounded to 24 digits. Both
    factors get the same dtype, since PEFT multiplies them as they are.
    """
    if scale == 1:
        return up, down
    exact = up.double() * scale
    for dtype in (up.dtype, torch.float32):
        folded = exact.to(dtype)
        if dtype == torch.float32 or torch.equal(folded.double(), exact):
            break
    is_wider = folded.dtype != up.dtype
    return (folded, down.float()) if is_wider else (folded, down)


def ending(leaf: str, naming: FileNaming) -> str:
    """The end of a key."""
    return leaf if naming == "kohya" else {DOWN: LORA_A, UP: LORA_B}.get(leaf, leaf)


def some_keys(keys: Iterable[str], most: int = 6) -> str:
    """Keys in a sentence; of many a few, with one of each kind before the second of any."""
    keys = list(keys)
    if len(keys) <= most:
        return ", ".join(keys)
    first_of_kind = {key.removesuffix(".weight").rpartition(".")[2]: key for key in reversed(keys)}
    ordered = [*reversed(first_of_kind.values()), *(key for key in keys if key not in first_of_kind.values())]
    return f"{len(keys)} keys: {', '.join(ordered[:most])} and {len(keys) - most} more"

"""Conversion of adapter files from one naming to another, with the same effect.

The generic and the diffusers naming have no alpha: the scale alpha / rank is multiplied into lora_B. When such a file
is read, alpha is the rank, so its scale is 1.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.base.errors import UserError
from library.checkpoints.adapter_names import BaseNames, FileNaming, ModuleNames
from networks.core.changes import qkv_rows
from networks.core.changes.dora import are_per_output
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE
from networks.core.changes.qkv_pieces import rows_name
from networks.core.files.adapter_file import AdapterFile
from networks.core.files.module_weights import ModuleWeights, make_name_error
from networks.core.kinds import lora, norm, oft_v2
from networks.core.registry.layouts import list_held_keys

SEPARABLE = frozenset((DORA_SCALE, *norm.LAYOUT.keys))  # a module is still an adapter without these


@dataclass(frozen=True)
class Renamed:
    """A file in another naming, and the side effects of the conversion."""

    file: AdapterFile
    dropped: tuple[str, ...]  # keys of the old file that the naming does not support
    widened: tuple[str, ...]  # modules with factors that became float32, to multiply the scale in


def rename(
    file: AdapterFile, names: BaseNames, to: FileNaming, drop_unsupported: bool = False, keeps_pieces: bool = False
) -> Renamed:
    """Convert a file to the naming `to`.

    With `keeps_pieces`, layers that only diffusers splits get the layout PIECES if their factors cannot be joined to
    those of one layer. Raises UserError for keys that `to` does not support, unless `drop_unsupported`, and for a
    module that occurs twice.
    """
    if not keeps_pieces and not drop_unsupported and to != "diffusers":
        refuse_apart(file, names)
    unsupported = list(find_unsupported_keys(file, names, to, keeps_pieces))
    if unsupported and not drop_unsupported:
        raise UserError(
            f"{file.origin}: the {to} naming has no place for {list_some_keys(unsupported)}; `tools/convert_lora.py "
            "--drop_unsupported` leaves them out, which changes what the adapter does"
        )
    modules: dict[str, ModuleWeights] = {}
    widened = []
    groups = group_by_place(file, names, frozenset(unsupported))
    wholes = join_groups(groups, names, file.origin) if to == "diffusers" else {}
    # If the parts of one layer stay apart, those of all layers do, so that the network can be saved under the file's
    # names.
    are_apart = keeps_pieces and any(is_apart(entry, members) for entry, members in groups.items())
    for entry, members in (*groups.items(), *wholes.items()):
        dtypes = {dtype for member in members for dtype in qkv_rows.dtypes_of(member.tensors)}
        # In a layer that diffusers joins, the generic name is diffusers'.
        naming = "generic" if entry in wholes else to
        for name, tensors in rename_module(entry, members, naming, file.origin, are_apart):
            is_peft_dora = to == "diffusers" and DORA_SCALE in tensors and are_per_output(tensors[DORA_SCALE].shape)
            if is_peft_dora:
                tensors = {**tensors, DORA_SCALE: qkv_rows.to_peft_magnitudes(tensors[DORA_SCALE])}
            keys = {key: f"{name}.{ending(key, to, is_peft_dora)}" for key in tensors}
            modules[name] = ModuleWeights(name, tensors, keys, origin=file.origin)
            if not dtypes >= qkv_rows.dtypes_of(tensors):
                widened.append(name)
    if not modules:
        raise UserError(f"{file.origin}: the {to} naming can hold none of its {len(file.modules)} modules")
    renamed = file.with_modules(modules.values(), file.metadata)
    return Renamed(AdapterFile(file.origin, renamed.modules, renamed.metadata, {}), tuple(unsupported), tuple(widened))


def to_saved_naming(file: AdapterFile, names: BaseNames) -> AdapterFile:
    """Return a file in kohya's naming under the names that its base model's adapters are saved with.

    It is returned as it is if some module is not a plain LoRA of a known layer and no program reads its kind under
    those names.
    """
    naming = names.saved_naming
    if naming == "kohya":
        return file
    plain = [m for m in file.modules.values() if m.layout is lora.LAYOUT and not m.is_dora and names.find(m.name)]
    # Only some base models have programs that read LoHa, LoKr and DoRA under other names than kohya's.
    fits = names.holds_all_kinds_in_diffusers and not any(find_unsupported_keys(file, names, naming))
    return rename(file, names, naming).file if fits or len(plain) == len(file.modules) else file


def group_by_place(
    file: AdapterFile, names: BaseNames, unsupported: frozenset[str]
) -> dict[ModuleNames, list[ModuleWeights]]:
    """Group a file's modules, without the keys in `unsupported`, by the base model's module that contains them."""
    groups: dict[ModuleNames, list[ModuleWeights]] = {}
    for module in file.modules.values():
        entry = names.find(module.name)
        kept = {key: tensor for key, tensor in module.tensors.items() if module.keys[key] not in unsupported}
        if entry is not None and kept:
            groups.setdefault(entry, []).append(replace(module, tensors=kept))
    return groups


def join_groups(
    groups: dict[ModuleNames, list[ModuleWeights]], names: BaseNames, origin: str
) -> dict[ModuleNames, list[ModuleWeights]]:
    """Move the parts of layers that diffusers joins out of `groups`, and return them by layer.

    Raises UserError for parts that cannot be joined to one adapter.
    """
    wholes: dict[ModuleNames, list[ModuleWeights]] = {}
    for entry in list(groups):
        whole = names.whole_in_diffusers(entry)
        if whole is not None:
            wholes.setdefault(whole, []).extend(groups.pop(entry))
    for whole, members in wholes.items():
        if not can_join(whole, members):
            raise UserError(
                f"{origin}: diffusers has {members[0].name} and others as one layer, {whole.generic}, and "
                f"{'DoRA' if members[0].is_dora else members[0].layout.words} of parts cannot be joined",
                "use another naming, or leave these layers out",
            )
    return wholes


def rename_module(
    entry: ModuleNames, members: Sequence[ModuleWeights], to: FileNaming, origin: str, are_apart: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (name, tensors) of one module of the base model; several if diffusers splits it.

    With `are_apart`, parts stay separate even if they could be joined.
    """
    pieces = {entry.piece_of(member.name): member for member in members}
    if len(pieces) < len(members) or (len(members) > 1 and None in pieces):
        raise make_name_error(origin, entry.kohya)
    if None not in pieces and to == "diffusers":
        for i, piece in enumerate(entry.pieces):
            if i in pieces:
                yield piece.diffusers, fold_alpha(pieces[i])
        return
    if None not in pieces and (are_apart or not can_join(entry, pieces.values())):
        yield entry.kohya, split_into_rows(entry, pieces)
        return
    whole = pieces[None] if None in pieces else join_pieces(entry, pieces, origin)
    # diffusers stores scale before shift in these modulation layers, other programs shift before scale.
    if entry.swaps_pair and entry.is_in_diffusers(whole.name) != (to == "diffusers"):
        whole = swap_halves(whole, origin)
    if to == "kohya":
        yield entry.kohya, with_alpha_tensor(whole)
    elif to == "generic":
        yield entry.generic, fold_alpha(whole)
    elif isinstance(entry.diffusers, str):
        yield entry.diffusers, fold_alpha(whole)
    else:
        yield from split_rows(entry, fold_alpha(whole), origin)


def can_join(entry: ModuleNames, pieces: Collection[ModuleWeights]) -> bool:
    """Return True if parts can be joined to one LoRA: plain ones, or all parts with magnitudes per output."""
    if not all(piece.layout is lora.LAYOUT for piece in pieces):
        return False
    num_dora = sum(piece.is_dora for piece in pieces)
    return num_dora == 0 or (all(p.is_dora_per_output for p in pieces) and len(pieces) == len(entry.pieces))


def is_apart(entry: ModuleNames, members: Sequence[ModuleWeights]) -> bool:
    """Return True if these are parts of a layer that cannot be joined to one adapter."""
    pieces = [m for m in members if entry.piece_of(m.name) is not None and m.layout.read is not None]
    return bool(pieces) and not can_join(entry, pieces)


def split_into_rows(entry: ModuleNames, pieces: Mapping[int | None, ModuleWeights]) -> dict[str, Tensor]:
    """Return each part as a change of its own rows."""
    tensors = {}
    for i in range(len(entry.pieces)):
        if i in pieces:
            piece_tensors = with_alpha_tensor(pieces[i])
            piece_tensors |= {ALPHA: piece_tensors[ALPHA].reshape(())} if ALPHA in piece_tensors else {}
            tensors.update(
                {f"{rows_name(*split_shares(entry, i))}.{key}": tensor for key, tensor in piece_tensors.items()}
            )
    return tensors


def split_shares(entry: ModuleNames, i: int) -> tuple[int, int, int]:
    """Return (first, end, total) of the rows of part i, in units that all parts have in common."""
    shares = [piece.share for piece in entry.pieces]
    return sum(shares[:i]), sum(shares[: i + 1]), sum(shares)


def refuse_apart(file: AdapterFile, names: BaseNames) -> None:
    """Raise UserError for parts of a layer that cannot be joined to one adapter."""
    for entry, members in group_by_place(file, names, frozenset()).items():
        if is_apart(entry, members):
            module = next((m for m in members if m.is_dora or m.layout is not lora.LAYOUT), members[0])
            kind = "DoRA" if module.is_dora else module.layout.words
            raise UserError(
                f"{file.origin}: {module.name} is {kind} of a part of {entry.kohya}, which is one layer outside of "
                "diffusers and has no such factors there. With --dim_from_weights it can be trained further. "
                "It can be merged: into a checkpoint, with --base_weights, or into a LoRA with tools/merge_lora.py "
                "--base_model and --new_rank"
            )


def swap_halves(module: ModuleWeights, origin: str) -> ModuleWeights:
    """Exchange the halves of the rows, if there are twice as many rows as inputs.

    Raises UserError for a kind that does not support it.
    """
    if module.layout is oft_v2.LAYOUT:  # rotates inputs, for all rows alike
        return module
    # Modulation layers of more than two parts have one order everywhere.
    if module.layout.shape_of is not None and module.shape[0] != 2 * module.shape[1]:
        return module
    swapped = None if module.layout.shape_of is None else qkv_rows.swap_halves(module.tensors)
    if swapped is None:
        raise UserError(
            f"{origin}: the halves of the rows of {module.name} have another order in diffusers, and its "
            f"{module.layout.words} cannot be brought into it",
            "leave this layer out",
        )
    return replace(module, tensors=swapped)


def find_unsupported_keys(
    file: AdapterFile, names: BaseNames, to: FileNaming, keeps_pieces: bool = False
) -> Iterator[str]:
    """Yield the keys that a naming does not support: all keys of a module that needs one of them, else single keys."""
    holding_naming: FileNaming = "generic" if to == "diffusers" and names.holds_all_kinds_in_diffusers else to
    for module in file.modules.values():
        entry = names.find(module.name)
        if entry is None:
            yield from module.keys.values()
            continue
        # Joined parts support only the keys that diffusers has.
        is_piece = entry.piece_of(module.name) is not None
        held = list_held_keys("diffusers" if is_piece else holding_naming)
        if held is not None and module.layout is lora.LAYOUT and module.is_dora_per_output:
            held |= {DORA_SCALE}  # PEFT has magnitudes of this kind only
        if is_piece and keeps_pieces and module.layout.read is not None:
            held = module.layout.keys | {ALPHA}
        foreign = [parameter_key for parameter_key in module.tensors if held is not None and parameter_key not in held]
        is_empty = held is not None and module.tensors.keys() == {ALPHA}
        loses_all = is_empty or any(parameter_key not in SEPARABLE for parameter_key in foreign)
        yield from (key for parameter_key, key in module.keys.items() if loses_all or parameter_key in foreign)
    yield from file.unknown


def with_alpha_tensor(module: ModuleWeights) -> dict[str, Tensor]:
    """Return the tensors with an alpha tensor, and with magnitudes in the dimensions of the weight."""
    tensors = dict(module.tensors)
    if module.layout.has_alpha and ALPHA not in tensors:
        tensors[ALPHA] = torch.tensor(module.alpha, dtype=torch.float32)
    if DORA_SCALE in tensors and module.layout.shape_of is not None:
        tensors[DORA_SCALE] = module.magnitudes
    return tensors


def fold_alpha(module: ModuleWeights) -> dict[str, Tensor]:
    """Return the tensors with the scale multiplied into one of them."""
    tensors = {key: tensor for key, tensor in module.tensors.items() if key != ALPHA}
    if DORA_SCALE in tensors and module.layout.shape_of is not None:
        tensors[DORA_SCALE] = module.magnitudes
    return fold_scale(tensors, module.layout.scaled, module.scale) if module.layout.scaled else tensors


def split_rows(
    entry: ModuleNames, tensors: Mapping[str, Tensor], origin: str
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (name, tensors) of one LoRA per part."""
    num_rows, num_shares = qkv_rows.num_rows(tensors), sum(piece.share for piece in entry.pieces)
    if num_rows % num_shares:
        raise UserError(f"{origin}: {entry.kohya} has {num_rows} outputs, which is no multiple of {num_shares}")
    for piece, rows in zip(entry.pieces, entry.rows_of_pieces(num_rows // num_shares), strict=True):
        yield piece.diffusers, qkv_rows.take_rows(tensors, rows)


def join_pieces(entry: ModuleNames, pieces: Mapping[int | None, ModuleWeights], origin: str) -> ModuleWeights:
    """Join the LoRAs of all parts to one. Rows of parts that the file lacks are zero.

    Raises UserError if the sizes of the parts do not fit together.
    """
    folded = {i: fold_alpha(module) for i, module in pieces.items() if i is not None}
    units = {qkv_rows.num_rows(folded[i]) / piece.share for i, piece in enumerate(entry.pieces) if i in folded}
    if len(units) > 1 or not next(iter(units)).is_integer():
        raise UserError(f"{origin}: the sizes of the pieces of {entry.kohya} do not fit together")
    tensors = qkv_rows.join_rows(folded, entry.rows_of_pieces(int(next(iter(units)))))
    return ModuleWeights.with_kohyas_keys(entry.kohya, tensors)


def fold_scale(tensors: Mapping[str, Tensor], scaled: str, scale: float) -> dict[str, Tensor]:
    """Multiply `scale` into one tensor, in its dtype if that is exact, else with all tensors in float32.

    A power of two is exact in every dtype unless the product underflows. In float32 every product of a float16 or
    bfloat16 number and a scale of up to 13 binary digits is exact; others are rounded to 24 digits. All tensors except
    magnitudes get the same dtype, since PEFT multiplies them as they are.
    """
    if scale == 1:
        return dict(tensors)
    exact = tensors[scaled].double() * scale
    folded = exact.to(tensors[scaled].dtype)
    if torch.equal(folded.double(), exact):
        return {**tensors, scaled: folded}
    wide = {key: tensor if key == DORA_SCALE else tensor.float() for key, tensor in tensors.items()}
    return {**wide, scaled: exact.float()}


def ending(key: str, naming: FileNaming, is_peft_dora: bool) -> str:
    if is_peft_dora and key == DORA_SCALE:
        return qkv_rows.PEFT_MAGNITUDES_IN_MEMORY
    return key if naming == "kohya" else qkv_rows.SPELLED_ELSEWHERE.get(key, key)


def list_some_keys(keys: Iterable[str], limit: int = 6) -> str:
    """Format keys for a sentence. Of many, show a few, one of each kind first."""
    keys = list(keys)
    if len(keys) <= limit:
        return ", ".join(keys)
    # Reversed, so that of each kind the first key of the file is kept.
    first_of_kind = {key.removesuffix(".weight").rpartition(".")[2]: key for key in reversed(keys)}
    ordered = [*reversed(first_of_kind.values()), *(key for key in keys if key not in first_of_kind.values())]
    return f"{len(keys)} keys: {', '.join(ordered[:limit])} and {len(keys) - limit} more"

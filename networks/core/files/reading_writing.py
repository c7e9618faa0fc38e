"""Adapters to and from files.

`<module>.lora_down.weight`, `<module>.lora_up.weight` and `<module>.alpha`; with them `<module>.lora_mid.weight` for a
Tucker core and `<module>.dora_scale` for DoRA; `<module>.w_norm` and `<module>.b_norm` for a normalisation layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from library.checkpoints.adapter_keys import AdapterKey, naming_of
from library.checkpoints.files import (
    file_in_folder,
    is_safetensors,
    load_state_dict,
    save_pickle_state_dict,
    save_safetensors,
)
from library.checkpoints.hashes import with_hashes
from library.errors import UserError
from networks.core.changes.adapter import Adapter
from networks.core.changes.alpha import ScaledDelta
from networks.core.changes.change import StoredOtherwise, in_shape_of
from networks.core.changes.dora import are_per_output
from networks.core.changes.orthogonal import Orthogonal
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE
from networks.core.files.module_weights import ModuleWeights
from networks.core.kinds import norm
from networks.core.kinds.kind import Kind
from networks.core.kinds.qkv_pieces import by_rows, is_in_rows, whole_and_leaf
from networks.core.kinds.rotations.oft import OrthogonalOutputs
from networks.core.kinds.table import KINDS, PIECES, SHARED, kind_of

WITHOUT_THEM = (
    "`tools/convert_lora.py --to kohya --drop_unsupported` writes it without them, which changes what it does"
)
EXACT = frozenset(leaf for kind in KINDS for leaf in kind.exact)  # what no --save_precision rounds


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's weights."""

    source: str
    num_loaded: int  # modules
    missing: tuple[str, ...]  # modules of the network that the file lacks
    unknown: tuple[str, ...]  # modules of the file that the network lacks
    alphas: tuple[str, ...]  # what changed because the file has another alpha than the settings

    def summary(self) -> str:
        """One sentence."""
        return f"{self.source}: {self.num_loaded} modules loaded" + (f"; {self.alphas[0]}" if self.alphas else "")

    def warnings(self) -> Iterator[str]:
        """A sentence for each thing that a user should know."""
        if self.missing:
            yield f"{self.source} lacks {_some(self.missing)}; they start untrained"
        if self.unknown:
            yield f"{self.source} has weights for {_some(self.unknown)}, which this network does not train; not used"


def read_adapters(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter file, or of a folder by PEFT. Raises UserError for a file that cannot be read."""
    return load_state_dict(file_in_folder(Path(path), str(path)))


def group_by_module(
    tensors: Mapping[str, Tensor], source: str, kinds: Sequence[Kind] = KINDS
) -> dict[str, dict[str, Tensor]]:
    """Module name -> the rest of the key -> tensor.

    Raises UserError for a file of another kind than `kinds` or with other names, saying what to do.
    """
    refuse_strangers(tensors, source)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".")
        if (found := AdapterKey.parse(key)) is not None:
            module, leaf = whole_and_leaf(found.module, found.ending)  # other spellings are brought to these before
        groups.setdefault(module, {})[leaf] = tensor
    known = leaves_of(kinds)
    own = {leaf for group in groups.values() for leaf in group if PIECES not in kinds or not is_in_rows((leaf,))}
    foreign = sorted(own - set(known))
    if foreign:
        door = next((kind.door for kind in KINDS if kind.door and foreign[0] in kind.leaves), "")
        way_out = "For files made by LyCORIS use --network_module lycoris.kohya"
        raise UserError(
            f"{source} has keys such as *.{foreign[0]} that this network module cannot use; it reads "
            f"{', '.join(f'*.{leaf}' for leaf in known)}. " + (f"Use --network_module {door}" if door else way_out)
        )
    for module, group in groups.items():
        check_complete(module, group, source)
        if group.keys() - SHARED:
            weights = ModuleWeights(module, group, {leaf: f"{module}.{leaf}" for leaf in group})
            weights.check(source)
            weights.check_values(source)
    return {module: group for module, group in groups.items() if group.keys() - SHARED}


def refuse_strangers(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError for keys that are of no adapter, and for a file whose modules are none of this base model: what
    belongs to it has kohya's names here."""
    parsed = {key: AdapterKey.parse(key) for key in tensors if naming_of(key) != "kohya"}
    unknown = [key for key, found in parsed.items() if found is None]
    if unknown and len(unknown) == len(tensors):
        raise UserError(
            f"{source} has no weights of an adapter (first keys: {', '.join(unknown[:3])}); give a LoRA file"
        )
    if unknown:
        raise UserError(
            f"{source} has {len(unknown)} keys that are of no adapter, the first is {unknown[0]}; {WITHOUT_THEM}"
        )
    elsewhere = list(dict.fromkeys(found.module for found in parsed.values() if found and found.ending != found.leaf))
    if elsewhere:
        raise UserError(
            f"{source}: {len(elsewhere)} of its modules are not in this base model, the first is {elsewhere[0]}; was "
            "it made for another?"
        )


def kinds_of(adapters: Mapping[str, Adapter]) -> tuple[Kind, ...]:
    """What files may hold for a network: the kinds of its door, and norms."""
    changes = [adapter.change for adapter in adapters.values() if not isinstance(adapter.change, norm.Norm)]
    doors = {kind_of(change.state_dict()).door for change in changes if isinstance(change, nn.Module)}
    return tuple(kind for kind in (*KINDS, PIECES) if kind is norm.KIND or kind.door in doors)


def leaves_of(kinds: Sequence[Kind]) -> tuple[str, ...]:
    """Every leaf of some kinds, those they share at the two ends of the first."""
    own = [kind for kind in kinds if kind is not norm.KIND]
    first = (leaf for kind in own for leaf in (*kind.needs, *kind.core, *kind.may_have) if kind.read is not None)
    first = (leaf for leaf in first if leaf not in SHARED)
    return tuple(dict.fromkeys((ALPHA, *first, DORA_SCALE, *norm.KIND.needs, *norm.KIND.may_have)))


def check_complete(module: str, group: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError where a module lacks what its kind needs."""
    kind = kind_of(group)
    if kind is PIECES:
        for name, own in by_rows(group).items():
            check_complete(f"{module}.{name}", own, source)
        return
    if all(leaf in group for leaf in kind.needs) and (kind.needs or group.keys() <= {ALPHA}):
        return
    has = f"{source}: {module} has {' and '.join(group)}"
    if kind.together and any(leaf in group for leaf in kind.ends or kind.needs):
        raise UserError(f"{has}, but {kind.together} belong together")
    raise UserError(f"{has} alone; the file is incomplete")


def rank_and_alpha(group: Mapping[str, Tensor]) -> tuple[int, float]:
    """The rank of one module's weights, and its alpha: the rank where the file has none."""
    kind = kind_of(group)
    assert kind.rank_of is not None
    return kind.rank_of(group), kind.alpha_of(group)


def load_into(adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor], source: str) -> LoadReport:
    """Copy weights into the adapters of the same name.

    A trained strength becomes 1, as the file has it in its factors. Magnitudes that the file lacks are set so that the
    module computes what the file does. Raises UserError when no name fits, or when a shape differs: then nothing has
    been changed.
    """
    groups = {
        name: in_own_form(name, adapters[name], group, source) if name in adapters else group
        for name, group in group_by_module(tensors, source, kinds_of(adapters)).items()
    }
    fitting = [name for name in adapters if name in groups]
    if not fitting:
        raise UserError(
            f"no module of {source} belongs to this network: the file has {_some(list(groups))}, the network "
            f"{_some(list(adapters))}. Was it made for another base model?"
        )
    for name in fitting:
        check_shapes(name, adapters[name], groups[name], source)
    changed = []
    for name in fitting:
        change, group = adapters[name].change, groups[name]
        if isinstance(change, ScaledDelta):
            alpha = float(torch.tensor(rank_and_alpha(group)[1], dtype=torch.float32))
            if alpha != change.alpha_value:
                changed.append(f"alpha is {alpha:g} as in the file, not {change.alpha_value:g}")
        change.load(group)
    return LoadReport(
        source=source,
        num_loaded=len(fitting),
        missing=tuple(name for name in adapters if name not in groups),
        unknown=tuple(name for name in groups if name not in adapters),
        alphas=tuple(dict.fromkeys(changed)),
    )


def in_own_form(name: str, adapter: Adapter, group: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """One module of a file as the adapter has it in memory, such as the blocks of the up factor alone with split_qkv.

    Raises UserError where the file has it in a form that the adapter cannot have.
    """
    change, kind = adapter.change, kind_of(group)
    if not isinstance(change, ScaledDelta) or not kind.is_low_rank:
        return group if kind.own_form is None else kind.own_form(group)
    if not isinstance(change.delta, StoredOtherwise):
        own = change.state_dict()
        return {leaf: in_shape_of(tensor, own[leaf]) if leaf in own else tensor for leaf, tensor in group.items()}
    apart = change.delta.apart(group)
    if apart is None:
        raise UserError(change.delta.refusal(name, rank_and_alpha(group)[0], source))
    return apart


def check_shapes(name: str, adapter: Adapter, group: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError where weights of a file do not fit an adapter."""
    change = adapter.change
    assert isinstance(change, nn.Module)
    own = change.state_dict()
    if isinstance(change, ScaledDelta):
        check_kind(name, change, group, source)
        rank = rank_and_alpha(group)[0]
        if rank != change.delta.rank:
            raise UserError(
                f"{name} has rank {rank} in {source}, but the settings (--network_dim, --network_args) give it rank "
                f"{change.delta.rank}; add --dim_from_weights to take the ranks from the file, or set "
                f"--network_dim={rank}"
            )
    if isinstance(change, Orthogonal) and (size := rank_and_alpha(group)[0]) != change.rotation.block_size:
        raise UserError(
            f"{name} has blocks of {size} in {source}, but the settings (--network_dim, --network_args) give it blocks "
            f"of {change.rotation.block_size}; add --dim_from_weights to take the sizes from the file, or set "
            f"--network_dim={size}"
        )
    for leaf in group:
        if leaf != ALPHA and (leaf not in own or group[leaf].shape != own[leaf].shape):
            needed = f"needs {list(own[leaf].shape)}" if leaf in own else "has none"
            if isinstance(change, (Orthogonal, OrthogonalOutputs)) or fits_layer(name, adapter, group):
                raise UserError(
                    f"{name}.{leaf} has the shape {list(group[leaf].shape)} in {source}, but with these --network_args "
                    f"it {needed}; add --dim_from_weights to take the form from the file"
                )
            raise UserError(
                f"{name}.{leaf} has the shape {list(group[leaf].shape)} in {source}, but the base model {needed}; the "
                "file was made for another base model"
            )


def fits_layer(name: str, adapter: Adapter, group: Mapping[str, Tensor]) -> bool:
    """Whether the change of a file has the size of the layer's weight, however it is stored."""
    shape_of, weight = kind_of(group).shape_of, adapter.target.module.weight
    assert isinstance(weight, Tensor)
    return shape_of is not None and prod(shape_of(name, group)) == weight.numel() and DORA_SCALE not in group


def check_kind(name: str, change: ScaledDelta, group: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError where the file has the module in another form than the settings ask for."""
    kind, own = kind_of(group), kind_of(change.state_dict())
    if kind.door != own.door:
        raise UserError(
            f"{name} is {kind.words} in {source}, but --network_module makes it {own.words}"
            + (f"; use --network_module {kind.door}" if kind.door else "")
        )
    if kind.has_core(group) != change.delta.has_core:
        has, wanted = ("a Tucker core", "True") if kind.has_core(group) else ("no Tucker core", "False")
        raise UserError(
            f"{name} has {has} in {source}; set --network_args use_tucker={wanted}, or add --dim_from_weights to take "
            "the form from the file"
        )
    if kind is not own:
        raise UserError(
            f"{name} is made of {' and '.join(kind.needs)} in {source}, but the settings make it of "
            f"{' and '.join(own.needs)}; add --dim_from_weights to take the form from the file"
        )
    if DORA_SCALE not in group:
        return
    if change.dora_scale is None:
        raise UserError(
            f"{name} has magnitudes (DoRA) in {source}; set --network_args dora_wd=True, or add --dim_from_weights to "
            "take the form from the file"
        )
    if (is_per_output := are_per_output(group[DORA_SCALE])) != change.join.is_per_output:
        raise UserError(
            f"{name} has one magnitude for each {'output' if is_per_output else 'input'} (DoRA) in {source}; set "
            f"--network_args wd_on_output={is_per_output}, or add --dim_from_weights to take the form from the file"
        )


def network_tensors(adapters: Mapping[str, Adapter], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights by key as they are saved: on the CPU, in `dtype` or as they are, magnitudes always as they are.

    Half precision would move every column or row of the base model by its rounding, which is as much as some changes.
    """
    tensors = {}
    for name, adapter in adapters.items():
        for leaf, tensor in adapter.change.leaves().items():
            wanted = tensor.dtype if dtype is None or leaf in EXACT else dtype
            tensors[f"{name}.{leaf}"] = tensor.detach().to("cpu", wanted).contiguous()
    return tensors


def save_network(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """Write adapters, whole or not at all: .safetensors with metadata and both hashes, else a pickled table."""
    if is_safetensors(path):
        save_safetensors(path, tensors, with_hashes(tensors, metadata or {}))
    else:
        save_pickle_state_dict(path, tensors)


def _some(names: Sequence[str]) -> str:
    """A few of many names."""
    if len(names) <= 2:
        return " and ".join(names) or "no modules"
    return f"{len(names)} modules such as {names[0]} and {names[-1]}"

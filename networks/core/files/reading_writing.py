"""Adapters to and from files.

`<module>.lora_down.weight`, `<module>.lora_up.weight` and `<module>.alpha`; with them `<module>.lora_mid.weight` for a
Tucker core and `<module>.dora_scale` for DoRA; `<module>.w_norm` and `<module>.b_norm` for a normalisation layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoints.files import is_safetensors, load_state_dict, save_pickle_state_dict, save_safetensors
from library.checkpoints.hashes import with_hashes
from networks.core.adapter import Adapter
from networks.core.kinds.norm import NormAdapter
from networks.core.kinds.split import SplitRank, expand, fold

ALPHA = "alpha"
DOWN = "lora_down.weight"
UP = "lora_up.weight"
MID = "lora_mid.weight"
DORA_SCALE = "dora_scale"
W_NORM = "w_norm"
B_NORM = "b_norm"
KNOWN = (ALPHA, DOWN, UP, MID, DORA_SCALE, W_NORM, B_NORM)
SCALAR = "scalar"  # of adapters in memory only: files have it multiplied into the up factor

AnyAdapter = Adapter | NormAdapter


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
    """The tensors of an adapter file. Raises ValueError for a file that cannot be read."""
    return load_state_dict(path)


def group_by_module(tensors: Mapping[str, Tensor], source: str) -> dict[str, dict[str, Tensor]]:
    """Module name -> the rest of the key -> tensor.

    Raises ValueError for a file of another kind of adapter or with other names, saying what to do.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".")
        groups.setdefault(module, {})[leaf] = tensor
    foreign = sorted({leaf for group in groups.values() for leaf in group} - set(KNOWN))
    if foreign:
        raise ValueError(
            f"{source} has keys such as *.{foreign[0]} that this network module cannot use; it reads "
            f"{', '.join(f'*.{leaf}' for leaf in KNOWN)}. For files made by LyCORIS use --network_module lycoris.kohya"
        )
    for module, group in groups.items():
        if (DOWN in group) != (UP in group):
            raise ValueError(f"{source}: {module} has {' and '.join(group)}, but lora_down and lora_up belong together")
        if (B_NORM in group and W_NORM not in group) or (DOWN not in group and (MID in group or DORA_SCALE in group)):
            raise ValueError(f"{source}: {module} has {' and '.join(group)} alone; the file is incomplete")
    return {module: group for module, group in groups.items() if DOWN in group or W_NORM in group}


def rank_and_alpha(group: Mapping[str, Tensor]) -> tuple[int, float]:
    """The rank of one module's weights, and its alpha: the rank where the file has none."""
    rank = group[DOWN].shape[0]
    alpha = group.get(ALPHA)
    return rank, float(rank if alpha is None else alpha)


def load_into(adapters: Mapping[str, AnyAdapter], tensors: Mapping[str, Tensor], source: str) -> LoadReport:
    """Copy weights into the adapters of the same name.

    A trained strength becomes 1, as the file has it in its factors. Magnitudes that the file lacks are set so that the
    module computes what the file does. Raises ValueError when no name fits, or when a shape differs: then nothing has
    been changed.
    """
    groups = {
        name: in_own_form(name, adapters[name], group, source) if name in adapters else group
        for name, group in group_by_module(tensors, source).items()
    }
    fitting = [name for name in adapters if name in groups]
    if not fitting:
        raise ValueError(
            f"no module of {source} belongs to this network: the file has {_some(list(groups))}, the network "
            f"{_some(list(adapters))}. Was it made for another base model?"
        )
    for name in fitting:
        check_shapes(name, adapters[name], groups[name], source)
    changed = []
    for name in fitting:
        adapter, group = adapters[name], groups[name]
        if isinstance(adapter, NormAdapter):
            adapter.load_state_dict({**adapter.state_dict(), **group})
            continue
        alpha = torch.tensor(rank_and_alpha(group)[1], dtype=torch.float32)
        if float(alpha) != adapter.alpha_value:
            changed.append(f"alpha is {float(alpha):g} as in the file, not {adapter.alpha_value:g}")
        defaults = {SCALAR: torch.ones(())} if adapter.scalar is not None else {}
        if adapter.dora_scale is not None:
            defaults[DORA_SCALE] = adapter.dora_scale
        adapter.load_state_dict({**defaults, **group, ALPHA: alpha})
        if adapter.dora_scale is not None and DORA_SCALE not in group:
            adapter.restart_magnitudes()
    return LoadReport(
        source=source,
        num_loaded=len(fitting),
        missing=tuple(name for name in adapters if name not in groups),
        unknown=tuple(name for name in groups if name not in adapters),
        alphas=tuple(dict.fromkeys(changed)),
    )


def in_own_form(name: str, adapter: AnyAdapter, group: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """One module of a file as the adapter has it in memory: with split_qkv the blocks of the up factor alone.

    Raises ValueError where the file has more than those blocks.
    """
    if not isinstance(adapter, Adapter) or not isinstance(adapter.delta, SplitRank) or DOWN not in group:
        return group
    widths = adapter.delta.widths
    folded = fold(group[UP], widths)
    if folded is None:
        raise ValueError(
            f"{name} is one adapter for all {len(widths)} projections of its layer in {source}; split_qkv trains one "
            "for each. Set --network_args split_qkv=False to train it further as it is"
        )
    alpha = rank_and_alpha(group)[1]
    return {**group, UP: folded, ALPHA: torch.tensor(alpha / len(widths), dtype=torch.float32)}


def check_shapes(name: str, adapter: AnyAdapter, group: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError where weights of a file do not fit an adapter."""
    own = adapter.state_dict()
    if isinstance(adapter, Adapter):
        check_kind(name, adapter, group, source)
        rank = group[UP].shape[1]
        if rank != adapter.delta.rank:
            raise ValueError(
                f"{name} has rank {rank} in {source}, but the settings (--network_dim, --network_args) give it rank "
                f"{adapter.delta.rank}; add --dim_from_weights to take the ranks from the file, or set "
                f"--network_dim={rank}"
            )
    for leaf in group:
        if leaf != ALPHA and (leaf not in own or group[leaf].shape != own[leaf].shape):
            needed = f"needs {list(own[leaf].shape)}" if leaf in own else "has none"
            raise ValueError(
                f"{name}.{leaf} has the shape {list(group[leaf].shape)} in {source}, but the base model {needed}; the "
                "file was made for another base model"
            )


def check_kind(name: str, adapter: Adapter, group: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError where the file has the module in another form than the settings ask for."""
    if (MID in group) != (MID in adapter.state_dict()):
        has, wanted = ("a Tucker core", "True") if MID in group else ("no Tucker core", "False")
        raise ValueError(
            f"{name} has {has} in {source}; set --network_args use_tucker={wanted}, or add --dim_from_weights to take "
            "the form from the file"
        )
    if DORA_SCALE not in group:
        return
    if group[DORA_SCALE].shape[:1] != (1,) and group[DORA_SCALE].numel() != 1:
        raise ValueError(
            f"{name}.{DORA_SCALE} has the shape {list(group[DORA_SCALE].shape)} in {source}: one magnitude for each "
            "output (PEFT, LyCORIS with wd_on_output=True). Here there is one for each input, (1, inputs), which is "
            "what inference programs apply exactly; the one cannot be turned into the other"
        )
    if adapter.dora_scale is None:
        raise ValueError(
            f"{name} has magnitudes (DoRA) in {source}; set --network_args dora_wd=True, or add --dim_from_weights to "
            "take the form from the file"
        )


def network_tensors(adapters: Mapping[str, AnyAdapter], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights by key as they are saved: on the CPU, in `dtype` or as they are, magnitudes always as they are.

    Half precision would move every column of the base model by its rounding, which is as much as some changes.
    """
    tensors = {}
    for name, adapter in adapters.items():
        for leaf, tensor in file_tensors(adapter).items():
            wanted = tensor.dtype if dtype is None or leaf == DORA_SCALE else dtype
            tensors[f"{name}.{leaf}"] = tensor.detach().to("cpu", wanted).contiguous()
    return tensors


def file_tensors(adapter: AnyAdapter) -> dict[str, Tensor]:
    """The tensors of one adapter by their names in files; a trained strength is multiplied into the up factor."""
    tensors = dict(adapter.state_dict())
    if isinstance(adapter, NormAdapter):
        return tensors
    if not tensors[ALPHA].is_meta:
        tensors[ALPHA] = torch.tensor(adapter.alpha_value, dtype=torch.float32)
    if SCALAR in tensors:
        tensors[UP] = tensors[UP] * tensors.pop(SCALAR)
    if isinstance(adapter.delta, SplitRank):
        tensors[UP] = expand(tensors[UP], adapter.delta.widths)
        tensors[ALPHA] = tensors[ALPHA] * len(adapter.delta.widths)
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

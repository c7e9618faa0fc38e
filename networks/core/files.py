"""Adapters to and from files: `<module>.lora_down.weight`, `<module>.lora_up.weight`, `<module>.alpha`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoints.files import is_safetensors, load_state_dict, save_pickle_state_dict, save_safetensors
from library.checkpoints.hashes import with_hashes
from networks.core.adapter import Adapter

ALPHA = "alpha"
DOWN = "lora_down.weight"
UP = "lora_up.weight"
KNOWN = (ALPHA, DOWN, UP)


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
            f"{source} has keys such as *.{foreign[0]} that this network module cannot use; it reads *.{DOWN}, *.{UP} "
            f"and *.{ALPHA}. For files made by LyCORIS use --network_module lycoris.kohya"
        )
    for module, group in groups.items():
        if (DOWN in group) != (UP in group):
            raise ValueError(f"{source}: {module} has {' and '.join(group)}, but lora_down and lora_up belong together")
    return {module: group for module, group in groups.items() if DOWN in group}


def rank_and_alpha(group: Mapping[str, Tensor]) -> tuple[int, float]:
    """The rank of one module's weights, and its alpha: the rank where the file has none."""
    rank = group[DOWN].shape[0]
    alpha = group.get(ALPHA)
    return rank, float(rank if alpha is None else alpha)


def load_into(adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor], source: str) -> LoadReport:
    """Copy weights into the adapters of the same name.

    Raises ValueError when no name fits, or when a shape differs: then nothing has been changed.
    """
    groups = group_by_module(tensors, source)
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
        alpha = torch.tensor(rank_and_alpha(group)[1], dtype=torch.float32)
        if float(alpha) != adapter.alpha_value:
            changed.append(f"alpha is {float(alpha):g} as in the file, not {adapter.alpha_value:g}")
        adapter.load_state_dict({**group, ALPHA: alpha})
    return LoadReport(
        source=source,
        num_loaded=len(fitting),
        missing=tuple(name for name in adapters if name not in groups),
        unknown=tuple(name for name in groups if name not in adapters),
        alphas=tuple(dict.fromkeys(changed)),
    )


def check_shapes(name: str, adapter: Adapter, group: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError where weights of a file do not fit an adapter."""
    own = adapter.state_dict()
    rank = group[DOWN].shape[0]
    if rank != adapter.delta.rank:
        raise ValueError(
            f"{name} has rank {rank} in {source}, but the settings (--network_dim, --network_args) give it rank "
            f"{adapter.delta.rank}; add --dim_from_weights to take the ranks from the file, or set --network_dim={rank}"
        )
    for leaf in (DOWN, UP):
        if group[leaf].shape != own[leaf].shape:
            raise ValueError(
                f"{name}.{leaf} has the shape {list(group[leaf].shape)} in {source}, but the base model needs "
                f"{list(own[leaf].shape)}; the file was made for another base model"
            )


def network_tensors(adapters: Mapping[str, Adapter], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights by key as they are saved: on the CPU, in `dtype` or as they are."""
    tensors = {}
    for name, adapter in adapters.items():
        for leaf, tensor in adapter.state_dict().items():
            if leaf == ALPHA and not tensor.is_meta:
                tensor = torch.tensor(adapter.alpha_value, dtype=torch.float32)
            tensors[f"{name}.{leaf}"] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
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

"""Names that another program's file has for the modules of a network, under which the network is saved again.

kohya's names have no place for separate q, k and v, which are one layer there. A network made from a file with separate
ones is saved under the names of that file, so that the program that wrote it can read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from library.checkpoints.adapter_names import BaseNames, add_missing_prefixes
from networks.core.changes import qkv_rows
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE
from networks.core.changes.qkv_pieces import ROWS_KEY, rows_name
from networks.core.files.adapter_file import AdapterFile
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.renaming import fold_alpha, split_shares, swap_halves


@dataclass(frozen=True)
class Spelled:
    """One module as the file names it."""

    name: str
    keys: Mapping[str, str]  # by parameter key
    is_swapped: bool  # the halves of its rows are exchanged in the file


@dataclass(frozen=True)
class FileSpelling:
    """Names of a file's modules by their names in the network."""

    modules: Mapping[str, Spelled]

    def restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a network under the keys of the file.

        If a module has no alpha in the file, its scale is multiplied into one of its factors.
        """
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            module, _, parameter_key = key.partition(".")  # kohya's names have no dots
            if (rows := ROWS_KEY.fullmatch(parameter_key)) is not None:
                module, parameter_key = f"{module}.{rows[1]}", rows[5]
            groups.setdefault(module, {})[parameter_key] = tensor
        return {
            key: tensor for name, group in groups.items() for key, tensor in self._restore_module(name, group).items()
        }

    def _restore_module(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        spelled = self.modules[name]
        module = ModuleWeights(spelled.name, tensors, {}, origin=name)
        module = swap_halves(module, name) if spelled.is_swapped else module
        restored = dict(module.tensors)
        if module.layout.has_alpha and ALPHA not in spelled.keys:
            restored = fold_alpha(module)
        # PEFT stores magnitudes in shapes of its own, and the program that wrote the file expects them.
        if DORA_SCALE in restored and qkv_rows.PEFT_MAGNITUDES in spelled.keys.get(DORA_SCALE, ""):
            restored[DORA_SCALE] = qkv_rows.to_peft_magnitudes(restored[DORA_SCALE])
        return {spelled.keys.get(key, f"{spelled.name}.{key}"): tensor for key, tensor in restored.items()}


def recognise_spelling(read: AdapterFile, names: BaseNames) -> FileSpelling:
    """Return the names that a file has for its modules, which must belong to the base model of `names`."""
    full_names = add_missing_prefixes(read.modules.keys(), [names])
    modules = {}
    for name, module in read.modules.items():
        full_name = full_names.get(name, name)
        entry = names.find(full_name)
        assert entry is not None
        piece = entry.piece_of(full_name)
        network_name = entry.kohya if piece is None else f"{entry.kohya}.{rows_name(*split_shares(entry, piece))}"
        is_swapped = entry.swaps_pair and entry.is_in_diffusers(full_name)
        modules[network_name] = Spelled(name, module.keys, is_swapped)
    return FileSpelling(modules)

"""Loading of adapter files into networks, and the tensors that networks save.

Keys are `<module>.lora_down.weight`, `<module>.lora_up.weight` and `<module>.alpha`; with them
`<module>.lora_mid.weight` for a Tucker core and `<module>.dora_scale` for DoRA; `<module>.w_norm` and `<module>.b_norm`
for a normalisation layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from library.base.errors import UserError
from library.checkpoints.adapter_keys import recognise_naming
from library.checkpoints.adapter_names import BaseNames
from networks.core.changes.adapter import Adapter
from networks.core.changes.change import ChangeSize, Converted, get_weight
from networks.core.changes.dora import are_per_output
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE
from networks.core.changes.qkv_pieces import group_by_rows, is_in_rows
from networks.core.files.adapter_file import WITHOUT_THEM, AdapterFile, adapter_tensors, sort_tensors
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.renaming import to_saved_naming
from networks.core.kinds import norm
from networks.core.registry.key_layout import KeyLayout
from networks.core.registry.layouts import PIECES, SHARED, list_layouts, recognise_layout


@dataclass(frozen=True)
class LoadReport:
    """The result of loading a file into a network."""

    source: str
    num_loaded: int  # modules
    missing: tuple[str, ...]  # modules of the network that the file lacks
    unknown: tuple[str, ...]  # modules of the file that the network lacks
    alphas: tuple[str, ...]  # differences between alphas of the file and of the settings

    def summary(self) -> str:
        """Return a summary in one sentence."""
        return f"{self.source}: {self.num_loaded} modules loaded" + (f"; {self.alphas[0]}" if self.alphas else "")

    def warnings(self) -> Iterator[str]:
        """Yield a sentence for each thing that the user should know."""
        if self.missing:
            yield f"{self.source} lacks {_some(self.missing)}; they start untrained"
        if self.unknown:
            yield f"{self.source} has weights for {_some(self.unknown)}, which this network does not train; not used"


def usable_modules(file: AdapterFile, layouts: Sequence[KeyLayout] = ()) -> dict[str, ModuleWeights]:
    """Return the modules of a file that a network can load, without lone alphas.

    Raises UserError with a fix for a layout that is not in `layouts` (default: all), for names of another base model,
    and for incomplete or invalid tensors.
    """
    layouts = layouts or list_layouts()
    check_belongs_to_base(file)
    known = list_keys(layouts)
    keys = {key.removeprefix(f"{name}.") for name, module in file.modules.items() for key in module.keys.values()}
    keys = {parameter_key for parameter_key in keys if PIECES not in layouts or not is_in_rows((parameter_key,))}
    foreign = sorted(keys - set(known))
    if foreign:
        candidates = (layout for layout in list_layouts() if layout.network_module and foreign[0] in layout.keys)
        network_module = next((layout.network_module for layout in candidates), "")
        fix = "For files made by LyCORIS use --network_module lycoris.kohya"
        raise UserError(
            f"{file.origin} has keys such as *.{foreign[0]} that this network module cannot use; it reads "
            f"{', '.join(f'*.{known_key}' for known_key in known)}. "
            + (f"Use --network_module {network_module}" if network_module else fix)
        )
    usable = {}
    for name, module in file.modules.items():
        check_complete(name, module.tensors, file.origin)
        if module.tensors.keys() - SHARED:
            module.check(file.origin)
            module.check_values(file.origin)
            usable[name] = module
    return usable


def check_belongs_to_base(file: AdapterFile) -> None:
    """Raise UserError for keys of no adapter, and for a file with modules that are not in this base model.

    Modules of this base model have kohya's names here.
    """
    unknown = list(file.unknown)
    if unknown and not file.modules:
        raise UserError(
            f"{file.origin} has no weights of an adapter (first keys: {', '.join(unknown[:3])})", "give a LoRA file"
        )
    if unknown:
        raise UserError(
            f"{file.origin} has {len(unknown)} keys that are of no adapter, the first is {unknown[0]}; {WITHOUT_THEM}"
        )
    elsewhere = [
        name
        for name, module in file.modules.items()
        if recognise_naming(name) != "kohya"
        and any(key != f"{name}.{parameter_key}" for parameter_key, key in module.keys.items())
    ]
    if elsewhere:
        raise UserError(
            f"{file.origin}: {len(elsewhere)} of its modules are not in this base model, the first is {elsewhere[0]}; "
            "was it made for another?"
        )


def layouts_for(adapters: Mapping[str, Adapter]) -> tuple[KeyLayout, ...]:
    """Return the layouts that files for a network may have: those of its network module, and norms."""
    changes = [adapter.change for adapter in adapters.values() if adapter.target.kind != "norm"]
    modules = {
        recognise_layout(change.state_dict()).network_module for change in changes if isinstance(change, nn.Module)
    }
    known = (*list_layouts(), PIECES)
    return tuple(layout for layout in known if layout is norm.LAYOUT or layout.network_module in modules)


def list_keys(layouts: Sequence[KeyLayout]) -> tuple[str, ...]:
    """Return every parameter key of some layouts: alpha first, dora_scale and the keys of norms last."""
    readable = [layout for layout in layouts if layout is not norm.LAYOUT and layout.read is not None]
    first = (key for layout in readable for key in (*layout.needs, *layout.core, *layout.may_have) if key not in SHARED)
    return tuple(dict.fromkeys((ALPHA, *first, DORA_SCALE, *norm.LAYOUT.needs, *norm.LAYOUT.may_have)))


def check_complete(module: str, group: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError if a module lacks keys that its layout needs."""
    layout = recognise_layout(group)
    if layout is PIECES:
        for name, piece in group_by_rows(group).items():
            check_complete(f"{module}.{name}", piece, source)
        return
    if all(key in group for key in layout.needs) and (layout.needs or group.keys() <= {ALPHA}):
        return
    start = f"{source}: {module} has {' and '.join(group)}"
    if layout.together and any(key in group for key in layout.ends or layout.needs):
        raise UserError(f"{start}, but {layout.together} belong together")
    raise UserError(f"{start} alone; the file is incomplete")


def rank_and_alpha(group: Mapping[str, Tensor]) -> tuple[int, float]:
    """Return the rank and alpha of one module. Alpha defaults to the rank."""
    layout = recognise_layout(group)
    assert layout.rank_of is not None
    return layout.rank_of(group), layout.alpha_of(group)


def load_into(adapters: Mapping[str, Adapter], file: AdapterFile) -> LoadReport:
    """Load weights into the adapters of the same name.

    A trained strength becomes 1, since files have it in a factor. Magnitudes that the file lacks are set so that the
    layer computes W0 + dW. Raises UserError if no name matches or a shape differs, before anything is changed.
    """
    source = file.origin
    groups = {
        name: to_own_form(name, adapters[name], module.tensors, source) if name in adapters else module.tensors
        for name, module in usable_modules(file, layouts_for(adapters)).items()
    }
    fitting = [name for name in adapters if name in groups]
    if not fitting:
        raise UserError(
            f"no module of {source} belongs to this network: the file has {_some(list(groups))}, the network "
            f"{_some(list(adapters))}. Was it made for another base model?"
        )
    for name in fitting:
        # All modules are checked before one is loaded, so that an error leaves the network as it was.
        check_shapes(name, adapters[name], groups[name], source)
    differences = []
    for name in fitting:
        change, group = adapters[name].change, groups[name]
        if change.size.has_ranks:
            # Networks keep alpha in float32, so an alpha such as 0.1 is compared in that precision.
            alpha = float(torch.tensor(rank_and_alpha(group)[1], dtype=torch.float32))
            if alpha != change.size.alpha:
                differences.append(f"alpha is {alpha:g} as in the file, not {change.size.alpha:g}")
        change.load(group)
    return LoadReport(
        source=source,
        num_loaded=len(fitting),
        missing=tuple(name for name in adapters if name not in groups),
        unknown=tuple(name for name in groups if name not in adapters),
        alphas=tuple(dict.fromkeys(differences)),
    )


def to_own_form(name: str, adapter: Adapter, group: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """Convert one module of a file to its form in memory, for example to the blocks of the up factor with split_qkv.

    Raises UserError if the adapter cannot have the form of the file.
    """
    change, layout = adapter.change, recognise_layout(group)
    if layout.is_low_rank and isinstance(change, Converted):
        return change.in_memory(group, name, source)
    return group if layout.own_form is None else layout.own_form(group)


def check_shapes(name: str, adapter: Adapter, group: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError if weights of a file do not fit an adapter."""
    change = adapter.change
    assert isinstance(change, nn.Module)
    expected, size = change.state_dict(), adapter.change.size
    if size.has_ranks:
        check_layout(name, size, recognise_layout(expected), group, source)
    if size.rank is not None and (rank := rank_and_alpha(group)[0]) != size.rank:
        has, gives, take = (f"rank {rank}", f"rank {size.rank}", "ranks")
        if size.block_sizes:
            has, gives, take = (f"blocks of {rank}", f"blocks of {size.rank}", "sizes")
        raise UserError(
            f"{name} has {has} in {source}, but the settings (--network_dim, --network_args) give it {gives}",
            f"add --dim_from_weights to take the {take} from the file, or set --network_dim={rank}",
        )
    for key in group:
        if key != ALPHA and (key not in expected or group[key].shape != expected[key].shape):
            needed = f"needs {list(expected[key].shape)}" if key in expected else "has none"
            if size.block_sizes or fits_layer(name, adapter, group):
                raise UserError(
                    f"{name}.{key} has the shape {list(group[key].shape)} in {source}, but with these --network_args "
                    f"it {needed}",
                    "add --dim_from_weights to take the form from the file",
                )
            raise UserError(
                f"{name}.{key} has the shape {list(group[key].shape)} in {source}, but the base model {needed}; the "
                "file was made for another base model"
            )


def fits_layer(name: str, adapter: Adapter, group: Mapping[str, Tensor]) -> bool:
    """Return True if the change of a file has the size of the layer's weight, in any layout, and no magnitudes."""
    shape_of, num_values = recognise_layout(group).shape_of, get_weight(adapter.target.module).numel()
    return shape_of is not None and prod(shape_of(name, group)) == num_values and DORA_SCALE not in group


def check_layout(name: str, size: ChangeSize, expected: KeyLayout, group: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError if the file stores the module in another form than the settings request."""
    layout = recognise_layout(group)
    if layout.network_module != expected.network_module:
        raise UserError(
            f"{name} is {layout.words} in {source}, but --network_module makes it {expected.words}"
            + (f"; use --network_module {layout.network_module}" if layout.network_module else "")
        )
    if layout.has_core(group) != size.has_core:
        has, value = ("a Tucker core", "True") if layout.has_core(group) else ("no Tucker core", "False")
        raise UserError(
            f"{name} has {has} in {source}",
            f"set --network_args use_tucker={value}, or add --dim_from_weights to take the form from the file",
        )
    if layout is not expected:
        raise UserError(
            f"{name} is made of {' and '.join(layout.needs)} in {source}, but the settings make it of "
            f"{' and '.join(expected.needs)}",
            "add --dim_from_weights to take the form from the file",
        )
    if DORA_SCALE not in group:
        return
    if not size.magnitudes:
        raise UserError(
            f"{name} has magnitudes (DoRA) in {source}",
            "set --network_args dora_wd=True, or add --dim_from_weights to take the form from the file",
        )
    magnitudes = "output" if (is_per_output := are_per_output(group[DORA_SCALE].shape)) else "input"
    if magnitudes != size.magnitudes:
        raise UserError(
            f"{name} has one magnitude for each {magnitudes} (DoRA) in {source}",
            f"set --network_args wd_on_output={is_per_output}, or add --dim_from_weights to take the form from the "
            "file",
        )


def network_tensors(adapters: Mapping[str, Adapter], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the weights by key as they are saved: on the CPU, in `dtype` or unchanged. Magnitudes are never cast.

    Half precision would change every column or row of the base model by its rounding error, which is as large as some
    changes.
    """
    exact = frozenset(key for layout in list_layouts() for key in layout.exact)
    tensors = {}
    for name, adapter in adapters.items():
        for key, tensor in adapter.change.stored_tensors().items():
            target_dtype = tensor.dtype if dtype is None or key in exact else dtype
            tensors[f"{name}.{key}"] = tensor.detach().to("cpu", target_dtype).contiguous()
    return tensors


def collect_saved_tensors(
    adapters: Mapping[str, Adapter], dtype: torch.dtype | None, names: BaseNames | None
) -> Mapping[str, Tensor]:
    """Return the weights under the names of `to_saved_naming`, on the CPU, in `dtype` or unchanged."""
    if names is not None and names.saved_naming != "kohya":
        # Unrounded: the scale is multiplied in first, and the product is rounded to `dtype` once.
        file = sort_tensors(network_tensors(adapters, None), {}, "the adapter")
        if (renamed := to_saved_naming(file, names)) is not file:
            tensors = adapter_tensors(renamed)
            return tensors if dtype is None else {key: tensor.to(dtype) for key, tensor in tensors.items()}
    return network_tensors(adapters, dtype)


def _some(names: Sequence[str]) -> str:
    """Format a list of names; of more than two only the first and last are shown."""
    if len(names) <= 2:
        return " and ".join(names) or "no modules"
    return f"{len(names)} modules such as {names[0]} and {names[-1]}"

"""Adapter files of any trainer: read into modules, and written back under their original names.

`read_adapter_file(path)` returns an `AdapterFile`, whose `modules` map names to `ModuleWeights` in file order.
`save_adapter_file(path, file, dtype)` writes it with the same keys and metadata and new hashes.

`AdapterKey` parses key names. Module names stay as in the file; `to_underscores` returns their common form for
look-ups. An alpha that is recorded nowhere defaults to the rank.
"""

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.base.errors import UserError, error_in, flagged, naming, of_file
from library.base.json_text import parse_json
from library.checkpoints.adapter_keys import UP_BIASES, AdapterKey, strip_peft_prefix
from library.checkpoints.files import PEFT_STEM, file_in_folder, load_state_dict
from library.checkpoints.hashes import with_hashes
from library.checkpoints.headers import is_safetensors, read_metadata
from library.checkpoints.saving import save_weights
from networks.core.changes.adalora import alpha_of, to_lora
from networks.core.changes.parameter_keys import ALPHA
from networks.core.changes.qkv_pieces import split_piece_key
from networks.core.files.module_weights import ModuleWeights
from networks.core.registry.key_layout import KeyLayout
from networks.core.registry.layouts import PIECES, list_layouts

logger = logging.getLogger(__name__)

BIASES = "PEFT trained them with lora_bias, and merges them into a model with merge_and_unload()"
WITHOUT_THEM = (
    "`tools/convert_lora.py --to kohya --drop_unsupported` writes it without them, which changes what it does"
)
DIFFUSERS_SETTINGS = "lora_adapter_metadata"  # JSON in the metadata of diffusers' files, which includes alpha
PEFT_SETTINGS = "adapter_config.json"  # next to files by PEFT

PeftSettings = Mapping[str, Mapping[str, Any]]
"""PEFT's settings by sub-model ("unet", "text_encoder"); "" is the key for a file by PEFT itself."""
LARGEST_SETTING = 1e9
LONGEST_PATTERN = 1000
SLOW_PATTERN = re.compile(r"\)[*+{]|([*+}].*){4}|\\\d")  # takes exponential time, or cubic and more


@dataclass(frozen=True)
class AdapterFile:
    """Content of one adapter file by module. Flat tables of tensors exist only while files are read and written."""

    origin: str  # the path, for messages
    modules: Mapping[str, ModuleWeights]  # in file order
    metadata: Mapping[str, str]
    unknown: Mapping[str, Tensor]  # by key; tensors of no recognised kind of adapter
    clashes: tuple[tuple[str, str], ...] = ()  # pairs of keys with the same meaning
    peft_settings: PeftSettings | None = None  # of the adapter_config.json next to it

    def with_modules(self, modules: Iterable[ModuleWeights], metadata: Mapping[str, str]) -> "AdapterFile":
        """Return a copy with other modules and metadata; unrecognised keys are kept.

        Settings of diffusers in the metadata are dropped, since their ranks and alphas would be wrong. If they recorded
        an alpha, modules made by `ModuleWeights.with_factors` have it in their factors.
        """
        kept = {key: value for key, value in metadata.items() if key != DIFFUSERS_SETTINGS}
        return replace(self, modules={module.name: module for module in modules}, metadata=kept)


def read_adapter_file(path: str | Path, flag: str = "") -> AdapterFile:
    """Read and check an adapter file in any naming, or a folder written by PEFT.

    Raises UserError naming `flag` if it cannot be read or contains no adapter.
    """
    where = f"{flag} {path}".strip()
    with naming(flag or None, path):
        path = file_in_folder(Path(path), where)
        try:
            with flagged(flag):
                tensors, metadata = load_state_dict(path), read_metadata(path)
        except OSError as error:
            raise error_in(cause="unreadable")(f"{flag}: {error}" if flag else str(error)) from error
        return complete_file(replace(sort_tensors(tensors, metadata, where), peft_settings=peft_settings(path)))


def open_adapter(path: str | Path, tensors: Mapping[str, Tensor] | None = None) -> AdapterFile:
    """Read an adapter file for a network, which checks it. `tensors` are its tensors if they were read before."""
    flat = read_adapters(path) if tensors is None else tensors
    if not Path(path).exists():
        return sort_tensors(flat, {}, str(path))
    file_path = file_in_folder(Path(path), str(path))
    return replace(sort_tensors(flat, read_metadata(file_path), str(path)), peft_settings=peft_settings(file_path))


def read_adapters(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter file, or of a folder written by PEFT. Raises UserError if it cannot be read."""
    return load_state_dict(file_in_folder(Path(path), str(path)))


def sort_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], origin: str) -> AdapterFile:
    """Group the tensors of an adapter file by module, including damaged modules. Keys are parsed only here."""
    groups: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, dict[str, str]] = {}
    unknown: dict[str, Tensor] = {}
    clashes = []
    for key, tensor in to_lora(tensors, origin).items():
        parsed = AdapterKey.parse(key)
        if parsed is None:
            unknown[key] = tensor
            continue
        name, parameter_key = split_piece_key(parsed.module, parsed.leaf)
        if parameter_key in keys.get(name, {}):
            clashes.append((keys[name][parameter_key], key))
        groups.setdefault(name, {})[parameter_key] = tensor
        keys.setdefault(name, {})[parameter_key] = key
    modules = {name: ModuleWeights(name, group, keys[name], origin=origin) for name, group in groups.items()}
    return AdapterFile(origin, modules, dict(metadata), unknown, tuple(clashes))


def parse_adapter(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], origin: str) -> AdapterFile:
    """Group the tensors of an adapter file by module, and check them as in `check_alphas`."""
    return check_alphas(sort_tensors(tensors, metadata, origin))


def check_alphas(file: AdapterFile) -> AdapterFile:
    """Check a file and return it with the alphas that diffusers records in its metadata.

    Raises UserError if there is no adapter, if two keys mean the same, if the tensors of a module do not fit together,
    or if values are not finite.
    """
    for first, second in file.clashes:
        raise UserError(f"{file.origin} has two tensors for the same thing: {first} and {second}")
    settings = diffusers_settings(file.metadata)
    modules = {name: with_alpha(module, settings) for name, module in file.modules.items()}
    for module in modules.values():
        module.check(file.origin)
        module.check_values(file.origin)
    if not modules:
        first_keys = ", ".join(list(file.unknown)[:3]) or "none"
        raise UserError(f"{file.origin} has no weights of an adapter (first keys: {first_keys})", "give a LoRA file")
    return replace(file, modules=modules)


def complete_file(file: AdapterFile) -> AdapterFile:
    """Check a file and return it with the alphas that PEFT records next to it, without lone alphas."""
    file = drop_lone_alphas(check_alphas(file))
    modules = {name: with_alpha(module, file.peft_settings or {}) for name, module in file.modules.items()}
    return replace(file, modules=modules)


def adapter_tensors(file: AdapterFile) -> dict[str, Tensor]:
    """Return all tensors by their keys in the file."""
    tensors = {}
    for module in file.modules.values():
        for parameter_key, tensor in module.tensors.items():
            tensors[module.keys.get(parameter_key, f"{module.name}.{parameter_key}")] = tensor
    return {**tensors, **file.unknown}


def save_adapter_file(
    path: str | Path, file: AdapterFile, dtype: torch.dtype | None = None, mark: str | None = None
) -> None:
    """Write an adapter file atomically, with the command's mark and its floating-point tensors in `dtype` or unchanged.

    .safetensors files include the metadata and new hashes. Other extensions get a pickled state dict without metadata.
    """
    if not is_safetensors(path) and file.metadata:
        logger.warning("%s: this format has no metadata; use .safetensors to keep it", path)
    tensors = {
        key: tensor.detach().to("cpu", dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
        for key, tensor in adapter_tensors(file).items()
    }
    save_network(path, tensors, file.metadata, mark)


def save_network(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, mark: str | None = None
) -> None:
    """Write adapters atomically: .safetensors with metadata and both hashes, otherwise a pickled state dict."""
    save_weights(path, tensors, with_hashes(tensors, metadata or {}) if is_safetensors(path) else None, mark)


COMPUTED: tuple[KeyLayout, ...] = (*(layout for layout in list_layouts() if layout.read is not None), PIECES)


def drop_lone_alphas(file: AdapterFile) -> AdapterFile:
    """Return the file without alphas of modules that have no weights, and warn about them.

    Tools that remove blocks leave such alphas behind.
    """
    lone = [name for name, module in file.modules.items() if module.tensors.keys() == {ALPHA}]
    if not lone or len(lone) == len(file.modules):
        return file
    logger.warning(
        "%s has %d alphas without weights, such as %s; they change nothing and are left out",
        file.origin, len(lone), file.modules[lone[0]].keys[ALPHA],
    )  # fmt: skip
    return replace(file, modules={name: module for name, module in file.modules.items() if name not in lone})


def require_layouts(file: AdapterFile, layouts: Collection[KeyLayout], purpose: str) -> None:
    """Raise UserError unless every module has one of `layouts` and no other tensors, and every key was recognised."""
    other = {module.name: module for module in file.modules.values() if module.layout not in layouts}
    if other:
        name, module = next(iter(other.items()))
        raise UserError(
            f"{file.origin}: {len(other)} modules cannot be {purpose}, the first is {name} ({module.layout.words}: "
            f"{', '.join(module.tensors)})"
        )
    for module in file.modules.values():
        if (unknown_key := module.unexpected_key) is not None:
            raise UserError(
                f"{file.origin} has {module.keys[unknown_key]}, which is not understood beside {module.layout.words}, "
                f"so it cannot be {purpose}",
                "use the program that wrote it",
            )
    if file.unknown:
        advice = BIASES if all(key.endswith(UP_BIASES) for key in file.unknown) else WITHOUT_THEM
        raise UserError(
            f"{file.origin} has {len(file.unknown)} keys that are not understood, so it cannot be {purpose}; the first "
            f"is {next(iter(file.unknown))}. {advice}"
        )


# --- alpha recorded outside the tensors ---


def diffusers_settings(metadata: Mapping[str, str]) -> PeftSettings:
    """Return PEFT's settings by sub-model ("unet", "text_encoder") from the metadata of diffusers' files, or {}."""
    if DIFFUSERS_SETTINGS not in metadata:
        return {}
    try:
        flat = dict(parse_json(metadata[DIFFUSERS_SETTINGS]))
    except (ValueError, TypeError):
        logger.warning("the metadata %s is not JSON; alpha is taken to be the rank", DIFFUSERS_SETTINGS)
        return {}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, setting = str(key).partition(".")
        parts.setdefault(part, {})[setting] = value
    for settings in parts.values():
        check_settings(settings)
    return parts


def peft_settings(path: Path) -> PeftSettings | None:
    """Return PEFT's settings from the adapter_config.json next to a file saved by PEFT, or None.

    Raises UserError if adapter_config.json is damaged.
    """
    settings_path = path.parent / PEFT_SETTINGS
    # Another adapter may lie in the same folder: the settings belong to the file with PEFT's name only.
    if path.stem != PEFT_STEM or not settings_path.is_file():
        return None
    try:
        settings = dict(parse_json(settings_path.read_text(encoding="utf-8")))
        check_settings(settings)
        return {"": settings}
    except (ValueError, TypeError) as error:
        raise of_file(settings_path, cause="unreadable")(f"is damaged: {error}") from error


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError for settings of PEFT that are no numbers, and for patterns that take long."""
    for name in ("alpha_pattern", "rank_pattern"):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(is_pattern, patterns)):
            raise error_in(cause="unreadable")(f"{name} does not map short patterns of layer names to numbers")
        require_numbers(name, [v for v in patterns.values() if not (name == "rank_pattern" and is_mask(v))])
    for name in ("lora_alpha", "alpha", "r"):
        require_numbers(name, [settings[name]] if settings.get(name) is not None else [])


def is_mask(value: Any) -> bool:
    """Return True for what AdaLoRA writes in place of a rank: which of the ranks are left."""
    return isinstance(value, list) and all(isinstance(one, bool) for one in value)


def require_numbers(name: str, values: Iterable[Any]) -> None:
    """Raise UserError unless all values of a setting are numbers that an alpha or a rank may be."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_SETTING:
            raise error_in(cause="unreadable")(f"{name} has {str(value)[:40]!r}, which is no number")


def is_pattern(pattern: str) -> bool:
    """Return True if Python can match a pattern against names in time: without repeated groups and few repetitions."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return len(pattern) <= LONGEST_PATTERN and not SLOW_PATTERN.search(pattern)


def with_alpha(module: ModuleWeights, settings: PeftSettings) -> ModuleWeights:
    """Return the module with the alpha from its sub-model's settings. Patterns for single layers have priority."""
    if not settings or not module.layout.has_alpha or ALPHA in module.tensors:
        return module
    name = strip_peft_prefix(module.name)
    part, _, path = name.partition(".")
    part_settings = settings.get(part)
    if part_settings is None:
        part_settings, path = settings.get("", {}), name
    # PEFT's LoRA has lora_alpha; its LoHa and LoKr have alpha.
    alpha = find_for_layer(
        part_settings.get("alpha_pattern"), path, part_settings.get("lora_alpha", part_settings.get("alpha"))
    )
    if alpha is None:
        return module
    if module.layout.is_whole:  # PEFT divides by the requested rank even if no factor has it
        rank = find_for_layer(part_settings.get("rank_pattern"), path, part_settings.get("r")) or module.rank
        scaled = module.tensors[module.layout.scaled].float() * (alpha / rank)
        return replace(module, tensors={**module.tensors, module.layout.scaled: scaled})
    factor = math.sqrt(module.rank) if part_settings.get("use_rslora") else 1.0  # rank-stabilised: alpha / sqrt(rank)
    return replace(module, alpha_elsewhere=alpha_of(alpha * factor, module.rank, part_settings))


def find_for_layer(patterns: Mapping[str, Any] | None, path: str, otherwise: float | None) -> float | None:
    """Return the number of the first of PEFT's patterns that matches the end of `path`, or `otherwise`; a mask's is the
    number of ranks that are left."""
    # The group keeps the alternatives of a pattern such as to_k|to_q together. PEFT matches the ends of paths.
    number: Any = next((n for p, n in (patterns or {}).items() if re.fullmatch(rf"(?:.*\.)?(?:{p})", path)), otherwise)
    return None if number is None else float(sum(number) if is_mask(number) else number)

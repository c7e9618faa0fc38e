"""Training states: all that a run needs to go on as if it had never stopped.

A state is a folder:

    network.safetensors    every weight and buffer of the adapter, in its own dtype
    training.safetensors   the tensors of the optimizer and of what else has a memory
    train_state.json       `current_epoch` and `current_step`, and the rest as plain values; written last, with digests
                           of all three files

Whatever is drawn at random is a function of the seed and the place in the run (library/base/randomness.py), so there
are no generators to keep. Nothing is pickled.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.base.errors import UserError, about, error_in
from library.base.json_text import parse_json
from library.checkpoints.files import load_state_dict
from library.checkpoints.folders import atomic_folder
from library.checkpoints.hashes import digest_of_file
from library.checkpoints.headers import read_header
from library.checkpoints.saving import save_safetensors
from library.checkpoints.tree_json import dump_tree, load_tree
from library.options.training.run import MAX_SEED
from library.training.reporting.progress import Part
from library.training.saving.state_names import MANIFEST_FILE, is_state_name

logger = logging.getLogger(__name__)

VERSION = 1
NETWORK_FILE, TENSOR_FILE = "network.safetensors", "training.safetensors"
OF_SD_SCRIPTS = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")


class Stateful(Protocol):
    """A part of a run with a state to save."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class StateManifest:
    """The description of a state and of its run."""

    path: Path
    step: int
    seed: int
    num_processes: int
    options: Mapping[str, Any]
    dataset: Mapping[str, Any]
    parts: Mapping[str, Any]  # nested values of the stateful parts
    done: frozenset[Part] = frozenset()  # finished work that was scheduled after `step`, the file included

    digests: Mapping[str, str] = field(default_factory=dict)  # of the other files

    @property
    def written_at(self) -> float:
        """Seconds since 1970."""
        return (self.path / MANIFEST_FILE).stat().st_mtime


def save_state(
    folder: Path,
    *,
    step: int,
    epoch: int,
    seed: int,
    num_processes: int,
    options: Mapping[str, Any],
    dataset: Mapping[str, Any],
    network: nn.Module,
    keepers: Mapping[str, Stateful],
    done: Iterable[Part] = (),
) -> None:
    """Write a state atomically.

    Raises UserError if a part has a value that cannot be written without pickle.
    """
    tensors: dict[str, Tensor] = {}
    parts = {name: dump_tree(keeper.state_dict(), name, tensors) for name, keeper in keepers.items()}
    with atomic_folder(folder) as temporary:
        # Cloned, because safetensors refuses tensors that share memory and `cpu()` copies nothing on the CPU.
        save_safetensors(
            temporary / NETWORK_FILE, {k: v.detach().cpu().clone() for k, v in weights_and_buffers(network).items()}
        )
        save_safetensors(temporary / TENSOR_FILE, tensors)
        manifest = {
            "current_epoch": epoch,
            "current_step": step,
            "done": sorted(done),
            "version": VERSION,
            "seed": seed,
            "num_processes": num_processes,
            "sizes": {name: (temporary / name).stat().st_size for name in (NETWORK_FILE, TENSOR_FILE)},
            "digests": {name: digest_of_file(temporary / name) for name in (NETWORK_FILE, TENSOR_FILE)},
            "options": options,
            "dataset": dataset,
            "parts": parts,
        }
        # Reading a state forms the same text again: JSON keeps the order of keys and the value of floats.
        manifest["digest"] = digest_of_text(json.dumps(manifest, ensure_ascii=False))
        with (temporary / MANIFEST_FILE).open("w", encoding="utf-8") as file:
            file.write(json.dumps(manifest, ensure_ascii=False))  # json.dump encodes in Python
            file.flush()
            os.fsync(file.fileno())


def read_manifest(folder: Path) -> StateManifest:
    """Read the description of a state. Raises UserError if the folder holds no complete state of this program.

    Only the sizes of the large files are checked; `require_undamaged` reads them.
    """
    if not folder.is_dir():
        raise about("--resume", folder)("is not a folder", "give the folder of a saved state, such as last-state")
    try:
        content = parse_json((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        content = {}
    except (OSError, ValueError) as error:
        raise about("--resume", folder, cause="unreadable")(
            f": its {MANIFEST_FILE} cannot be read ({error})", "use another state"
        ) from None
    version = content.get("version") if isinstance(content, dict) else None
    if version is None:
        raise error_in(path=folder)(f"the folder {folder} {explain_no_state(folder)}")
    if version != VERSION:
        raise error_in(path=folder)(f"the state {folder} is of version {version}; this program reads version {VERSION}")
    digest = content.pop("digest", None)  # older states have no digests
    if digest is not None and digest != digest_of_text(json.dumps(content, ensure_ascii=False)):
        raise UserError(make_damage_error(folder, MANIFEST_FILE))
    try:
        for name, size in content["sizes"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise error_in(path=folder)(
                    f"the state {folder} is not whole: {name} should have {size} bytes", "copy it again"
                )
        require_values(folder, content)
        return StateManifest(
            path=folder,
            step=content["current_step"],
            seed=content["seed"],
            num_processes=content["num_processes"],
            options=content["options"],
            dataset=content["dataset"],
            parts=content["parts"],
            done=frozenset(content.get("done", ())),
            digests=content.get("digests", {}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise error_in(path=folder)(
            f"the state {folder}: its {MANIFEST_FILE} lacks {error}", "use another state"
        ) from None


def require_values(folder: Path, content: Mapping[str, Any]) -> None:
    """Raise UserError for values that no run writes, KeyError for a missing one."""
    for name, least in (("current_step", 0), ("seed", -MAX_SEED), ("num_processes", 1)):
        value = content[name]
        if type(value) is not int or value < least:
            raise error_in(path=folder)(
                f"the state {folder}: {name} in its {MANIFEST_FILE} is {value!r}", "use another state"
            )
    for name, kind in (("options", dict), ("dataset", dict), ("parts", dict), ("digests", dict), ("done", list)):
        if not isinstance(content.get(name, kind()), kind):
            raise error_in(path=folder)(
                f"the state {folder}: {name} in its {MANIFEST_FILE} is {content[name]!r}", "use another state"
            )


def require_undamaged(manifest: StateManifest) -> None:
    """Verify the digests of a state's files. Raises UserError if one has changed."""
    for name, digest in manifest.digests.items():
        try:
            is_whole = digest_of_file(manifest.path / name) == digest
        except OSError as error:
            raise error_in(path=manifest.path)(
                f"the state {manifest.path}: {name} cannot be read ({error})", "use another state"
            ) from None
        if not is_whole:
            raise UserError(make_damage_error(manifest.path, name))


def make_damage_error(folder: Path, name: str) -> str:
    """Return the error for a state that has changed on disk."""
    return f"the state {folder} is damaged: {name} is not as it was written; copy it again or use another state"


def digest_of_text(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def explain_no_state(folder: Path) -> str:
    """Explain why a folder without our description is not a state; the text follows the folder's name."""
    if any((folder / name).exists() for name in OF_SD_SCRIPTS):
        return (
            "is a state of sd-scripts, which holds pickled objects that are not opened because they could run code; "
            "start from the weights with --network_weights, and set --initial_epoch if epochs are to be counted on"
        )
    return f"holds no {MANIFEST_FILE} of a whole state; --resume takes the folder of a saved state, such as last-state"


def weights_and_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a network by name.

    A third-party network's `state_dict` may be what it saves as a file instead, from which training cannot continue
    exactly: LyCORIS multiplies scalars into other weights and joins the blocks of DyLoRA.
    """
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }


@torch.no_grad()
def load_network(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load what `weights_and_buffers` returned. Raises RuntimeError or KeyError for the weights of another network."""
    own = weights_and_buffers(network)
    is_fitting = {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in weights.items()}
    if not is_fitting or own.keys() == network.state_dict().keys():
        # Also for older states, which hold the network's `state_dict`.
        network.load_state_dict(dict(weights))
        return
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def network_shapes(manifest: StateManifest) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the network's weights in a state by name."""
    return {name: entry.shape for name, entry in read_header(manifest.path / NETWORK_FILE).tensors.items()}


def restore(manifest: StateManifest, network: nn.Module, keepers: Mapping[str, Stateful]) -> None:
    """Restore a state into the parts of a run.

    Raises UserError if the network or a part does not fit.
    """
    weights = load_state_dict(manifest.path / NETWORK_FILE)
    try:
        load_network(network, weights)
    except (RuntimeError, KeyError) as error:
        raise error_in(path=manifest.path)(
            f"the state {manifest.path} holds another network: {shorten_line(str(error))}. Give the --network_module, "
            "--network_dim and --network_args that it was trained with"
        ) from None
    tensors = load_state_dict(manifest.path / TENSOR_FILE)
    for name, keeper in keepers.items():
        if name not in manifest.parts:
            logger.warning("the state %s has no state of the %s, which is reset", manifest.path, name)
            continue
        try:
            keeper.load_state_dict(load_tree(manifest.parts[name], tensors))
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise error_in(path=manifest.path)(
                f"the state {manifest.path} does not fit the {name} of this run: {shorten_line(str(error))}. Give the "
                "options that it was trained with"
            ) from None


def shorten_line(text: str, length: int = 300) -> str:
    """Return the start of a long message as one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]} …"


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer whose state keeps its dtypes when loaded, unless the weights had another dtype when it was saved."""

    optimizer: Optimizer
    name: str

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state dict, its name, and the dtypes of the weights."""
        return {"name": self.name, "state": self.optimizer.state_dict(), "weights": self.weight_dtypes()}

    def weight_dtypes(self) -> list[str]:
        return sorted({str(p.dtype) for group in self.optimizer.param_groups for p in group["params"]})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict. Raises UserError for the state of another optimizer."""
        if strip_arguments(state_dict["name"]) != strip_arguments(self.name):
            raise UserError(f"it is the state of {state_dict['name']}, but this run uses {self.name}")
        saved = state_dict["state"]
        for own_group, saved_group in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            for name in own_group.keys() - {"params"}:
                # The schedule is built for this run's `relative_step`, and the optimizer would keep the state's.
                is_fixed = name == "relative_step" and own_group[name] != saved_group.get(name)
                if is_fixed or name not in saved_group or not is_alike(own_group[name], saved_group[name]):
                    raise UserError(
                        f"{name} of a group of parameters is {saved_group.get(name)!r}, here it is {own_group[name]!r}"
                    )
        self.optimizer.load_state_dict(saved)
        # torch has cast the state to the dtype of the weights, which rounds the float32 state of bf16 weights. If the
        # weights had another dtype when the state was saved, the cast stays, because the step accepts no other state.
        if state_dict.get("weights") not in (None, self.weight_dtypes()):
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            for key, value in saved["state"].get(index, {}).items():
                loaded = self.optimizer.state[parameter].get(key)
                if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                    self.optimizer.state[parameter][key] = value.to(loaded.device)


def is_alike(current: Any, saved: Any) -> bool:
    """Return True if two settings are compatible: both numbers, tuples of one length, or of one type; a switch may
    be unset."""
    if current is None or isinstance(current, bool):
        return saved is None or current is None or isinstance(saved, bool)
    if isinstance(current, list | tuple):
        is_same_length = isinstance(saved, list | tuple) and len(current) == len(saved)
        return is_same_length and all(is_alike(a, b) for a, b in zip(current, saved, strict=True))
    if isinstance(current, int | float | Tensor):
        return isinstance(saved, int | float | Tensor) and not isinstance(saved, bool)
    return type(current) is type(saved)


def strip_arguments(name: str) -> str:
    """Return the class path in an optimizer's name, without its arguments."""
    return name.partition("(")[0]


# Finding states


def iterate_states(folder: Path, names: tuple[str, ...]) -> Iterator[StateManifest]:
    """Yield the states in a folder of a run with one of `names`; log which cannot be read."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_state_name(entry.name, names) and entry.is_dir():
            try:
                manifest = read_manifest(entry)
            except UserError as error:
                logger.warning("%s is left out: %s", entry.name, error)
                continue
            if is_recorded_for(str(manifest.options.get("output_name") or ""), entry.name, names):
                yield manifest


def is_recorded_for(recorded: str, folder: str, names: tuple[str, ...]) -> bool:
    """Return True if a state belongs to a run with one of `names`; it records the run's name `recorded`, or ""."""
    # The state of the end of a run named cat-251130 has the name of one of a run named cat. A state that was renamed by
    # hand belongs to the run that it is named after.
    return recorded in ("", *names) or not is_state_name(folder, (recorded,))


def newest_state(folder: Path, names: tuple[str, ...]) -> StateManifest | None:
    """Return the latest complete state in `folder` of a run with one of `names`; None if there is none.

    Of two states of one step, return the one after which less work remains.
    """
    candidates = [
        (manifest.step, len(manifest.done), manifest.path.stat().st_mtime, manifest)
        for manifest in iterate_states(folder, names)
    ]
    for *_, manifest in sorted(candidates, key=lambda item: item[:3], reverse=True):
        if are_undamaged([manifest]):
            return manifest
    return None


def are_undamaged(states: Iterable[StateManifest]) -> bool:
    """Return True if all files of these states are as they were written; log which is not."""
    for manifest in states:
        try:
            require_undamaged(manifest)
        except UserError as error:
            logger.warning("%s is left out: %s", manifest.path.name, error)
            return False
    return True

"""Changed copies of the files of a tiny model."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def with_changes(arguments: list[str], flag: str, folder: Path, changes: dict[str, Tensor | None]) -> list[str]:
    """The arguments with the file of one flag replaced by a changed copy; None takes a tensor out."""
    place = arguments.index(flag) + 1
    tensors = {**load_file(arguments[place]), **changes}
    path = folder / Path(arguments[place]).name
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return [*arguments[:place], str(path), *arguments[place + 1 :]]


def without(arguments: list[str], flag: str) -> list[str]:
    """The arguments without a flag and its value."""
    place = arguments.index(flag)
    return arguments[:place] + arguments[place + 2 :]

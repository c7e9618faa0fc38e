"""Changed copies of the files of a tiny model, and comparison of the models in them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.protocols import Loader


def with_changes(arguments: list[str], flag: str, folder: Path, changes: dict[str, Tensor | None]) -> list[str]:
    """Return the arguments with the file of one flag replaced by a changed copy; None removes a tensor."""
    place = arguments.index(flag) + 1
    tensors = {**load_file(arguments[place]), **changes}
    path = folder / Path(arguments[place]).name
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return [*arguments[:place], str(path), *arguments[place + 1 :]]


def without(arguments: list[str], flag: str) -> list[str]:
    """Return the arguments without a flag and its value."""
    place = arguments.index(flag)
    return arguments[:place] + arguments[place + 2 :]


def in_two_files(arguments: list[str], flags: Sequence[str], folder: Path) -> list[str]:
    """Return the arguments with the file of each flag split into two numbered files, of which the first is named."""
    changed_arguments = list(arguments)
    for flag in flags:
        place = changed_arguments.index(flag) + 1
        state, stem = load_file(changed_arguments[place]), Path(changed_arguments[place]).stem
        for number in (1, 2):
            part = {name: tensor for i, (name, tensor) in enumerate(sorted(state.items())) if i % 2 == number - 1}
            save_file(part, folder / f"{stem}-{number:05}-of-00002.safetensors")
        changed_arguments[place] = str(folder / f"{stem}-00001-of-00002.safetensors")
    return changed_arguments


def assert_same_models(actual: Loader, expected: Loader) -> None:
    """Assert that two loaders give models with the same weights."""
    for theirs, ours in (
        (expected.denoiser(), actual.denoiser()),
        (expected.vae(), actual.vae()),
        *zip(expected.text_encoders(), actual.text_encoders(), strict=True),
    ):
        state = ours.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())


def rename_token(folder: Path, token: str) -> None:
    """Rename a token of the tokenizer in a folder."""
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace(token, "<other>"))
    for other in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / other).unlink(missing_ok=True)

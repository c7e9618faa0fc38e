"""Settings read from Anima's files before anything is loaded, and errors for files that do not fit."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_train_network import setup_parser
from library.architectures.anima.layers import ADAPTER
from library.architectures.anima.load import open_loader, with_adapter
from library.architectures.anima.options import AnimaOptions
from library.checkpoints.weights import Quantised, Weights
from library.models.dit_loader import DitLoader
from tests.tiny.anima import CONFIG, build_tiny_anima


def options_of(arguments: list[str]) -> AnimaOptions:
    return AnimaOptions.from_args(setup_parser().parse_args(arguments))


def open_tiny(arguments: list[str]) -> DitLoader:
    return open_loader(options_of(arguments))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_anima_load")


@pytest.fixture(scope="module")
def arguments(folder: Path) -> list[str]:
    return build_tiny_anima(folder, seed=71)


def write_changed_copy(source: Path, target: Path, drop: str = "", rename: tuple[str, str] = ("", "")) -> str:
    """Copy a checkpoint without the weights that match `drop`, replacing the prefix `rename[0]` by `rename[1]`."""
    state = {
        rename[1] + key.removeprefix(rename[0]): tensor
        for key, tensor in load_file(source).items()
        if not drop or not re.search(drop, key)
    }
    save_file(state, target)
    return str(target)


def test_sizes_are_read_from_the_weights(arguments: list[str]) -> None:
    loader, config = open_loader(options_of(arguments))
    assert config == CONFIG
    assert loader.text_encoders()[0].config.rope_parameters["rope_theta"] == 1e6  # type: ignore[union-attr, index]


@pytest.mark.parametrize("prefix", ["net.llm_adapter.", "llm_adapter.", ""])
def test_a_text_adapter_from_a_separate_file_is_used(arguments: list[str], tmp_path: Path, prefix: str) -> None:
    other = build_tiny_anima(tmp_path, seed=72)
    alone = write_changed_copy(
        Path(other[1]), tmp_path / "adapter.safetensors", r"^net\.(?!llm_adapter)", ("net.llm_adapter.", prefix)
    )
    bare = write_changed_copy(Path(arguments[1]), tmp_path / "bare.safetensors", "llm_adapter")
    denoiser = open_tiny([*arguments, "--pretrained_model_name_or_path", bare, "--llm_adapter_path", alone]).denoiser()
    base_weights, adapter_weights = (open_tiny(options).denoiser().state_dict() for options in (arguments, other))
    for key, tensor in denoiser.state_dict().items():
        assert torch.equal(tensor, (adapter_weights if key.startswith("llm_adapter.") else base_weights)[key])


def test_adding_a_text_adapter_keeps_the_storage_formats_of_both_files() -> None:
    def quantised_weights(names: list[str]) -> Weights:
        quantised = {name: Quantised("int8", None, dict) for name in names}
        shapes, padded_to = dict.fromkeys(names, (2, 2)), dict.fromkeys(names, 16)
        return Weights("file", shapes, lambda name: torch.zeros(2, 2), quantised, padded_to=padded_to)

    joined = with_adapter(quantised_weights(["a.weight", f"{ADAPTER}old.weight"]), quantised_weights(["new.weight"]))
    for values in (joined.shapes, joined.quantised, joined.padded_to):
        assert set(values) == {"a.weight", f"{ADAPTER}new.weight"}

"""Settings read from Anima's files before anything is loaded, and errors for files that do not fit."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_train_network import setup_parser
from library.architectures.anima.checkpoint_keys import ADAPTER
from library.architectures.anima.load import open_loader, with_adapter
from library.architectures.anima.options import AnimaOptions
from library.checkpoints.weights import Quantised, Weights
from library.models.dit_loader import DitLoader
from tests.tiny.anima import CONFIG, build_tiny_anima


def options_of(arguments: list[str]) -> AnimaOptions:
    return AnimaOptions.from_args(setup_parser().parse_args(arguments))


def opened(arguments: list[str]) -> DitLoader:
    return open_loader(options_of(arguments))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_anima_load")


@pytest.fixture(scope="module")
def arguments(folder: Path) -> list[str]:
    return build_tiny_anima(folder, seed=71)


def changed(source: Path, target: Path, drop: str = "", rename: tuple[str, str] = ("", "")) -> str:
    """A copy of a file without the weights that `drop` fits, beginnings of names changed."""
    state = {
        rename[1] + key.removeprefix(rename[0]): tensor
        for key, tensor in load_file(source).items()
        if not drop or not re.search(drop, key)
    }
    save_file(state, target)
    return str(target)


def test_sizes_are_read_off_the_weights(arguments: list[str]) -> None:
    loader, config = open_loader(options_of(arguments))
    assert config == CONFIG
    assert loader.text_encoders()[0].config.rope_parameters["rope_theta"] == 1e6  # type: ignore[union-attr, index]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_models_come_frozen_in_the_precision_of_the_run(arguments: list[str], precision: str) -> None:
    loader = opened([*arguments, "--mixed_precision", precision, "--no_half_vae"])
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    for module, wanted in (
        (loader.denoiser(), dtype),
        (loader.text_encoders()[0], dtype),
        (loader.vae(), torch.float32),
    ):
        assert {weight.dtype for weight in module.parameters()} == {wanted}
        assert not any(weight.requires_grad for weight in module.parameters()) and not module.training


@pytest.mark.parametrize(
    ("flag", "drop", "message"),
    [
        ("--pretrained_model_name_or_path", r"llm_adapter", "has no text adapter .* add --llm_adapter_path"),
        ("--pretrained_model_name_or_path", r"adaln", "so it is not an Anima transformer"),
        ("--pretrained_model_name_or_path", r"^net\.blocks\.0\.mlp\.layer1", "blocks.0.mlp.layer1.weight is missing"),
        ("--qwen3", r"q_norm", "is not a Qwen3 text encoder"),
        ("--vae", r"decoder", "is not the VAE of Qwen-Image"),
    ],
)
def test_files_that_lack_what_tells_them_are_named(
    arguments: list[str], tmp_path: Path, flag: str, drop: str, message: str
) -> None:
    source = Path(arguments[arguments.index(flag) + 1])
    with pytest.raises(ValueError, match=message) as error:
        opened([*arguments, flag, changed(source, tmp_path / "less.safetensors", drop)])
    assert "less.safetensors" in str(error.value)


@pytest.mark.parametrize("part", ["transformer", "qwen3"])
def test_a_file_that_lacks_one_weight_is_told_when_it_loads(arguments: list[str], tmp_path: Path, part: str) -> None:
    flag, drop = {
        "transformer": ("--pretrained_model_name_or_path", r"blocks\.1\.self_attn\.q_proj"),
        "qwen3": ("--qwen3", r"layers\.1\.mlp\.up_proj"),
    }[part]
    source = Path(arguments[arguments.index(flag) + 1])
    loader = opened([*arguments, flag, changed(source, tmp_path / "less.safetensors", drop)])
    with pytest.raises(ValueError, match=r"less\.safetensors is incomplete: .* are missing: "):
        loader.denoiser() if part == "transformer" else loader.text_encoders()


def test_a_text_encoder_of_another_width_is_refused(arguments: list[str], tmp_path: Path) -> None:
    state = {
        key: tensor[:, :32].contiguous() if key.endswith("embed_tokens.weight") else tensor
        for key, tensor in load_file(arguments[3]).items()
    }
    save_file(state, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"--qwen3 .*narrow.safetensors has width 32, .* expects 40; use Qwen/Qwen3"):
        opened([*arguments, "--qwen3", str(tmp_path / "narrow.safetensors")])


@pytest.mark.parametrize("prefix", ["net.llm_adapter.", "llm_adapter.", ""])
def test_a_text_adapter_from_a_file_of_its_own_is_taken(arguments: list[str], tmp_path: Path, prefix: str) -> None:
    other = build_tiny_anima(tmp_path, seed=72)
    alone = changed(
        Path(other[1]), tmp_path / "adapter.safetensors", r"^net\.(?!llm_adapter)", ("net.llm_adapter.", prefix)
    )
    bare = changed(Path(arguments[1]), tmp_path / "bare.safetensors", "llm_adapter")
    given = opened([*arguments, "--pretrained_model_name_or_path", bare, "--llm_adapter_path", alone]).denoiser()
    own, others = (opened(words).denoiser().state_dict() for words in (arguments, other))
    for key, tensor in given.state_dict().items():
        assert torch.equal(tensor, (others if key.startswith("llm_adapter.") else own)[key])


def test_a_text_adapter_of_another_file_keeps_how_both_files_store_their_weights() -> None:
    def stored(names: list[str]) -> Weights:
        quantised = {name: Quantised("int8", None, dict) for name in names}
        shapes, padded_to = dict.fromkeys(names, (2, 2)), dict.fromkeys(names, 16)
        return Weights("file", shapes, lambda name: torch.zeros(2, 2), quantised, padded_to=padded_to)

    joined = with_adapter(stored(["a.weight", f"{ADAPTER}old.weight"]), stored(["new.weight"]))
    for values in (joined.shapes, joined.quantised, joined.padded_to):
        assert set(values) == {"a.weight", f"{ADAPTER}new.weight"}

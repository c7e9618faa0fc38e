"""Anima of other depths and widths: against diffusers' models, and with adapter files in every naming."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.anima.layers import NAMES
from library.architectures.anima.model import Anima, AnimaConfig, read_config
from library.architectures.anima.reference import diffusers_models
from library.checkpoints.adapter_names import FileNaming
from library.models.loading import build_on_meta_device
from networks import lora_anima
from networks.core.files.adapter_file import adapter_tensors, read_adapter_file
from networks.core.files.renaming import rename
from tests.parity.denoisers import save_trained
from tests.tiny.anima import CONFIG, inputs, oracle, oracle_of, tiny_anima
from tests.tolerances import FLOAT32_DEEP

DEEP = replace(CONFIG, width=36, head_width=12, mlp_width=108, modulation_rank=5, num_blocks=31)
SIZES = {
    "31 narrow blocks": DEEP,
    "one wide block": replace(CONFIG, width=120, head_width=40, mlp_width=180, num_blocks=1),
    "another text adapter": replace(
        CONFIG,
        num_blocks=3,
        text_width=42,
        adapter=replace(CONFIG.adapter, width=42, head_width=14, mlp_width=63, num_blocks=7),
    ),
}


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
def test_outputs_and_input_gradients_match_diffusers(config: AnimaConfig) -> None:
    ours = tiny_anima(17, config)
    assert read_config({name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}) == config
    results = []
    for run in (ours, oracle(ours)):
        values = inputs(6, 10, 18)
        output = run(*values)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(19))
        results.append((output, *torch.autograd.grad((output * weights).sum(), (values[0],))))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.1
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


def predict_by_diffusers(tensors: dict[str, Tensor], model: Anima) -> Tensor:
    """Return the prediction of diffusers' models after its Anima reader has loaded the file."""
    from diffusers.loaders.lora_pipeline import AnimaLoraLoaderMixin

    reader: Any = AnimaLoraLoaderMixin
    transformer, conditioner = diffusers_models(model)
    state = reader.lora_state_dict(tensors)
    assert all("lora" in key for key in state)
    for part, theirs in (("transformer", transformer), ("text_conditioner", conditioner)):
        part_state = {key: tensor for key, tensor in state.items() if key.startswith(f"{part}.")}
        if part_state:
            theirs.load_lora_adapter(part_state, prefix=part)
    return oracle_of(transformer, conditioner)(*(value.detach() for value in inputs(6, 10)))


@pytest.fixture(scope="module")
def deep_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Save an adapter of the deep model and return it with its prediction."""
    path = tmp_path_factory.mktemp("deep") / "ours.safetensors"
    model = tiny_anima(20, DEEP)
    values = [value.detach() for value in inputs(6, 10)]
    base, expected = save_trained(lora_anima, path, {"train_llm_adapter": "True"}, model, lambda: model(*values))
    assert (expected - base).abs().max() > 0.01
    return path, expected


@pytest.mark.parametrize("naming", ["generic", "diffusers"])
def test_diffusers_loads_the_converted_file_of_a_deep_model(deep_file: tuple[Path, Tensor], naming: FileNaming) -> None:
    path, expected = deep_file
    tensors = adapter_tensors(rename(read_adapter_file(path), NAMES, naming).file)
    assert any("blocks.30." in key for key in tensors)
    torch.testing.assert_close(predict_by_diffusers(tensors, tiny_anima(20, DEEP)), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize("naming", ["kohya", "generic", "diffusers"])
def test_training_continues_from_a_deep_models_file_in_every_naming(
    deep_file: tuple[Path, Tensor], naming: FileNaming
) -> None:
    path, _ = deep_file
    ours = adapter_tensors(read_adapter_file(path))
    tensors = adapter_tensors(rename(read_adapter_file(path), NAMES, naming).file)
    network, _ = lora_anima.create_network_from_weights(
        1.0, "file", None, [], build_on_meta_device(Anima, DEEP), tensors
    )
    assert set(network.adapters) == {key.split(".")[0] for key in ours}
    assert any(name.startswith("lora_unet_blocks_30_") for name in network.adapters)


def test_block_names_out_of_range_are_unknown() -> None:
    for name in (
        "lora_unet_blocks_99_mlp_layer1",
        "diffusion_model.blocks.40.mlp.layer2",
        "lora_te_layers_35_mlp_up_proj",
    ):
        module = NAMES.find(name)
        assert module is not None and name in module.spellings
    for name in (
        "lora_unet_blocks_99_mlp_layer7",
        "lora_unet_t_embedder_5_linear_1",
        "lora_unet_blocks_007_mlp_layer1",
    ):
        assert NAMES.find(name) is None

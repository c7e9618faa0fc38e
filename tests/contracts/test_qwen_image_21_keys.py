"""Names and shapes of full-size Qwen-Image 2.1 files, checked with diffusers."""

from functools import cache
from pathlib import Path

import pytest

from library.architectures.qwen_image_21.load import FILES
from library.architectures.qwen_image_21.model import QwenImage21, read_config
from library.architectures.qwen_image_21.vae import empty_vae, vae_config
from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles
from library.models.identify import base_of_file
from library.models.loading import build_on_meta_device
from library.models.qwen3_vl import empty_qwen3_vl
from library.models.qwen3_vl_vision import empty_vision, vision_component
from tests.contracts.full_size import shapes_of_model, weights_of_shapes
from tests.tiers import first_is_fast
from tests.tiny.qwen_image_21 import FULL_SIZE, full_size_encoder, full_size_vae, with_fused_gates

NUM_VAE_PARAMETERS = 337_740_404


@cache
def ours() -> QwenImage21:
    return build_on_meta_device(QwenImage21, FULL_SIZE)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_denoiser_loads_from_fused_gates(prefix: str) -> None:
    state = dict(ours().state_dict())
    shapes = {prefix + n: tuple(t.shape) for n, t in with_fused_gates(state).items()}
    weights = FILES.transformer.read(list_specs(), BaseFiles(Path("file"), weights_of_shapes(shapes)))
    assert dict(weights.shapes) == shapes_of_model(ours())
    assert read_config(weights.shapes) == FULL_SIZE
    assert base_of_file(list_specs(), shapes).name == "qwen_image_21"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("prefix", "level"),
    first_is_fast([("model.", "language_model."), ("", "language_model."), ("model.", ""), (FILES.encoder.prefix, "")]),
)
def test_the_text_encoder_loads_with_its_vision_model(prefix: str, level: str) -> None:
    """ComfyUI's files omit one level of the language model's names."""
    names = shapes_of_model(full_size_encoder())
    shapes = {prefix + name.replace("language_model.", level): shape for name, shape in names.items()}
    language, vision = (
        FILES.encoder.open(None, weights_of_shapes(shapes)),
        vision_component(weights_of_shapes(shapes)),
    )
    assert vision is not None
    actual = {level + name: shape for name, shape in shapes_of_model(empty_qwen3_vl(language.config)).items()}
    actual |= {f"visual.{name}": shape for name, shape in shapes_of_model(empty_vision(vision.config)).items()}
    assert {prefix + name: shape for name, shape in actual.items()} == shapes
    sizes = {"depth": 27, "hidden_size": 1152, "num_heads": 16, "patch_size": 16, "out_hidden_size": 4096}
    assert sizes.items() <= vision.config.items()


def test_the_vae_sizes_are_inferred_from_a_file() -> None:
    vae = full_size_vae()
    assert sum(tensor.numel() for tensor in vae.state_dict().values()) == NUM_VAE_PARAMETERS
    config = vae_config(shapes_of_model(vae))
    assert {name: vae.config[name] for name in config} == config
    assert shapes_of_model(empty_vae(config)) == shapes_of_model(vae)

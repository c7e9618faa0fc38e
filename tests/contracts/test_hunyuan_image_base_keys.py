"""Names and shapes of the four full-size HunyuanImage 2.1 files are a contract, in every published layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.hunyuan_image.layers import KEYS
from library.architectures.hunyuan_image.load import TRANSFORMER, check_vae, component_of_file
from library.architectures.hunyuan_image.model import read_config
from library.architectures.hunyuan_image.qwen import empty_qwen, qwen_component
from library.architectures.hunyuan_image.vae import empty_vae, vae_component
from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles
from library.models.loading import Component
from library.models.t5 import empty_t5
from tests.contracts.full_size import shapes_of_model, weights_of_shapes
from tests.contracts.test_lora_keys_hunyuan_image import BASE, DENOISER
from tests.tiers import first_is_fast


def test_the_diffusers_layout_converts_to_our_shapes() -> None:
    from diffusers import HunyuanImageTransformer2DModel

    with torch.device("meta"):
        theirs = HunyuanImageTransformer2DModel(text_embed_2_dim=1472)
    weights = KEYS.from_diffusers(weights_of_shapes(shapes_of_model(theirs)))
    assert dict(weights.shapes) == DENOISER


@pytest.mark.parametrize("options", [{"guidance_embeds": True}, {"use_meanflow": True}])
def test_distilled_models_of_diffusers_are_recognised(options: dict[str, Any]) -> None:
    from diffusers import HunyuanImageTransformer2DModel

    with torch.device("meta"):
        theirs = HunyuanImageTransformer2DModel(text_embed_2_dim=1472, num_layers=1, num_single_layers=1, **options)
    weights = KEYS.from_diffusers(weights_of_shapes(shapes_of_model(theirs)))
    with pytest.raises(ValueError, match=r"this is a distilled HunyuanImage 2.1 .* Train on"):
        read_config(weights.shapes)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"guidance_in.mlp.0.weight": (3584, 256)}, "this is a distilled HunyuanImage 2.1 (it has guidance_in)"),
        ({"time_r_in.mlp.0.weight": (3584, 256)}, "this is a distilled HunyuanImage 2.1 (it has time_r_in)"),
        ({"img_in.proj.weight": (3584, 128, 1, 1, 1)}, "this is the refiner of HunyuanImage 2.1"),
    ],
)
def test_refiner_and_other_variants_are_rejected(extra: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError) as error:
        read_config({**DENOISER, **extra})
    assert message in str(error.value)


def test_pruned_models_load() -> None:
    shapes = {n: s for n, s in DENOISER.items() if not n.startswith("single_blocks") or int(n.split(".")[1]) < 7}
    assert read_config(shapes).num_single == 7
    with pytest.raises(ValueError, match=r"its single_blocks are numbered \[1, 2"):
        read_config({n: s for n, s in shapes.items() if not n.startswith("single_blocks.0.")})


def shapes_of(part: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in BASE["components"][part].items()}


@pytest.mark.parametrize("prefix", first_is_fast(["model.", "model.language_model.", "language_model.model.", ""]))
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "language alone"])
def test_qwen_loads_under_its_older_and_newer_names(prefix: str, whole: bool) -> None:
    names = shapes_of("qwen2_5_vl")
    language = {name.removeprefix("model."): shape for name, shape in names.items() if name.startswith("model.")}
    rest = {name: shape for name, shape in names.items() if not name.startswith("model.")} if whole else {}
    component = qwen_component(
        weights_of_shapes({**rest, **{prefix + name: shape for name, shape in language.items()}})
    )
    wanted = {n: s for n, s in language.items() if not n.startswith(("layers.26.", "layers.27.", "norm."))}
    assert {name: tuple(t.shape) for name, t in empty_qwen(component.config).state_dict().items()} == wanted
    assert dict(component.weights.shapes) == wanted
    config = component.config
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (28, 4)
    assert config["rope_parameters"]["mrope_section"] == [16, 24, 24]


@pytest.mark.parametrize("prefix", ["encoder.", ""])
def test_byt5_loads_with_and_without_the_prefix(prefix: str) -> None:
    names = {n: s for n, s in shapes_of("byt5").items() if n != "shared.weight"}
    assert all(name.startswith("encoder.") for name in names)
    shapes = {prefix + name.removeprefix("encoder."): shape for name, shape in names.items()}
    component = component_of_file("byt5", weights_of_shapes({**shapes, "shared.weight": (1510, 1472)}))
    actual = {name: tuple(t.shape) for name, t in empty_t5(component.config).state_dict().items()}
    assert actual == {**names, "shared.weight": (1510, 1472), "encoder.embed_tokens.weight": (1510, 1472)}
    assert (component.config["num_heads"], component.config["d_kv"], component.config["num_layers"]) == (6, 64, 12)


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_the_vae_matches_diffusers(prefix: str) -> None:
    component = check_vae(vae_component(weights_of_shapes({prefix + n: s for n, s in shapes_of("vae").items()})))
    wanted = {name: tuple(t.shape) for name, t in empty_vae(component.config).state_dict().items()}
    assert dict(component.weights.shapes) == wanted
    assert sum(torch.Size(shape).numel() for shape in wanted.values()) == 405_575_491
    assert component.config["block_out_channels"] == [128, 256, 512, 512, 1024, 1024]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_denoiser_is_found_with_and_without_prefix(prefix: str) -> None:
    base = BaseFiles(Path("file"), weights_of_shapes({prefix + n: s for n, s in DENOISER.items()}))
    weights = TRANSFORMER.read(list_specs(), base)
    assert dict(weights.shapes) == DENOISER


def test_other_models_are_rejected_by_name() -> None:
    with pytest.raises(ValueError, match=r"this is a FLUX model; use flux_train_network\.py"):
        shapes = {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}
        TRANSFORMER.read(list_specs(), BaseFiles(Path("file"), weights_of_shapes(shapes)))
    with pytest.raises(ValueError, match=r"--vae file has 16 channels per 8 pixels, but HunyuanImage 2\.1 needs 64"):
        shapes = {"decoder.conv_in.weight": (512, 16, 3, 3)}
        check_vae(Component({"latent_channels": 16, "spatial_compression_ratio": 8}, weights_of_shapes(shapes)))

"""Recognition of a checkpoint's base model."""

from pathlib import Path

import pytest
import torch

from library.architectures.sdxl.load import CLIP_G_PREFIX, single_file_parts
from library.architectures.specs import list_specs
from library.checkpoints.base_model_spec import BaseModelSpec
from library.checkpoints.weights import Weights, select_weights
from library.errors import NotThere
from library.models.identify import (
    base_of_file,
    base_of_folder,
    find_spec,
    refuse_other_file,
    refuse_other_folder,
    refuse_other_model,
    suggest_fix,
)
from library.models.loading import Absent
from library.models.unet.checkpoint_keys import UNET_PREFIX
from tests.contracts.full_size import checkpoint, facts

ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
PROJECTION = "model.diffusion_model.input_blocks.1.1.proj_in.weight"


SPECS = list_specs()


def named(spec: BaseModelSpec | None) -> str | None:
    return spec.name if spec else None


def weights(*names: str) -> Weights:
    return Weights("a.safetensors", dict.fromkeys(names, (2, 2)), lambda name: torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [
        ({ATTENTION: (320, 768)}, "sd1"),
        ({ATTENTION: (320, 1024)}, "sd2"),
        ({ATTENTION: (16, 32), PROJECTION: (16, 16, 1, 1)}, "sd1"),
        ({ATTENTION: (16, 32), PROJECTION: (16, 16)}, "sd2"),
    ],
)
def test_generations_differ_by_the_width_of_the_text_and_small_ones_by_their_projections(shapes, wanted):
    assert named(base_of_file(SPECS, shapes)) == wanted


def test_a_file_without_a_unet_is_of_no_base_model():
    assert base_of_file(SPECS, {"encoder.conv_in.weight": (1,)}) is None


def test_the_size_embedding_makes_a_unet_sdxls_whatever_the_pipeline_is_called():
    assert named(base_of_folder(SPECS, "", {"add_embedding.linear_1.weight": (4, 4)})) == "sdxl"
    assert named(base_of_folder(SPECS, "StableDiffusionXLImg2ImgPipeline", {})) == "sdxl"


def test_the_way_out_is_a_flag_between_generations_and_a_script_between_models():
    sd1, sd2, sdxl, flux = (find_spec(SPECS, name) for name in ("sd1", "sd2", "sdxl", "flux"))
    assert suggest_fix(sd2, sd1) == "add --v2"
    assert suggest_fix(sd1, sd2) == "remove --v2"
    prompts = "or train_leco.py to train from prompts alone"
    assert suggest_fix(sd2, sdxl) == f"use train_network.py with --v2, {prompts}"
    assert suggest_fix(flux, sdxl) == f"use flux_train_network.py, {prompts}"


def test_the_refiner_is_called_by_its_name():
    refiner = weights("conditioner.embedders.0.model.ln_final.weight", "model.diffusion_model.label_emb.0.0.weight")
    with pytest.raises(ValueError, match=r"--flag a\.safetensors: this is the SDXL refiner; only the base model can"):
        refuse_other_file(SPECS, "--flag", refiner, "sdxl")


def test_an_sdxl_file_without_its_second_text_encoder_names_what_is_missing():
    found = checkpoint("sdxl")
    found = select_weights(found, {name: name for name in found.shapes if not name.startswith(CLIP_G_PREFIX)})
    with pytest.raises(ValueError, match=r"has a U-Net but no text encoder .*conditioner.embedders.1.model"):
        single_file_parts("--flag", found)


@pytest.mark.parametrize("wanted", ["sd1", "sdxl"])
def test_a_file_of_an_unknown_transformer_is_not_taken_for_a_unet(wanted: str) -> None:
    """Files of all parts begin their denoiser's names alike, whatever it is."""
    found = weights("model.diffusion_model.blocks.0.attn.qkv.weight", "vae.encoder.conv_in.weight")
    assert base_of_file(SPECS, found.shapes) is None
    with pytest.raises(ValueError, match=r"its denoiser belongs to no supported model .*blocks\.0\.attn\.qkv"):
        refuse_other_file(SPECS, "--flag", found, wanted)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_chroma_shares_a_script_with_the_model_that_it_looks_like_and_has_a_flag(prefix: str) -> None:
    blocks = f"{prefix}double_blocks.0.img_attn.qkv.weight"
    chroma, flux = weights(blocks, f"{prefix}distilled_guidance_layer.in_proj.weight"), weights(blocks)
    for wanted, found, way in (
        ("lumina", chroma, r"Chroma model; use flux_train_network\.py with --model_type chroma"),
        ("flux", chroma, "Chroma model; add --model_type chroma"),
        ("chroma", flux, "FLUX model; remove --model_type chroma"),
    ):
        with pytest.raises(ValueError, match=f"this is a {way}"):
            refuse_other_model(SPECS, "--flag", "a.safetensors", found.shapes, wanted)
    refuse_other_model(SPECS, "--flag", "a.safetensors", chroma.shapes, "chroma")
    with pytest.raises(ValueError, match="this is a Chroma Radiance model, which has no latents"):
        refuse_other_model(SPECS, "--flag", "a", weights(*chroma.shapes, f"{prefix}nerf_image_embedder.x").shapes, "x")


def test_a_unet_with_two_text_encoders_is_sdxls_where_nothing_names_the_pipeline(tmp_path: Path) -> None:
    for part in ("unet", "text_encoder", "text_encoder_2"):
        (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match=r"this is an SDXL model; use sdxl_train_network\.py"):
        refuse_other_folder(SPECS, "--flag", tmp_path, "sd1")
    refuse_other_folder(SPECS, "--flag", tmp_path, "sdxl")


FULL_SIZE = [  # (file of names, where they are in it, the base model)
    ("sd15", ("checkpoint",), "sd1"), ("sd21", ("checkpoint",), "sd2"), ("sdxl", ("checkpoint",), "sdxl"),
    ("flux1", ("components", "dit"), "flux"), ("chroma", ("components", "dit"), "chroma"),
    ("lumina2", ("components", "dit"), "lumina"),
    ("anima", ("components", "dit"), "anima"), ("hunyuan_image", ("components", "dit"), "hunyuan_image"),
    ("sd3", ("mmdit", "sd3-medium"), "sd3"), ("sd3", ("mmdit", "sd3.5-medium"), "sd3"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "path", "base"), FULL_SIZE)
def test_one_base_model_has_the_surest_sign_in_each_checkpoint_that_people_have(
    file: str, path: tuple[str, ...], base: str
) -> None:
    content = facts(file)
    for step in path:
        content = content[step]
    shapes = {key: tuple(shape) for key, shape in content.items()}
    surest = {spec.name: max((s.certainty for s in spec.checkpoint if s.is_in(shapes)), default=0) for spec in SPECS}
    assert [name for name, certainty in surest.items() if certainty == max(surest.values())] == [base]


def test_a_file_of_the_unet_alone_is_enough_where_nothing_needs_the_rest() -> None:
    """Its size embedding cannot be told from the file alone: bigG's width is that of every SDXL model."""
    found = checkpoint("sdxl")
    alone = select_weights(found, {name: name for name in found.shapes if name.startswith(UNET_PREFIX)})
    whole, lone = single_file_parts("--flag", found), single_file_parts("--flag", alone, may_lack_text=True)
    assert lone.unet.config == whole.unet.config
    assert all(isinstance(clip, Absent) for clip in lone.clips)
    with pytest.raises(NotThere, match=r"--flag sdxl has a U-Net but no text encoder.*use a full checkpoint"):
        lone.clips[1].config  # noqa: B018

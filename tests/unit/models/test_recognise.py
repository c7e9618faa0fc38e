"""Which base model a checkpoint is of."""

import pytest
import torch

from library.checkpoints.weights import Weights
from library.models.identify import base_of_file, base_of_folder, refuse_other_file, unet_generation, way_out

ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
PROJECTION = "model.diffusion_model.input_blocks.1.1.proj_in.weight"


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
    assert unet_generation(shapes) == wanted


def test_a_file_without_a_unet_is_of_no_base_model():
    assert base_of_file(["encoder.conv_in.weight"], {"encoder.conv_in.weight": (1,)}) is None


def test_the_size_embedding_makes_a_unet_sdxls_whatever_the_pipeline_is_called():
    assert base_of_folder("", {"add_embedding.linear_1.weight": (4, 4)}) == "sdxl"
    assert base_of_folder("StableDiffusionXLImg2ImgPipeline", {}) == "sdxl"


def test_the_way_out_is_a_flag_between_generations_and_a_script_between_models():
    assert way_out("sd2", "sd1") == "add --v2"
    assert way_out("sd1", "sd2") == "leave out --v2"
    assert way_out("sd2", "sdxl") == "use train_network.py with --v2"
    assert way_out("flux", "sdxl") == "use flux_train_network.py"


def test_the_refiner_is_called_by_its_name():
    refiner = weights("conditioner.embedders.0.model.ln_final.weight", "model.diffusion_model.label_emb.0.0.weight")
    with pytest.raises(ValueError, match=r"--flag a\.safetensors: this is the SDXL refiner; only the base model is"):
        refuse_other_file("--flag", refiner, "sdxl", ())


def test_an_sdxl_file_without_its_second_text_encoder_names_what_is_missing():
    names = ("conditioner.embedders.0.transformer.x", "model.diffusion_model.label_emb.0.0.weight")
    with pytest.raises(ValueError, match=r"has a U-Net but no text encoder .*conditioner.embedders.1.model"):
        refuse_other_file(
            "--flag", weights(*names), "sdxl", ("conditioner.embedders.0.", "conditioner.embedders.1.model")
        )

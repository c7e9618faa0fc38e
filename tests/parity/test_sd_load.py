"""Loading SD 1.x gives the values of diffusers from a folder and its names from a single file."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from library.architectures.sd.assembly import build
from library.checkpoints.weights import Weights
from library.models.unet.checkpoint_keys import UNET_PREFIX, UnetLayout, unet_from_ldm, unet_to_ldm
from library.models.unet.unet import empty_unet, unet_config, unet_layout
from library.models.vae.checkpoint_keys import VAE_PREFIX, vae_to_ldm
from library.models.vae.vae import empty_vae, single_vae, vae_config
from library.options.model import ModelOptions
from library.options.train import TrainOptions
from tests.tolerances import EXACT


@pytest.fixture(scope="module")
def loader(tiny_sd_folder: Path):
    return build(TrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(tiny_sd_folder)))).load


@torch.no_grad()
def test_the_unet_matches_diffusers(loader, tiny_sd_folder):
    theirs = UNet2DConditionModel.from_pretrained(tiny_sd_folder / "unet").eval().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(51)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    text_BTW = torch.randn(2, 77, 32, generator=generator)
    times_B = torch.tensor([3, 950])
    actual, wanted = (m(latents_BCHW, times_B, text_BTW).sample for m in (loader.denoiser(), theirs))
    torch.testing.assert_close(actual, wanted, **EXACT)


@torch.no_grad()
def test_the_vae_matches_diffusers(loader, tiny_sd_folder):
    theirs = AutoencoderKL.from_pretrained(tiny_sd_folder / "vae").eval().to(memory_format=torch.channels_last)
    pixels_BCHW = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(52))
    actual, wanted = (m.encode(pixels_BCHW).latent_dist.parameters for m in (loader.vae(), theirs))
    torch.testing.assert_close(actual, wanted, **EXACT)


UNETS = {
    "one level": {"channels": (32,), "layers": 1, "attention": (True,)},
    "two levels, two layers": {"channels": (32, 64), "layers": 2, "attention": (True, True)},
    "attention at the coarse levels": {"channels": (32, 32, 64), "layers": 1, "attention": (False, True, True)},
    "five levels, three layers": {"channels": (32,) * 5, "layers": 3, "attention": (True, False, True, False, False)},
    "linear projections, two transformers": {"channels": (32, 64), "layers": 1, "attention": (True, False), "depth": 2},
}


def meta_unet(channels, layers, attention, depth=1) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=channels,
            layers_per_block=layers,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            cross_attention_dim=48,
            transformer_layers_per_block=depth,
            use_linear_projection=depth > 1,
            attention_head_dim=8,
        )


@pytest.mark.parametrize("kind", UNETS)
def test_unet_names_of_any_size_are_converted_as_in_diffusers(kind):
    spec = UNETS[kind]
    unet = meta_unet(**spec)
    layout = UnetLayout(spec["layers"], spec["attention"])
    ldm = {unet_to_ldm(name, layout): tensor for name, tensor in unet.state_dict().items()}
    assert len(ldm) == len(unet.state_dict())
    assert {unet_from_ldm(name, layout) for name in ldm} == unet.state_dict().keys()
    theirs = convert_ldm_unet_checkpoint({UNET_PREFIX + k: v for k, v in ldm.items()}, dict(unet.config))
    assert {name: id(tensor) for name, tensor in theirs.items()} == {
        unet_from_ldm(name, layout): id(tensor) for name, tensor in ldm.items()
    }


@pytest.mark.parametrize("kind", UNETS)
def test_a_unet_of_any_size_is_rebuilt_from_its_shapes(kind):
    spec = UNETS[kind]
    unet = meta_unet(**spec)
    layout = UnetLayout(spec["layers"], spec["attention"])
    actual = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    assert unet_layout({unet_to_ldm(name, layout): shape for name, shape in actual.items()}) == layout
    rebuilt = empty_unet(unet_config(actual))
    assert {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()} == actual


@pytest.mark.parametrize("channels", [(8,), (8, 16), (16, 16, 32, 32, 32)])
@pytest.mark.parametrize("layers", [1, 3])
def test_vae_names_of_any_size_are_converted_as_in_diffusers_and_rebuilt(channels, layers):
    num_levels = len(channels)
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=channels,
            layers_per_block=layers,
            down_block_types=("DownEncoderBlock2D",) * num_levels,
            up_block_types=("UpDecoderBlock2D",) * num_levels,
            norm_num_groups=8,
        )
    actual = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    ldm = {VAE_PREFIX + vae_to_ldm(name, num_levels): torch.empty(shape) for name, shape in actual.items()}
    ours = {name.removeprefix(VAE_PREFIX): name for name in ldm}
    back = single_vae(Weights("vae", {k: tuple(ldm[n].shape) for k, n in ours.items()}, lambda k: ldm[ours[k]]))
    theirs = convert_ldm_vae_checkpoint(ldm, dict(vae.config))
    assert {name: id(tensor) for name, tensor in theirs.items()} == {
        name: id(back.weights.read(name)) for name in back.weights.shapes
    }
    rebuilt = empty_vae(vae_config(actual))
    assert {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()} == actual

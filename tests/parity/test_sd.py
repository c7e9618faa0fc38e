"""Loading SD 1.x, 2.x and SDXL gives the values of diffusers, and their text encoding those of transformers."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.sd.assembly import build
from library.architectures.sd.assembly import build as build_sd
from library.architectures.sdxl.assembly import build as build_sdxl
from library.architectures.sdxl.load import CLIP_G_PREFIX
from library.architectures.sdxl.options import SdxlOptions, SdxlSizeOptions
from library.checkpoints.weights import Weights
from library.models.unet.checkpoint_keys import UNET_PREFIX, UnetLayout, unet_from_ldm, unet_to_ldm
from library.models.unet.unet import empty_unet, unet_config, unet_layout
from library.models.vae.checkpoint_keys import VAE_PREFIX, vae_to_ldm
from library.models.vae.vae import empty_vae, single_vae, vae_config
from library.options.model import ModelOptions
from library.options.train import TrainOptions
from library.protocols import Architecture
from library.types import Batch, Noised
from tests.hiding import lazily
from tests.tolerances import EXACT, FLOAT32_DEEP, FLOAT32_SAME_MATH

diffusers = lazily("diffusers")
single_file = lazily("diffusers.loaders.single_file_utils")
transformers = lazily("transformers")


@pytest.fixture(scope="module")
def loader(tiny_sd_folder: Path):
    return build(TrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(tiny_sd_folder)))).load


@torch.no_grad()
def test_the_unet_matches_diffusers(loader, tiny_sd_folder):
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tiny_sd_folder / "unet").eval()
    theirs.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(51)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    text_BTW = torch.randn(2, 77, 32, generator=generator)
    times_B = torch.tensor([3, 950])
    actual, wanted = (m(latents_BCHW, times_B, text_BTW).sample for m in (loader.denoiser(), theirs))
    torch.testing.assert_close(actual, wanted, **EXACT)


@torch.no_grad()
def test_the_vae_matches_diffusers(loader, tiny_sd_folder):
    theirs = diffusers.AutoencoderKL.from_pretrained(tiny_sd_folder / "vae").eval()
    theirs.to(memory_format=torch.channels_last)
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


def meta_unet(channels, layers, attention, depth=1) -> Any:
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
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
    theirs = single_file.convert_ldm_unet_checkpoint({UNET_PREFIX + k: v for k, v in ldm.items()}, dict(unet.config))
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
        vae = diffusers.AutoencoderKL(
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
    theirs = single_file.convert_ldm_vae_checkpoint(ldm, dict(vae.config))
    assert {name: id(tensor) for name, tensor in theirs.items()} == {
        name: id(back.weights.read(name)) for name in back.weights.shapes
    }
    rebuilt = empty_vae(vae_config(actual))
    assert {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()} == actual


# SD 1.x text encoding against transformers and a literal recomputation of chunks and emphasis.

CAPTIONS = ["a red cat and a dog", "", "Ünïcödé 猫, 12%\n(round) [square]"]


def encode(folder: Path, captions: list[str], **model: object) -> Tensor:
    arch = build(TrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(folder), **model)))
    return arch.text.encode(arch.load.text_encoders(), arch.text.tokenize(captions))["hidden_state"]


@pytest.fixture(scope="module")
def theirs(tiny_sd_folder: Path) -> tuple[Any, Any]:
    """Load the same folder with transformers."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_sd_folder / "tokenizer")
    return tokenizer, transformers.CLIPTextModel.from_pretrained(tiny_sd_folder / "text_encoder").eval()


def their_ids(tokenizer: Any, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]


@torch.no_grad()
def test_the_last_hidden_state_matches_transformers(tiny_sd_folder, theirs):
    tokenizer, model = theirs
    wanted_BTW = model(their_ids(tokenizer, CAPTIONS)).last_hidden_state
    torch.testing.assert_close(encode(tiny_sd_folder, CAPTIONS), wanted_BTW, **EXACT)


@torch.no_grad()
def test_clip_skip_1_is_the_last_hidden_state(tiny_sd_folder):
    torch.testing.assert_close(encode(tiny_sd_folder, CAPTIONS, clip_skip=1), encode(tiny_sd_folder, CAPTIONS), **EXACT)


@torch.no_grad()
def test_clip_skip_2_is_the_penultimate_layer_with_the_final_norm(tiny_sd_folder, theirs):
    tokenizer, model = theirs
    states = model(their_ids(tokenizer, CAPTIONS), output_hidden_states=True).hidden_states
    wanted_BTW = model.final_layer_norm(states[-2])
    torch.testing.assert_close(encode(tiny_sd_folder, CAPTIONS, clip_skip=2), wanted_BTW, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize(("max_token_length", "num_positions"), [(150, 152), (225, 227)])
@pytest.mark.parametrize("num_words", [3, 75, 76, 140, 300])
def test_long_captions_are_encoded_in_chunks_and_joined(
    tiny_sd_folder, theirs, max_token_length, num_positions, num_words
):
    """Chunks of 75 tokens are each enclosed by begin and end tokens; only the first begin and last end are kept."""
    tokenizer, model = theirs
    caption = " ".join(["red", "cat", "and", "dog", "x"][i % 5] for i in range(num_words))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer(caption, add_special_tokens=False)["input_ids"][:max_token_length]
    assert len(ids) == min(num_words, max_token_length)
    ids += [end] * (max_token_length - len(ids))
    rows = []
    for start in range(0, max_token_length, 75):
        chunk = torch.tensor([[begin, *ids[start : start + 75], end]])
        hidden = model(chunk).last_hidden_state[0]
        for position in range(77):
            is_first_begin = position == 0 and start == 0
            is_last_end = position == 76 and start == max_token_length - 75
            if 1 <= position <= 75 or is_first_begin or is_last_end:
                rows.append(hidden[position])
    found_BTW = encode(tiny_sd_folder, [caption], max_token_length=max_token_length)
    assert found_BTW.shape == (1, num_positions, 32)
    torch.testing.assert_close(found_BTW[0], torch.stack(rows), **FLOAT32_DEEP)


@torch.no_grad()
def test_emphasis_scales_the_features_of_its_tokens(tiny_sd_folder, theirs):
    tokenizer, model = theirs
    plain_TW = model(their_ids(tokenizer, ["a red cat and dog x"])).last_hidden_state[0]
    factors_T = torch.ones(77)
    factors_T[2] = 1.1  # red
    factors_T[3] = 1.1 * 1.3  # cat
    factors_T[5] = 1 / 1.1  # dog
    found_BTW = encode(tiny_sd_folder, ["a (red (cat:1.3)) and [dog] x"], weighted_captions=True)
    torch.testing.assert_close(found_BTW[0], plain_TW * factors_T[:, None], **FLOAT32_DEEP)


@torch.no_grad()
def test_emphasis_on_a_long_caption_scales_all_but_begin_end_and_padding(tiny_sd_folder):
    caption = " ".join(["cat"] * 100)
    plain = encode(tiny_sd_folder, [caption], max_token_length=150)[0]
    weighted = encode(tiny_sd_folder, [f"({caption}:2)"], max_token_length=150, weighted_captions=True)[0]
    factors_T = torch.tensor([1.0] + [2.0] * 100 + [1.0] * 51)
    torch.testing.assert_close(weighted, plain * factors_T[:, None], **FLOAT32_DEEP)


@torch.no_grad()
def test_without_the_flag_brackets_are_plain_text(tiny_sd_folder):
    caption = ["a (red:1.3) cat"]
    with_flag, without = encode(tiny_sd_folder, caption, weighted_captions=True), encode(tiny_sd_folder, caption)
    assert not torch.allclose(with_flag, without)


# Loading SD 2.x and SDXL gives the values of diffusers, from a folder and from a single file.

XL_CAPTIONS = ["a red cat and dog", ""]


def open_sd2(path: Path, **model: Any) -> Architecture:
    return build_sd(TrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(path), v2=True, **model)))


def open_sdxl(path: Path, correct: bool = False, **model: Any) -> Architecture:
    options = ModelOptions(pretrained_model_name_or_path=str(path), **model)
    return build_sdxl(SdxlOptions(model=options, sizes=SdxlSizeOptions(correct)))


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl_folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)


@torch.no_grad()
def encode_captions(arch: Architecture, captions: list[str]) -> dict[str, Tensor]:
    return dict(arch.text.encode(arch.load.text_encoders(), arch.text.tokenize(captions)))


def test_folder_and_single_file_give_the_same_weights(
    tiny_sdxl_folder: Path, tiny_sdxl_file: Path, tiny_sd2_folder: Path, tiny_sd2_file: Path
) -> None:
    for folder, file in (
        (open_sdxl(tiny_sdxl_folder), open_sdxl(tiny_sdxl_file)),
        (open_sd2(tiny_sd2_folder), open_sd2(tiny_sd2_file)),
    ):
        for a, b in zip(
            [folder.load.denoiser(), folder.load.vae(), *folder.load.text_encoders()],
            [file.load.denoiser(), file.load.vae(), *file.load.text_encoders()],
            strict=True,
        ):
            wanted, actual = a.state_dict(), b.state_dict()
            assert wanted.keys() == actual.keys()
            assert all(torch.equal(wanted[name], actual[name]) for name in wanted)
            assert type(a) is type(b)


@pytest.mark.parametrize("layout", ["tiny_sdxl_folder", "tiny_sdxl_file"])
@torch.no_grad()
def test_caption_features_match_diffusers(pipeline: Any, layout: str, request: pytest.FixtureRequest) -> None:
    """The pooled vector agrees too, so the text projection is right in both layouts."""
    actual = encode_captions(open_sdxl(request.getfixturevalue(layout)), XL_CAPTIONS)
    text_BTW, _, pooled_BP, _ = pipeline.encode_prompt(XL_CAPTIONS, do_classifier_free_guidance=False)
    joined_BTW = torch.cat([actual["hidden_state1"], actual["hidden_state2"]], dim=-1)
    torch.testing.assert_close(joined_BTW, text_BTW, **FLOAT32_SAME_MATH)
    torch.testing.assert_close(actual["pool2"], pooled_BP, **FLOAT32_SAME_MATH)


@torch.no_grad()
def test_the_text_projection_of_a_single_file_is_converted_as_in_diffusers(tiny_sdxl_file: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    arch = open_sdxl(tiny_sdxl_file)
    encoder = arch.load.text_encoders()[1]
    theirs = convert_open_clip_checkpoint(encoder, load_file(tiny_sdxl_file), prefix=CLIP_G_PREFIX)
    torch.testing.assert_close(encoder.text_projection.weight, theirs["text_projection.weight"], **EXACT)  # type: ignore[union-attr]


@torch.no_grad()
def test_the_pooled_vector_matches_its_closed_form_at_the_first_end_token(tiny_sdxl_file: Path) -> None:
    """The closed form is x times OpenCLIP's matrix from the right, in float64."""
    arch = open_sdxl(tiny_sdxl_file)
    encoder = arch.load.text_encoders()[1]
    tokens = arch.text.tokenize(["red cat"])
    normed_TW = encoder(tokens.ids_BLT[1][:, 0]).last_hidden_state[0].double()
    matrix = load_file(tiny_sdxl_file)[f"{CLIP_G_PREFIX}text_projection"].double()
    wanted_P = normed_TW[3] @ matrix  # begin, red, cat, end
    torch.testing.assert_close(encode_captions(arch, ["red cat"])["pool2"][0].double(), wanted_P, **FLOAT32_SAME_MATH)


@torch.no_grad()
def test_sd2_caption_features_match_diffusers(tiny_sd2_folder: Path, tiny_sd2_file: Path) -> None:
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(tiny_sd2_folder, safety_checker=None, feature_extractor=None)
    text_BTW, _ = theirs.encode_prompt(XL_CAPTIONS, torch.device("cpu"), 1, False)
    for path in (tiny_sd2_folder, tiny_sd2_file):
        torch.testing.assert_close(
            encode_captions(open_sd2(path), XL_CAPTIONS)["hidden_state"], text_BTW, **FLOAT32_SAME_MATH
        )


def noised(seed: int) -> Noised:
    generator = torch.Generator().manual_seed(seed)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    return Noised(latents_BCHW, latents_BCHW, latents_BCHW, torch.ones(2), torch.tensor([7, 913]))


def batch(sizes: list[list[float]], crops: list[list[float]] | None = None) -> Batch:
    return Batch(
        keys=["", ""], captions=["", ""], pixels_BCHW=None, latents_BCHW=None, conditioning=None,
        loss_weights_B=torch.ones(2), masks_B1HW=None, sizes_B6=torch.tensor(sizes), attributes=[{}, {}],
        crops_B2=None if crops is None else torch.tensor(crops),
    )  # fmt: skip


SIZES = [[1200.0, 800.0, 3.0, 5.0, 1024.0, 768.0], [640.0, 480.0, 0.0, 11.0, 512.0, 512.0]]


@torch.no_grad()
def test_the_denoiser_receives_the_pipelines_inputs(pipeline: Any, tiny_sdxl_folder: Path) -> None:
    arch = open_sdxl(tiny_sdxl_folder)
    conditioning = encode_captions(arch, XL_CAPTIONS)
    text_BTW, _, pooled_BP, _ = pipeline.encode_prompt(XL_CAPTIONS, do_classifier_free_guidance=False)
    width = pipeline.text_encoder_2.config.projection_dim
    rows = [
        pipeline._get_add_time_ids(s[:2], s[2:4], s[4:], torch.float32, text_encoder_projection_dim=width)
        for s in SIZES
    ]
    ids_B6 = torch.cat(rows)
    values = noised(61)
    wanted = pipeline.unet(
        values.latents_BCHW,
        values.timesteps_B,
        text_BTW,
        added_cond_kwargs={"text_embeds": pooled_BP, "time_ids": ids_B6},
    ).sample
    actual = arch.predict(arch.load.denoiser(), values, conditioning, batch(SIZES))
    torch.testing.assert_close(actual, wanted, **FLOAT32_DEEP)


@torch.no_grad()
def test_size_embeddings_match_their_closed_form(tiny_sdxl_folder: Path) -> None:
    """Each size gives cos and sin of size / 10000^(i / half), concatenated after the pooled vector."""
    arch = open_sdxl(tiny_sdxl_folder)
    unet = arch.load.denoiser()
    embeddings: list[Tensor] = []
    unet.add_embedding.register_forward_pre_hook(lambda module, inputs: embeddings.append(inputs[0]))  # type: ignore[union-attr, operator]
    conditioning = encode_captions(arch, XL_CAPTIONS)
    arch.predict(unet, noised(62), conditioning, batch(SIZES))
    half = 4
    rows = []
    for sizes in SIZES:
        angles = [[size / 10000 ** (i / half) for i in range(half)] for size in sizes]
        rows.append([f(a) for row in angles for f in (math.cos, math.sin) for a in row])
    wanted = torch.cat([conditioning["pool2"].double(), torch.tensor(rows, dtype=torch.float64)], dim=1)
    # float32 angles up to 1200 have errors of 1200 * 2^-24, so their sines of about 7e-5
    torch.testing.assert_close(embeddings[0].double(), wanted, rtol=0, atol=2e-4)


def test_correct_crop_coordinates_replace_the_usual_ones_on_request(tiny_sdxl_folder: Path) -> None:
    crop_batch = batch(SIZES, [[21.0, 22.0], [23.0, 24.0]])
    time_ids: list[list[list[float]]] = []

    def denoiser(latents: Tensor, timesteps: Tensor, added_cond_kwargs: dict[str, Tensor], **_: Any) -> Any:
        time_ids.append(added_cond_kwargs["time_ids"].tolist())
        return SimpleNamespace(sample=latents)

    for correct in (False, True):
        arch = open_sdxl(tiny_sdxl_folder, correct)
        arch.predict(denoiser, noised(62), encode_captions(arch, XL_CAPTIONS), crop_batch)  # type: ignore[arg-type]
    usual, real = time_ids
    assert usual == SIZES
    wanted = [[*SIZES[0][:2], 21.0, 22.0, *SIZES[0][4:]], [*SIZES[1][:2], 23.0, 24.0, *SIZES[1][4:]]]
    assert real == wanted


@pytest.mark.parametrize(("max_token_length", "num_positions"), [(150, 152), (225, 227)])
@torch.no_grad()
def test_long_captions_are_encoded_in_chunks_and_pooled_from_the_first(
    tiny_sdxl_folder: Path, max_token_length: int, num_positions: int
) -> None:
    caption = " ".join(["cat"] * 70 + ["red", "dog"] * 10)
    arch = open_sdxl(tiny_sdxl_folder, max_token_length=max_token_length)
    actual, first = encode_captions(arch, [caption]), encode_captions(open_sdxl(tiny_sdxl_folder), [caption])
    assert actual["hidden_state1"].shape == (1, num_positions, 32)
    assert actual["hidden_state2"].shape == (1, num_positions, 48)
    torch.testing.assert_close(actual["pool2"], first["pool2"], **FLOAT32_SAME_MATH)
    torch.testing.assert_close(actual["hidden_state2"][:, :76], first["hidden_state2"][:, :76], **FLOAT32_SAME_MATH)


def test_each_text_encoder_uses_its_own_padding(tiny_sdxl_folder: Path) -> None:
    text = open_sdxl(tiny_sdxl_folder, max_token_length=150).text
    ids1_BLT, ids2_BLT = text.tokenize(["red cat"]).ids_BLT
    begin, end = ids1_BLT[0, 0, 0].item(), text.tokens.end_id  # type: ignore[attr-defined]
    assert ids1_BLT[0, 0, 3:].tolist() == [end] * 74
    assert ids2_BLT[0, 0, 3:].tolist() == [end] + [0] * 73
    assert ids2_BLT[0, 1].tolist() == [begin, end] + [0] * 75

"""Loading SD 2.x and SDXL gives the values of diffusers, from a folder and from a single file."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.sd.assembly import build as build_sd
from library.architectures.sdxl.assembly import build as build_sdxl
from library.architectures.sdxl.load import CLIP_G_PREFIX
from library.architectures.sdxl.options import SdxlOptions, SdxlSizeOptions
from library.options.model import ModelOptions
from library.options.train import TrainOptions
from library.protocols import Architecture
from library.types import Batch, Noised
from tests.tolerances import EXACT, FLOAT32_DEEP, FLOAT32_SAME_MATH

CAPTIONS = ["a red cat and dog", ""]


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
def encode(arch: Architecture, captions: list[str]) -> dict[str, Tensor]:
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
    actual = encode(open_sdxl(request.getfixturevalue(layout)), CAPTIONS)
    text_BTW, _, pooled_BP, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
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
    torch.testing.assert_close(encode(arch, ["red cat"])["pool2"][0].double(), wanted_P, **FLOAT32_SAME_MATH)


@torch.no_grad()
def test_sd2_caption_features_match_diffusers(tiny_sd2_folder: Path, tiny_sd2_file: Path) -> None:
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(tiny_sd2_folder, safety_checker=None, feature_extractor=None)
    text_BTW, _ = theirs.encode_prompt(CAPTIONS, torch.device("cpu"), 1, False)
    for path in (tiny_sd2_folder, tiny_sd2_file):
        torch.testing.assert_close(encode(open_sd2(path), CAPTIONS)["hidden_state"], text_BTW, **FLOAT32_SAME_MATH)


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
    conditioning = encode(arch, CAPTIONS)
    text_BTW, _, pooled_BP, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
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
    conditioning = encode(arch, CAPTIONS)
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
        arch.predict(denoiser, noised(62), encode(arch, CAPTIONS), crop_batch)  # type: ignore[arg-type]
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
    actual, first = encode(arch, [caption]), encode(open_sdxl(tiny_sdxl_folder), [caption])
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

"""MOSS-Image against an independent implementation in float64: its denoiser, text features, and previews."""

from contextlib import nullcontext
from dataclasses import replace
from math import exp, log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.architectures.moss_image.assembly import SKIPPED, build
from library.architectures.moss_image.options import MossImageOptions
from library.data.decoding.tensors import to_pixels
from library.models.qwen3_vl_vision import fit_image
from library.types import CaptionWithImages, Prompt
from moss_image_train_network import setup_parser
from tests.parity.test_preview import ours
from tests.tiny import moss_image
from tests.tiny.moss_image import CONFIG, build_tiny_moss_image, inputs, tiny_moss_image
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED

State = dict[str, Tensor]
SIDES = ((3, 4), (2, 5))  # of two reference images
PROMPT = Prompt(
    text="a red cat", negative="dog", width=64, height=96, seed=7, num_steps=4, scale=3.0, sampler=None,
    guidance_scale=None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=5.0,
)  # fmt: skip

# One sample at a time, without padding, masks and batches


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def rms(state: State, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]


def situ(up: Tensor, gate: Tensor) -> Tensor:
    return 4 * (gate / 4).tanh() / (1 + (-gate).exp()) * 25 * (up / 25).tanh()


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate value j of each head with value j + D / 2; x is (tokens, heads, D), positions (tokens, 4)."""
    half = x.shape[-1] // 2
    bands = 10000.0 ** -(torch.arange(half // 4, dtype=torch.float64) / (half // 4))
    phases = torch.cat([positions[:, axis, None] * bands for axis in range(4)], dim=1)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * phases.cos() - b * phases.sin(), a * phases.sin() + b * phases.cos()], dim=-1)


def attention(state: State, name: str, qkv: list[Tensor], positions: Tensor, sees: Tensor) -> Tensor:
    """Attention of all heads; `sees` is true where a query (row) sees a key (column)."""
    q, k, v = (x.reshape(len(x), -1, CONFIG.head_width) for x in qkv)
    q, k = (rotated(rms(state, f"{name}.{kind}_norm", x), positions) for kind, x in (("q", q), ("k", k)))
    scores = torch.einsum("qnd,knd->nqk", q, k) / CONFIG.head_width**0.5
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, v).flatten(1)


def image_positions(number: int, length: int, h: int, w: int) -> list[list[float]]:
    return [[number, length, y - (h - 1) / 2, x - (w - 1) / 2] for y in range(h) for x in range(w)]


def level_vector(state: State, sigma: float) -> Tensor:
    half = CONFIG.level_features // 2
    phases = torch.tensor([1000 * sigma * exp(-log(10000) * k / half) for k in range(half)], dtype=torch.float64)
    hidden = linear(state, "time_embedding.0", torch.cat([phases.cos(), phases.sin()]))
    return linear(state, "time_embedding.2", hidden * torch.sigmoid(hidden))


def velocity(state: State, latent: Tensor, sigma: float, text: Tensor, shown: list[Tensor], skipped: Any) -> Tensor:
    """Return the velocity of one sample, (C, h, w); `text` has real tokens only."""
    length, sizes = len(text), [tuple(image.shape[1:]) for image in (latent, *shown)]
    positions = [
        torch.tensor(image_positions(number, length, *size), dtype=torch.float64) for number, size in enumerate(sizes)
    ]
    text_positions = torch.tensor([[0, i, 0, 0] for i in range(length)], dtype=torch.float64)
    x = linear(state, "text_embedder.proj", text)
    everything = torch.ones(length, length, dtype=torch.bool)
    for n in range(CONFIG.num_text_blocks):
        b = f"text_embedder.blocks.{n}"
        qkv = linear(state, f"{b}.qkv", rms(state, f"{b}.norm1", x)).chunk(3, -1)
        x = x + linear(state, f"{b}.proj", attention(state, b, list(qkv), text_positions, everything))
        y = rms(state, f"{b}.norm2", x)
        x = x + linear(state, f"{b}.ffn_down", situ(linear(state, f"{b}.ffn_up", y), linear(state, f"{b}.ffn_gate", y)))
    images = [linear(state, "video_embedder", image.flatten(1).T) for image in (latent, *shown)]
    place = torch.cat([positions[0], text_positions, *positions[1:]])
    x = torch.cat([images[0], x, *images[1:]])
    is_reference = torch.arange(len(x)) >= len(images[0]) + length
    sees = ~is_reference[:, None] | is_reference[None]
    rows = [linear(state, "shared_block_modulation", level_vector(state, s)).view(6, -1) for s in (sigma, 0.0)]
    shift1, scale1, gate1, shift2, scale2, gate2 = torch.where(is_reference[:, None, None], rows[1], rows[0]).unbind(1)
    for n in range(CONFIG.num_layers):
        if n in skipped:
            continue
        b, p = f"layers.{n}", f"layers.{n}.proj"
        y = rms(state, f"{b}.norm1", x) * (1 + scale1) + shift1
        attended = attention(state, b, [linear(state, f"{p}.{kind}", y) for kind in "qkv"], place, sees)
        x = x + linear(state, f"{p}.o", attended) * gate1
        y = rms(state, f"{b}.norm2", x) * (1 + scale2) + shift2
        x = x + linear(state, f"{p}.ffn_down", situ(*linear(state, f"{p}.ffn_up_gate", y).chunk(2, -1))) * gate2
    shift, scale = linear(state, "video_head_modulation", level_vector(state, sigma)).view(2, -1)
    x = rms(state, "final_norm_video", x[: len(images[0])]) * (1 + scale) + shift
    return linear(state, "final_linear_video", x).T.reshape(latent.shape)


def references(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(2, CONFIG.in_features, *side, generator=g) for side in SIDES[:count]]


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 8)], ids=str)
@pytest.mark.parametrize(("count", "skipped"), [(0, ()), (1, ()), (2, (1,))], ids=str)
def test_the_denoiser_equals_the_formulas_in_float64(size: tuple[int, int], count: int, skipped: Any) -> None:
    """Captions of a batch have different lengths, on which the positions of images depend; gradients agree too."""
    model, shown = tiny_moss_image(1).requires_grad_(), references(count)
    latents, sigmas, text, mask = inputs(*size)
    actual = model(latents, sigmas, text, mask, shown, skipped)
    state = {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}
    expected = torch.stack(
        [
            velocity(
                state, latents[b].double(), float(sigmas[b].double()), text[b, : int(mask[b].sum())].double(),
                [image[b].double() for image in shown], skipped,
            )
            for b in range(2)
        ]
    )  # fmt: skip
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference < 1e-6 and expected.abs().max() > 1
    weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(9))
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            theirs = state[name].grad
            assert theirs is not None and (parameter.grad - theirs).norm() < 1e-5 * theirs.norm(), name


def test_a_residual_stream_beyond_float16_stays_finite() -> None:
    model, values = tiny_moss_image(1), inputs(4, 6)
    for block in model.layers:
        block.get_parameter("proj.o.weight").mul_(3e4)
    expected = model(*values)
    residual: list[Tensor] = []
    hook = model.layers[-1].register_forward_hook(lambda _module, _inputs, output: residual.append(output))
    model(*values)
    hook.remove()
    assert residual[0].abs().max() > torch.finfo(torch.float16).max
    actual = model.half()(*(value.half() if value.is_floating_point() else value for value in values)).float()
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.999


# From text to images


def run_of(folder: Path, arguments: list[str]) -> Any:
    arch = build(MossImageOptions.from_args(setup_parser().parse_args(arguments)))
    models = SimpleNamespace(denoiser=arch.load.denoiser(), text_encoders=arch.load.text_encoders())
    return SimpleNamespace(arch=arch, models=models, device=torch.device("cpu"), autocast=nullcontext)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moss_image")


@pytest.fixture(scope="module")
def run(folder: Path) -> Any:
    return run_of(folder, build_tiny_moss_image(folder, 9, "diffusers"))


@pytest.fixture(scope="module")
def qwen(folder: Path, run: Any) -> Any:
    from transformers import Qwen3_5Model

    return Qwen3_5Model.from_pretrained(folder / "text_encoder").eval()


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@torch.no_grad()
def test_captions_give_every_state_of_the_chat_template_after_the_last_norm(run: Any, qwen: Any) -> None:
    captions = ["a red cat, sitting", "", "dog " * 30]
    text = run.arch.text
    features = text.encode(run.models.text_encoders, text.tokenize(captions))
    for caption, states, mask in zip(captions, features["hidden_state"], features["attention_mask"], strict=True):
        chat = f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
        ids = text.tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"]
        theirs = qwen(input_ids=ids).last_hidden_state[0]
        assert mask.tolist() == [1] * len(theirs) + [0] * (len(mask) - len(theirs))
        torch.testing.assert_close(states[: len(theirs)], theirs, **FLOAT32_DEEP)
        assert not states[len(theirs) :].any()


@torch.no_grad()
def test_captions_with_references_give_the_states_of_the_whole_model(run: Any, qwen: Any) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = [noise_image(64, 32, 1), noise_image(96, 64, 2)]
    limits = {"shortest_edge": 32 * 32, "longest_edge": 384 * 384}
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, size=limits, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    patches = processor(images, return_tensors="pt")
    pictures = "".join(
        f"Picture {n}: <|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for n, count in ((1, 2), (2, 6))
    )
    text, chat = run.arch.text, f"<|im_start|>user\n{pictures}a red cat<|im_end|>\n<|im_start|>assistant\n"
    ids = text.tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"]
    is_slot = ids == text.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    theirs = qwen(
        input_ids=ids,
        pixel_values=patches["pixel_values"],
        image_grid_thw=patches["image_grid_thw"],
        mm_token_type_ids=is_slot.int(),
    ).last_hidden_state[0]
    shown = CaptionWithImages("a red cat", "digest", lambda: tuple(to_pixels(np.array(image)) for image in images))
    features = text.encode(run.models.text_encoders, text.tokenize([shown, "dog"]))
    torch.testing.assert_close(features["hidden_state"][0, : len(theirs)], theirs, **FLOAT32_DEEP)
    alone = text.encode(run.models.text_encoders, text.tokenize(["dog"]))["hidden_state"][0]
    torch.testing.assert_close(features["hidden_state"][1, : len(alone)], alone, **FLOAT32_DEEP)


@pytest.mark.parametrize("size", [(1024, 1024), (2048, 512), (48, 48), (300, 700), (384, 384)], ids=str)
def test_references_have_the_sizes_of_qwens_processor(size: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    expected = smart_resize(*size, factor=32, min_pixels=32**2, max_pixels=384**2)
    assert tuple(fit_image(torch.zeros(3, *size)).shape[1:]) == tuple(expected)


@torch.no_grad()
def test_previews_leave_a_block_out_for_the_negative_prompt_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Euler steps on shifted levels, rounded to thousandths."""
    (skipped,) = SKIPPED
    monkeypatch.setattr(moss_image, "CONFIG", replace(CONFIG, num_layers=skipped + 2))
    run = run_of(tmp_path, build_tiny_moss_image(tmp_path, 9))
    text, denoiser = run.arch.text, run.models.denoiser
    positive, negative = (
        text.encode(run.models.text_encoders, text.tokenize([caption])) for caption in (PROMPT.text, PROMPT.negative)
    )
    x = torch.randn(1, 128, 6, 4, generator=torch.Generator().manual_seed(7))
    levels = [1 - i / 3 * (1 - 5 / 1004) for i in range(4)]
    sigmas = [round(1000 * 5 * level / (1 + 4 * level)) / 1000 for level in levels]
    assert sigmas == [1.0, 0.91, 0.717, 0.024]
    for sigma, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        level = torch.tensor([sigma])
        c = denoiser(x, level, positive["hidden_state"], positive["attention_mask"])
        u = denoiser(x, level, negative["hidden_state"], negative["attention_mask"], (), SKIPPED)
        assert not torch.equal(u, denoiser(x, level, negative["hidden_state"], negative["attention_mask"]))
        x = x + (after - sigma) * (u + 3 * (c - u))
    torch.testing.assert_close(ours(run, PROMPT), x, **FLOAT32_SAMPLED)

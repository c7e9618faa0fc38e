"""Krea 2 against diffusers' Krea2Transformer2DModel and pipeline, and with references against formulas in float64."""

from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import fold, gelu, silu, unfold

from library.architectures.krea2.layers import NAMES
from library.architectures.krea2.reference import diffusers_model, diffusers_state
from library.architectures.krea2.text import BEGIN
from library.data.decoding.tensors import to_pixels
from library.types import CaptionWithImages, Prompt
from networks import lora_krea2
from networks.core.files.adapter_file import adapter_tensors, read_adapter_file
from networks.core.files.renaming import rename
from tests.parity.test_dit_lora import DITS
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.krea2 import CONFIG, build_tiny_krea2, inputs, oracle_output, tiny_krea2
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED

# Krea 2's denoiser against diffusers' Krea2Transformer2DModel with the same weights, and with references against
# formulas in float64.


def test_weight_gradients_match_diffusers() -> None:
    ours = tiny_krea2(2).requires_grad_()
    theirs = diffusers_model(ours).requires_grad_()
    for model, run in ((ours, ours), (theirs, lambda *values: oracle_output(theirs, *values))):
        output = run(*inputs(4, 6))
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    actual = diffusers_state(gradients, ours.config)  # type: ignore[arg-type]
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, **FLOAT32_DEEP)


# One sample with references, without padding, masks and batches

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def rms(state: State, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + state[f"{name}.scale"])


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate neighbouring values of each head; x is (tokens, heads, D), positions (tokens, 3)."""
    widths = [x.shape[-1] // 8 * share for share in (2, 3, 3)]
    phases = torch.cat(
        [
            positions[:, axis, None] * 1000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
            for axis, width in enumerate(widths)
        ],
        dim=1,
    )[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * phases.cos() - b * phases.sin(), a * phases.sin() + b * phases.cos()], dim=-1).flatten(-2)


def attention(state: State, name: str, x: Tensor, positions: Tensor | None = None) -> Tensor:
    width = len(state[f"{name}.qknorm.qnorm.scale"])
    q, k, v = (linear(state, f"{name}.w{part}", x).unflatten(-1, (-1, width)) for part in "qkv")
    q, k = rms(state, f"{name}.qknorm.qnorm", q), rms(state, f"{name}.qknorm.knorm", k)
    if positions is not None:
        q, k = rotated(q, positions), rotated(k, positions)
    k, v = (part.repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2) for part in (k, v))
    weights = (torch.einsum("...qnd,...knd->...nqk", q, k) / width**0.5).softmax(-1)
    attended = torch.einsum("...nqk,...knd->...qnd", weights, v).flatten(-2)
    return linear(state, f"{name}.wo", attended * torch.sigmoid(linear(state, f"{name}.gate", x)))


def feed(state: State, name: str, x: Tensor) -> Tensor:
    return linear(state, f"{name}.down", silu(linear(state, f"{name}.gate", x)) * linear(state, f"{name}.up", x))


def fused_text(state: State, states: Tensor) -> Tensor:
    """Return the text's tokens; `states` are (tokens, states of a token, width)."""
    x = states
    for kind in ("layerwise_blocks", "refiner_blocks"):
        for n in range(2):
            block = f"txtfusion.{kind}.{n}"
            x = x + attention(state, f"{block}.attn", rms(state, f"{block}.prenorm", x))
            x = x + feed(state, f"{block}.mlp", rms(state, f"{block}.postnorm", x))
        if kind == "layerwise_blocks":
            x = torch.einsum("lse,s->le", x, state["txtfusion.projector.weight"][0])
    hidden = gelu(linear(state, "txtmlp.1", rms(state, "txtmlp.0", x)), approximate="tanh")
    return linear(state, "txtmlp.3", hidden)


def level_vector(state: State, sigma: float) -> Tensor:
    half = CONFIG.time_features // 2
    phases = torch.tensor([1000 * sigma * exp(-log(10000) * k / half) for k in range(half)], dtype=torch.float64)
    hidden = gelu(linear(state, "tmlp.0", torch.cat([phases.cos(), phases.sin()])), approximate="tanh")
    return linear(state, "tmlp.2", hidden)


def velocity(state: State, latent: Tensor, sigma: float, text: Tensor, shown: list[Tensor]) -> Tensor:
    """Return the velocity of one sample, (C, H, W), of the sequence text, noisy image, references."""
    txt = fused_text(state, text.unflatten(-1, (CONFIG.num_states, -1)))
    images = [linear(state, "first", unfold(image, 2, stride=2).T) for image in (latent, *shown)]
    places = [[0, 0, 0]] * len(txt)
    for i, image in enumerate((latent, *shown)):
        places += [[i, y, x] for y in range(image.shape[1] // 2) for x in range(image.shape[2] // 2)]
    positions, x = torch.tensor(places, dtype=torch.float64), torch.cat([txt, *images])
    end = len(txt) + len(images[0])
    rows = [linear(state, "tproj.1", gelu(level_vector(state, s), approximate="tanh")) for s in (sigma, 0.0)]
    of_token = torch.stack([rows[int(number >= end)] for number in range(len(x))])
    for n in range(CONFIG.num_blocks):
        block = f"blocks.{n}"
        scale1, shift1, gate1, scale2, shift2, gate2 = (of_token + state[f"{block}.mod.lin"]).chunk(6, dim=-1)
        y = rms(state, f"{block}.prenorm", x) * (1 + scale1) + shift1
        x = x + gate1 * attention(state, f"{block}.attn", y, positions)
        y = rms(state, f"{block}.postnorm", x) * (1 + scale2) + shift2
        x = x + gate2 * feed(state, f"{block}.mlp", y)
    scale, shift = level_vector(state, sigma) + state["last.modulation.lin"]
    y = linear(state, "last.linear", rms(state, "last.norm", x[len(txt) : end]) * (1 + scale) + shift)
    return fold(y.T, latent.shape[1:], 2, stride=2)


@pytest.mark.parametrize("sides", [(), ((6, 4),), ((2, 10), (6, 6))], ids=["none", "one", "two"])
def test_references_equal_the_formulas_in_float64(sides: tuple[tuple[int, int], ...]) -> None:
    """References are at (i + 1, row, column) and at noise level 0, attended by all tokens; gradients agree too."""
    model, g = tiny_krea2(1).requires_grad_(), torch.Generator().manual_seed(3)
    latents, _, text, mask = (value.detach() for value in inputs(4, 6))
    sigmas = torch.tensor([1 / 512, 1 / 128])  # float32 angles of high levels are off by 5e-5
    shown = [torch.randn(2, 16, *side, generator=g) for side in sides]
    actual = model(latents, sigmas, text, mask, shown)
    state = {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}
    samples = [
        (latents[b].double(), float(sigmas[b]), text[b, : int(mask[b].sum())].double(), [x[b].double() for x in shown])
        for b in range(2)
    ]
    expected = torch.stack([velocity(state, *sample) for sample in samples])
    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max() and expected.abs().max() > 0.1
    weights = torch.randn(actual.shape, generator=g)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in model.named_parameters():
        theirs = state[name].grad
        assert parameter.grad is not None and theirs is not None
        assert (parameter.grad - theirs).norm() < 1e-5 * theirs.norm(), name


def test_longer_padding_does_not_affect_outputs() -> None:
    """Text has no positions, so padding only needs masking."""
    model = tiny_krea2(3)
    latents, sigmas, text, mask = (value.detach() for value in inputs(4, 6))
    padded = torch.nn.functional.pad(text, (0, 0, 0, 4)), torch.nn.functional.pad(mask, (0, 4))
    torch.testing.assert_close(model(latents, sigmas, *padded), model(latents, sigmas, text, mask), **FLOAT32_DEEP)


def test_norms_keep_small_scales_in_bf16() -> None:
    """1 + scale is computed in float32: in bf16 it has steps of 1 / 128."""
    norm = tiny_krea2(4).bfloat16().blocks[0].prenorm
    norm.scale.copy_(torch.linspace(-0.003, 0.003, CONFIG.block.width))
    x = torch.randn(3, CONFIG.block.width, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + norm.scale.double())
    torch.testing.assert_close(norm(x), expected.bfloat16(), rtol=2**-8, atol=0)
    assert not torch.equal(norm(x), (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).bfloat16())


def test_every_layer_input_has_one_row_per_sample() -> None:
    """Adapters that treat samples differently (by noise level) distinguish them by the first
    axis."""
    model, batch_sizes = tiny_krea2(3), set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: batch_sizes.add(len(inputs[0])))
    model(*inputs(4, 6), [torch.zeros(2, 16, 4, 4)])
    assert batch_sizes == {2}


# Namings of Krea 2 adapters that diffusers does not read.

KREA2 = DITS["krea2"]


def test_diffusers_reads_no_other_naming(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files are therefore not saved with alphas and dotted names, or with Kohya names."""
    from diffusers import Krea2Pipeline

    path = tmp_path / "ours.safetensors"
    KREA2.trained_file(lora_krea2, path, {})
    with pytest.raises(ValueError, match="should be empty"):
        Krea2Pipeline.lora_state_dict({**load_file(path), "diffusion_model.blocks.0.attn.wq.alpha": torch.tensor(1.0)})
    kohya = rename(read_adapter_file(path), NAMES, "kohya").file
    save_file(adapter_tensors(kohya), tmp_path / "kohya.safetensors")
    with pytest.raises((ValueError, AssertionError)):
        KREA2.diffusers_prediction(tmp_path / "kohya.safetensors", caplog)


# Krea 2 from text to latents and images against diffusers' pipeline: the same folder, prompts and seed.

PROMPT = Prompt(
    text="a red cat", negative="a dog", width=64, height=96, seed=7, num_steps=5, scale=4.0, sampler=None,
    guidance_scale=None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=None,
)  # fmt: skip
CAPTIONS = ["a red cat, sitting", "", "dog " * 600]


def run_of(folder: Path, *more: str) -> Any:
    return open_run("krea2", ["--pretrained_model_name_or_path", str(folder), *more])


def pipeline_of(folder: Path, is_distilled: bool) -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        Krea2Pipeline,
        Krea2Transformer2DModel,
    )
    from transformers import Qwen2Tokenizer, Qwen3VLModel

    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer", padding_side="right")
    pipeline: Any = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="exponential", base_shift=0.5, max_shift=1.15,
            base_image_seq_len=256, max_image_seq_len=6400,
        ),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
        text_encoder=Qwen3VLModel.from_pretrained(folder / "text_encoder"),
        tokenizer=tokenizer,
        transformer=Krea2Transformer2DModel.from_pretrained(folder / "transformer"),
        is_distilled=is_distilled,
    )  # fmt: skip
    # The tiny tokenizer has few words, so the template takes more tokens.
    pipeline.prompt_template_encode_start_idx = len(tokenizer(pipeline.prompt_template_encode_prefix)["input_ids"])
    pipeline.prompt_template_encode_num_suffix_tokens = len(
        tokenizer(pipeline.prompt_template_encode_suffix)["input_ids"]
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("krea2")
    build_tiny_krea2(path, 9, "diffusers")
    return path


@pytest.fixture(scope="module")
def run(folder: Path) -> Any:
    return run_of(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return pipeline_of(folder, is_distilled=False)


@pytest.mark.parametrize("is_turbo", [False, True], ids=["raw", "turbo"])
@pytest.mark.parametrize("size", [(64, 96), (320, 64)], ids=str)
def test_latents_equal_those_of_the_pipeline(folder: Path, is_turbo: bool, size: tuple[int, int]) -> None:
    """Raw uses guidance, which diffusers counts from 0; Turbo uses none, and the same shift at every size."""
    run = run_of(folder, "--dit_variant", "turbo" if is_turbo else "raw")
    scale = 1.0 if is_turbo else PROMPT.scale
    prompt = replace(PROMPT, width=size[0], height=size[1], scale=scale)
    theirs = pipeline_of(folder, is_turbo)
    expected = theirs(
        prompt=prompt.text, negative_prompt=prompt.negative, width=size[0], height=size[1],
        num_inference_steps=prompt.num_steps, guidance_scale=scale - 1, generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images  # fmt: skip
    actual = theirs._pack_latents(ours(run, prompt), 1, 16, size[1] // 8, size[0] // 8)
    torch.testing.assert_close(actual, expected, **FLOAT32_SAMPLED)


@pytest.mark.parametrize(("variant", "steps", "scale"), [("raw", 28, 5.5), ("turbo", 8, 1.0)])
def test_previews_use_the_settings_of_the_variant(folder: Path, variant: str, steps: int, scale: float) -> None:
    defaults = run_of(folder, "--dit_variant", variant).arch.preview.defaults
    assert (defaults.num_steps, defaults.scale, defaults.width, defaults.height) == (steps, scale, 1024, 1024)


def test_caption_features_equal_those_of_the_pipeline(run: Any, pipeline: Any) -> None:
    """Features are compared at all tokens except padding, which the pipeline puts before the end of the template."""
    text, encoders = run.arch.text, run.models.text_encoders
    features = text.encode(encoders, text.tokenize(CAPTIONS))
    theirs, is_token = pipeline.encode_prompt(list(CAPTIONS), device=torch.device("cpu"))
    assert features["attention_mask"].sum(1).tolist() == is_token.sum(1).tolist()
    assert int(features["attention_mask"].sum(1).max()) == 512 == theirs.shape[1]
    for number in range(len(CAPTIONS)):
        actual = features["hidden_state"][number][features["attention_mask"][number].bool()]
        torch.testing.assert_close(actual, theirs[number][is_token[number]].flatten(1), **FLOAT32_DEEP)
        assert not features["hidden_state"][number][~features["attention_mask"][number].bool()].any()
    alone = text.encode(encoders, text.tokenize(CAPTIONS[:1]))["hidden_state"]
    torch.testing.assert_close(alone[0], features["hidden_state"][0, : alone.shape[1]], **FLOAT32_DEEP)


@torch.no_grad()
def test_captions_with_references_give_the_states_of_the_whole_model(run: Any, folder: Path) -> None:
    """They are not cut, nor are their references, which the denoiser gets too."""
    from transformers import Qwen3VLModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    generator = np.random.default_rng(1)
    images = [generator.integers(0, 256, (*sides, 3), dtype=np.uint8) for sides in ((32, 64), (64, 96))]
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 32 * 32, "longest_edge": 384 * 384},
    )  # fmt: skip
    patches, text = processor([Image.fromarray(image) for image in images], return_tensors="pt"), run.arch.text
    caption = "a red cat " * 300
    pictures = "".join(
        f"Picture {n}: <|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for n, count in ((1, 2), (2, 6))
    )
    chat = f"{BEGIN}{pictures}{caption}<|im_end|>\n<|im_start|>assistant\n"
    ids = text.tokenizer(chat, return_tensors="pt")["input_ids"]
    is_slot = ids == text.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    states = Qwen3VLModel.from_pretrained(folder / "text_encoder").eval()(
        input_ids=ids, pixel_values=patches["pixel_values"], image_grid_thw=patches["image_grid_thw"],
        mm_token_type_ids=is_slot.int(), output_hidden_states=True,
    ).hidden_states  # fmt: skip
    theirs = torch.cat([states[layer][0] for layer in range(2, 36, 3)], dim=-1)[text.num_begin :]
    shown = CaptionWithImages(caption, "digest", lambda: tuple(map(to_pixels, images)))
    features = text.encode(run.models.text_encoders, text.tokenize([shown, "dog"]))
    assert len(theirs) > 512
    torch.testing.assert_close(features["hidden_state"][0], theirs, **FLOAT32_DEEP)
    alone = text.encode(run.models.text_encoders, text.tokenize(["dog"]))["hidden_state"][0]
    torch.testing.assert_close(features["hidden_state"][1, : len(alone)], alone, **FLOAT32_DEEP)


def test_unused_layers_are_not_loaded(run: Any) -> None:
    encoder, _ = run.models.text_encoders
    assert len(encoder.layers) == 35


def test_caption_tokens_are_counted_without_the_template(run: Any) -> None:
    text = run.arch.text
    ids, mask = text.tokenize(["a red cat"]).ids_BLT
    assert int(mask.sum()) == text.num_begin + text.count_tokens("a red cat") + len(text.end)
    assert text.max_tokens == 512 - len(text.end) and ids.shape == mask.shape == (1, 1, int(mask.sum()))


def test_image_latents_equal_those_of_the_pipeline(run: Any, pipeline: Any) -> None:
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae, codec = run.arch.load.vae(), run.arch.codec
    actual = codec.encode(vae, pixels, None)
    config = pipeline.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    expected = pipeline.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    torch.testing.assert_close(actual, (expected - mean) / std, **FLOAT32_DEEP)
    assert actual.shape == (2, 16, 8, 12)
    decoded = codec.decode(vae, codec.normalize(actual))
    theirs = pipeline.vae.decode(expected[:, :, None]).sample[:, :, 0]
    torch.testing.assert_close(decoded, theirs, **FLOAT32_DEEP)

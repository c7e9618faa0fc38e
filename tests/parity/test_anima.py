"""Anima against diffusers' models and pipeline with the same weights, also of other depths and widths."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from library.architectures.anima.layers import NAMES
from library.architectures.anima.model import Anima, AnimaConfig, read_config
from library.architectures.anima.reference import diffusers_models
from library.checkpoints.adapter_names import FileNaming
from library.models.loading import build_on_meta_device
from library.models.vae.qwen_image import MEAN, STD
from library.types import Prompt
from networks import lora_anima
from networks.core.files.adapter_file import adapter_tensors, read_adapter_file
from networks.core.files.renaming import rename
from tests.parity.denoisers import save_trained
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.anima import CONFIG, build_tiny_anima, inputs, oracle, oracle_of, oracle_velocity, tiny_anima
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED


def test_an_empty_caption_matches_diffusers() -> None:
    ours = tiny_anima(2)
    latents, sigmas, source, source_mask, ids, mask = (value.detach() for value in inputs(8, 6))
    empty = source * 0, source_mask * 0
    got = ours(latents, sigmas, *empty, ids, mask)
    torch.testing.assert_close(got, oracle(ours)(latents, sigmas, *empty, ids, mask), **FLOAT32_DEEP)
    assert got.isfinite().all()
    assert not torch.allclose(got, ours(latents, sigmas, source, source_mask, ids, mask), rtol=1e-2)


def test_padding_after_a_caption_does_not_affect_outputs() -> None:
    ours = tiny_anima(3)
    latents, sigmas, source, source_mask, ids, mask = (value.detach() for value in inputs(8, 6))
    short = ours(latents[:1], sigmas[:1], source[:1, :5], source_mask[:1, :5], ids[:1], mask[:1])
    torch.testing.assert_close(
        ours(latents[:1], sigmas[:1], source[:1], source_mask[:1], ids[:1], mask[:1]), short, **FLOAT32_DEEP
    )
    short = ours(latents[1:], sigmas[1:], source[1:], source_mask[1:], ids[1:, :4], mask[1:, :4])
    torch.testing.assert_close(
        ours(latents[1:], sigmas[1:], source[1:], source_mask[1:], ids[1:], mask[1:]), short, **FLOAT32_DEEP
    )


def test_the_residual_stream_is_float32_with_float16_weights() -> None:
    model = tiny_anima(6).half()
    kinds = []
    model.blocks[1].register_forward_hook(lambda module, args, output: kinds.append((args[0].dtype, output.dtype)))
    values = [value.detach().half() if value.is_floating_point() else value for value in inputs(8, 6)]
    output = model(*values)
    assert kinds == [(torch.float32, torch.float32)]
    assert output.dtype == torch.float16
    assert output.isfinite().all()


# Anima's text, latents and previews against the parts of diffusers' pipeline.

CAPTIONS = ["a red cat", "dog", ""]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_anima_folders")


@pytest.fixture(scope="module")
def run(folder: Path) -> Any:
    arguments = build_tiny_anima(folder, seed=51, has_folders=True)
    lengths = ["--qwen3_max_token_length", str(NUM_TOKENS), "--t5_max_token_length", str(NUM_TOKENS)]
    return open_run("anima", [*arguments, *lengths])


@pytest.fixture(scope="module")
def encoded(folder: Path) -> dict[str, Tensor]:
    """Encode the captions with diffusers' text step, each with the empty negative prompt."""
    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
    from transformers import Qwen2Tokenizer, Qwen3Model, T5TokenizerFast

    components: Any = SimpleNamespace(
        text_encoder=Qwen3Model.from_pretrained(folder / "qwen3"),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer", padding_side="right"),
        t5_tokenizer=T5TokenizerFast.from_pretrained(folder / "t5_tokenizer"),
    )
    with torch.no_grad():
        step: Any = AnimaTextEncoderStep
        features: dict[str, Tensor] = step.encode_prompt(
            components, CAPTIONS, "", device=torch.device("cpu"), dtype=torch.float32
        )
    return features


def test_text_features_match_diffusers_except_for_more_padding(run: Any, encoded: dict[str, Tensor]) -> None:
    with torch.no_grad():
        got = run.arch.text.encode(run.models.text_encoders, run.arch.text.tokenize(CAPTIONS))
    for name, theirs in (
        ("prompt_embeds", "qwen_prompt_embeds"),
        ("attn_mask", "qwen_attention_mask"),
        ("t5_input_ids", "t5_input_ids"),
        ("t5_attn_mask", "t5_attention_mask"),
    ):
        expected = encoded[theirs]
        length = expected.shape[1]
        assert length < NUM_TOKENS
        torch.testing.assert_close(got[name][:, :length].to(expected.dtype), expected, **FLOAT32_DEEP)
        assert got[name].shape[1] == NUM_TOKENS and not got[name][:, length:].any()
    assert not got["prompt_embeds"][2].any()
    assert got["prompt_embeds"][0].abs().max() > 0.1


def test_the_text_encoder_gets_finite_gradients_from_captions_of_all_lengths(run: Any) -> None:
    encoder = run.models.text_encoders[0]
    weight = encoder.layers[0].self_attn.q_proj.weight.requires_grad_()
    states = run.arch.text.encode([encoder], run.arch.text.tokenize(CAPTIONS))["prompt_embeds"]
    (gradient,) = torch.autograd.grad(states.square().sum(), weight)
    weight.requires_grad_(False)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_the_latent_statistics_match_diffusers() -> None:
    import inspect

    from diffusers import AutoencoderKLQwenImage

    parameters = inspect.signature(AutoencoderKLQwenImage.__init__).parameters
    assert (list(MEAN), list(STD)) == (parameters["latents_mean"].default, parameters["latents_std"].default)


def test_latents_and_images_match_diffusers(run: Any, folder: Path) -> None:
    from diffusers import AutoencoderKLQwenImage
    from diffusers.modular_pipelines.anima.encoders import encode_vae_image

    theirs: Any = AutoencoderKLQwenImage.from_pretrained(folder / "vae")
    pixels = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(3)) * 2 - 1
    vae = run.arch.load.vae()
    encode: Any = encode_vae_image
    with torch.no_grad():
        latents = run.arch.codec.encode(vae, pixels, [])
        expected = encode(pixels, theirs, None, torch.device("cpu"), torch.float32)
        assert latents.shape == (2, 16, 6, 10)
        assert latents.abs().max() > 0.1
        torch.testing.assert_close(latents, expected[:, :, 0], **FLOAT32_DEEP)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
        images = theirs.decode(expected * std + mean).sample[:, :, 0]
        torch.testing.assert_close(run.arch.codec.decode(vae, latents), images, **FLOAT32_DEEP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_skipping_the_frame_cache_keeps_images_bit_for_bit(run: Any, dtype: torch.dtype) -> None:
    vae = run.arch.load.vae().to(dtype)
    pixels = torch.rand(1, 3, 40, 24, generator=torch.Generator().manual_seed(4)) * 2 - 1
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        latents = run.arch.codec.encode(vae, pixels, [])
        expected = vae.encode(pixels[:, :, None].to(dtype)).latent_dist.mode()[:, :, 0].float()
        assert torch.equal(latents, (expected - mean) / std)
        frames = (latents * std + mean)[:, :, None].to(dtype)
        assert torch.equal(run.arch.codec.decode(vae, latents), vae.decode(frames).sample[:, :, 0].float())


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 3.0), (4.0, 1.5)])
def test_previews_match_diffusers(run: Any, encoded: dict[str, Tensor], scale: float, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    prompt = Prompt(
        text=CAPTIONS[0], negative="", width=64, height=96, seed=7, num_steps=4, scale=scale, sampler=None,
        guidance_scale=None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=shift,
    )  # fmt: skip
    transformer, conditioner = diffusers_models(run.models.denoiser)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / prompt.num_steps, prompt.num_steps))
    latents = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        texts = [
            conditioner(
                encoded[f"{part}qwen_prompt_embeds"][:1],
                encoded[f"{part}t5_input_ids"][:1],
                target_attention_mask=encoded[f"{part}t5_attention_mask"][:1],
                source_attention_mask=encoded[f"{part}qwen_attention_mask"][:1],
            )
            for part in ("", "negative_")
        ]
        for timestep in scheduler.timesteps:
            cond, uncond = (oracle_velocity(transformer, latents, timestep[None] / 1000, text) for text in texts)
            latents = scheduler.step(uncond + scale * (cond - uncond), timestep, latents).prev_sample
    torch.testing.assert_close(ours(run, prompt), latents, **FLOAT32_SAMPLED)


# Anima of other depths and widths: against diffusers' models, and with adapter files in every naming.

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

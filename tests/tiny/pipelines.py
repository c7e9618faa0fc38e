"""Tiny random text-to-image pipelines of diffusers, by the name of their class."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.any_pipeline.watch import Watched, stand_in
from tests.tiny import language_model_pipelines
from tests.tiny.init import fixed_init
from tests.tiny.pipeline_parts import (
    BETAS,
    DYNAMIC,
    HEADS,
    SIZES,
    WIDTH,
    clip,
    flow,
    flux_2_vae,
    language_model,
    qwen_2_5_vl,
    qwen_image_vae,
    t5,
    tokenizer,
    umt5,
    vae,
)


def auraflow() -> dict[str, Any]:
    from diffusers import AuraFlowTransformer2DModel

    transformer = AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=4, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=WIDTH, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(),
        "text_encoder": umt5(),
        "vae": vae(4, scaling_factor=0.13025, shift_factor=None),
        "transformer": transformer,
        "scheduler": flow(shift=1.73),
    }


def pixart() -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=WIDTH,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(),
        "text_encoder": t5(),
        "vae": vae(4, scaling_factor=0.13025, shift_factor=None),
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(beta_schedule="linear"),
    }


def sana() -> dict[str, Any]:
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=WIDTH,
        sample_size=32,
    )  # fmt: skip
    levels = 4
    dc = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * levels,
        decoder_block_types=("ResBlock",) * levels, encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels, encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels, encoder_layers_per_block=(1,) * levels,
        decoder_layers_per_block=(1,) * levels, downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(),
        "text_encoder": language_model("Gemma2", sliding_window=16),
        "vae": dc,
        "transformer": transformer,
        "scheduler": flow(shift=3.0),
    }


def flux() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    return {
        "scheduler": flow(**DYNAMIC), "vae": vae(4), "text_encoder": clip(), "tokenizer": tokenizer(77),
        "text_encoder_2": t5(), "tokenizer_2": tokenizer(), "transformer": transformer,
    }  # fmt: skip


def lumina2() -> dict[str, Any]:
    from diffusers import Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=None, norm_eps=1e-5,
        scaling_factor=1.0, axes_dim_rope=[4, 2, 2], axes_lens=[300, 32, 32], cap_feat_dim=WIDTH,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(),
        "text_encoder": language_model("Gemma2", sliding_window=16),
        "vae": vae(4),
        "transformer": transformer,
        "scheduler": flow(shift=6.0),
    }


def ovis() -> dict[str, Any]:
    from diffusers import OvisImageTransformer2DModel

    transformer = OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return {
        "scheduler": flow(**DYNAMIC),
        "vae": vae(4),
        "text_encoder": language_model("Qwen3"),
        "tokenizer": tokenizer(),
        "transformer": transformer,
    }


def cogview4() -> dict[str, Any]:
    from diffusers import CogView4Transformer2DModel
    from transformers import GlmConfig, GlmModel

    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    scheduler = flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, **DYNAMIC, time_shift_type="linear")
    return {
        "tokenizer": tokenizer(),
        "text_encoder": GlmModel(GlmConfig(**SIZES, **HEADS, pad_token_id=0)),
        "vae": vae(4, scaling_factor=1.1, shift_factor=0.1),
        "transformer": transformer,
        "scheduler": scheduler,
    }


def sd3() -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, out_channels=4,
    )  # fmt: skip
    return {
        "transformer": transformer, "scheduler": flow(shift=3.0), "vae": vae(4, scaling_factor=1.5, shift_factor=0.06),
        "text_encoder": clip(True), "tokenizer": tokenizer(77), "text_encoder_2": clip(True),
        "tokenizer_2": tokenizer(77), "text_encoder_3": t5(2 * WIDTH), "tokenizer_3": tokenizer(),
    }  # fmt: skip


def zimage() -> dict[str, Any]:
    from diffusers import ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, qk_norm=True, cap_feat_dim=WIDTH, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )  # fmt: skip
    return {
        "scheduler": flow(shift=3.0),
        "vae": vae(16),
        "text_encoder": language_model("Qwen3"),
        "tokenizer": tokenizer(),
        "transformer": transformer,
    }


def unet(**more: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    settings = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": WIDTH, "attention_head_dim": 4,
        "norm_num_groups": 4,
    }  # fmt: skip
    model: nn.Module = UNet2DConditionModel(**{**settings, **more})
    return model


def stable_diffusion() -> dict[str, Any]:
    from diffusers import PNDMScheduler

    return {
        "unet": unet(), "scheduler": PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        "vae": vae(4, scaling_factor=0.18215, shift_factor=None), "text_encoder": clip(), "tokenizer": tokenizer(77),
        "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip


def stable_diffusion_xl() -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler

    model = unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        transformer_layers_per_block=(1, 2),
    )
    return {
        "unet": model, "scheduler": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        "vae": vae(4, scaling_factor=0.13025, shift_factor=None), "text_encoder": clip(), "tokenizer": tokenizer(77),
        "text_encoder_2": clip(True), "tokenizer_2": tokenizer(77),
    }  # fmt: skip


def chroma() -> dict[str, Any]:
    from diffusers import ChromaTransformer2DModel

    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=[4, 4, 8], approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return {
        "scheduler": flow(**DYNAMIC),
        "vae": vae(4),
        "text_encoder": t5(),
        "tokenizer": tokenizer(),
        "transformer": transformer,
    }


def lumina() -> dict[str, Any]:
    from diffusers import LuminaNextDiT2DModel

    transformer = LuminaNextDiT2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3, num_kv_heads=1,
        multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5, learn_sigma=True, qk_norm=True,
        cross_attention_dim=WIDTH, scaling_factor=1.0,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(),
        "text_encoder": language_model("Gemma2", sliding_window=16),
        "vae": vae(4),
        "transformer": transformer,
        "scheduler": flow(),
    }


def hunyuan_dit() -> dict[str, Any]:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel
    from transformers import BertConfig, BertModel

    transformer = HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    bert = BertModel(BertConfig(**SIZES, num_attention_heads=4, max_position_embeddings=512))
    return {
        "transformer": transformer, "vae": vae(4, scaling_factor=0.13025, shift_factor=None),
        "scheduler": DDPMScheduler(), "text_encoder": bert, "tokenizer": tokenizer(77), "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(), "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip


def longcat() -> dict[str, Any]:
    from diffusers import LongCatImageTransformer2DModel

    transformer = LongCatImageTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return {
        "scheduler": flow(**DYNAMIC), "vae": vae(16), "text_encoder": qwen_2_5_vl(), "tokenizer": tokenizer(),
        "text_processor": tokenizer(), "transformer": transformer,
    }  # fmt: skip


def qwen_image() -> dict[str, Any]:
    from diffusers import QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return {
        "scheduler": flow(**DYNAMIC),
        "vae": qwen_image_vae(),
        "text_encoder": qwen_2_5_vl(),
        "tokenizer": tokenizer(),
        "transformer": transformer,
    }


def ernie() -> dict[str, Any]:
    from diffusers import ErnieImageTransformer2DModel
    from transformers import Mistral3Config, Mistral3Model

    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48, in_channels=16, out_channels=16,
        patch_size=1, text_in_dim=WIDTH, rope_theta=256, rope_axes_dim=(8, 4, 4),
    )  # fmt: skip
    sight = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "head_dim": 8,
    }  # fmt: skip
    words = {"model_type": "mistral", **SIZES, **HEADS}
    return {
        "transformer": transformer,
        "vae": flux_2_vae(),
        "tokenizer": tokenizer(),
        "scheduler": flow(shift=3.0),
        "text_encoder": Mistral3Model(Mistral3Config(text_config=words, vision_config=sight)),
    }


def bria() -> dict[str, Any]:
    from diffusers import BriaTransformer2DModel

    transformer = BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    return {
        "transformer": transformer,
        "scheduler": flow(shift=3.0),
        "vae": vae(4),
        "text_encoder": t5(),
        "tokenizer": tokenizer(),
    }


def cogview3plus() -> dict[str, Any]:
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusTransformer2DModel

    transformer = CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2, out_channels=4,
        text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=2, pos_embed_max_size=16, sample_size=8,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(),
        "text_encoder": t5(),
        "vae": vae(4, shift_factor=None),
        "transformer": transformer,
        "scheduler": CogVideoXDDIMScheduler(**BETAS, prediction_type="v_prediction"),
    }


def kandinsky_3() -> dict[str, Any]:
    from diffusers import DDPMScheduler, Kandinsky3UNet, VQModel

    unet_3 = Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
        block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=WIDTH,
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=[32] * 4, down_block_types=["DownEncoderBlock2D"] * 4, latent_channels=4,
        layers_per_block=1, norm_num_groups=4, norm_type="spatial", num_vq_embeddings=12,
        up_block_types=["UpDecoderBlock2D"] * 4, vq_embed_dim=4,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(),
        "text_encoder": t5(),
        "unet": unet_3,
        "movq": movq,
        "scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }


PIPELINES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "AuraFlowPipeline": auraflow,
    "PixArtSigmaPipeline": pixart,
    "SanaPipeline": sana,
    "FluxPipeline": flux,
    "Lumina2Pipeline": lumina2,
    "OvisImagePipeline": ovis,
    "CogView4Pipeline": cogview4,
    "StableDiffusion3Pipeline": sd3,
    "ZImagePipeline": zimage,
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "PixArtAlphaPipeline": pixart,
    "LuminaPipeline": lumina,
    "HunyuanDiTPipeline": hunyuan_dit,
    "LongCatImagePipeline": longcat,
    "QwenImagePipeline": qwen_image,
    "ErnieImagePipeline": ernie,
    "BriaPipeline": bria,
    "CogView3PlusPipeline": cogview3plus,
    "Kandinsky3Pipeline": kandinsky_3,
    "FluxKontextPipeline": flux,
    **language_model_pipelines.PIPELINES,
    "StableDiffusionPAGPipeline": stable_diffusion,
    "StableDiffusionXLPAGPipeline": stable_diffusion_xl,
    "StableDiffusion3PAGPipeline": sd3,
    "PixArtSigmaPAGPipeline": pixart,
    "SanaPAGPipeline": sana,
    "HunyuanDiTPAGPipeline": hunyuan_dit,
    "ChromaPipeline": chroma,
}


def deep_floyd() -> dict[str, Any]:
    from diffusers import DDPMScheduler

    return {
        "tokenizer": tokenizer(), "text_encoder": t5(), "unet": unet(in_channels=3, out_channels=3),
        "scheduler": DDPMScheduler(), "safety_checker": None, "feature_extractor": None, "watermarker": None,
    }  # fmt: skip


REFUSED: Mapping[str, Callable[[], dict[str, Any]]] = {
    "IFPipeline": deep_floyd,
    "WanPipeline of two transformers": language_model_pipelines.wan_2_2,
}


def build_tiny_pipeline(name: str, seed: int = 7, builder: Callable[[], dict[str, Any]] | None = None) -> Any:
    """Build a pipeline whose weights are all random, gates and statistics included. Skips a class that is too new."""
    import diffusers

    kind = getattr(diffusers, name.split()[0], None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    with torch.random.fork_rng():
        parts = (builder or {**PIPELINES, **REFUSED}[name])()
    for number, part in enumerate(parts.values()):
        if isinstance(part, nn.Module):
            state = part.state_dict()
            new = fixed_init(part, seed + number)
            new |= {key: 0.5 + value.abs() for key, value in new.items() if key.endswith("running_var")}
            part.load_state_dict(
                {key: new[key] if value.is_floating_point() else value for key, value in state.items()}
            )
            part.eval().requires_grad_(False)
    known = inspect.signature(kind.__init__).parameters
    extra = {"requires_safety_checker": False} if "requires_safety_checker" in known else {}
    pipe = kind(**parts, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def watch_pipeline(pipe: Any) -> Watched:
    """Watch a pipeline whose models are all in memory, which is left as it is."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    stage = copy.copy(pipe)
    for name, module in models.items():
        setattr(stage, name, stand_in(module))
    stage.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return Watched(stage, models)

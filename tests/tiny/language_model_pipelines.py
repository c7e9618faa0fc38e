"""Tiny random pipelines of diffusers whose captions are read by large language models, and one of videos."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tests.tiny.pipeline_parts import (
    DYNAMIC,
    HEADS,
    SIZES,
    WIDTH,
    WORDS,
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
from tests.tiny.qwen3_vl import TEXT, VISION


def mistral_3(num_layers: int) -> nn.Module:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    sight = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "head_dim": 8,
    }  # fmt: skip
    words = {"model_type": "mistral", **SIZES, **HEADS, "num_hidden_layers": num_layers}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=words, vision_config=sight))


def qwen_3_vl(num_layers: int, head: str = "ForConditionalGeneration") -> nn.Module:
    import transformers

    text = {**TEXT, "vocab_size": WORDS, "num_hidden_layers": num_layers}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=VISION)
    model: nn.Module = getattr(transformers, f"Qwen3VL{head}")(config)
    return model


def flux_2(text_encoder: Callable[[], nn.Module], has_guidance: bool) -> dict[str, Any]:
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=256, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=has_guidance,
    )  # fmt: skip
    return {
        "scheduler": flow(**DYNAMIC),
        "vae": flux_2_vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(512),
        "transformer": transformer,
    }


def krea2() -> dict[str, Any]:
    from diffusers import Krea2Transformer2DModel

    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, timestep_embed_dim=32, text_hidden_dim=WIDTH, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=48, axes_dims_rope=(4, 2, 2),
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
    )  # fmt: skip
    return {
        "scheduler": flow(**DYNAMIC), "vae": qwen_image_vae(), "text_encoder": qwen_3_vl(2, "Model"),
        "tokenizer": tokenizer(), "transformer": transformer, "text_encoder_select_layers": (1, 2),
    }  # fmt: skip


def hunyuan_image() -> dict[str, Any]:
    from diffusers import AutoencoderKLHunyuanImage, HunyuanImageTransformer2DModel

    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=WIDTH, rope_axes_dim=(8, 8),
    )  # fmt: skip
    autoencoder = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32,) * 6, layers_per_block=1,
        spatial_compression_ratio=32, sample_size=384, scaling_factor=0.75289,
    )  # fmt: skip
    return {
        "scheduler": flow(shift=5.0), "vae": autoencoder, "text_encoder": qwen_2_5_vl(), "tokenizer": tokenizer(),
        "text_encoder_2": t5(), "tokenizer_2": tokenizer(), "transformer": transformer,
    }  # fmt: skip


def wan_vae(**more: Any) -> nn.Module:
    from diffusers import AutoencoderKLWan

    model: nn.Module = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.1, 1.2], **more,
    )  # fmt: skip
    return model


def wan() -> dict[str, Any]:
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(), "text_encoder": umt5(), "vae": wan_vae(), "scheduler": flow(shift=3.0),
        "transformer": transformer, "transformer_2": None,
    }  # fmt: skip


def wan_2_2() -> dict[str, Any]:
    return {**wan(), "transformer_2": wan()["transformer"], "boundary_ratio": 0.9}


def bria_fibo() -> dict[str, Any]:
    from diffusers import BriaFiboTransformer2DModel
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    transformer = BriaFiboTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, text_encoder_dim=WIDTH, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    # The pipeline itself names the token of an empty prompt, which is number 128000.
    encoder = SmolLM3ForCausalLM(SmolLM3Config(**{**SIZES, **HEADS, "vocab_size": 128001}, pad_token_id=0))
    wide = wan_vae(patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16, is_residual=True)
    return {
        "transformer": transformer,
        "scheduler": flow(**DYNAMIC),
        "vae": wide,
        "text_encoder": encoder,
        "tokenizer": tokenizer(),
    }


def bria_fibo_2() -> dict[str, Any]:
    from diffusers import BriaFibo2Transformer2DModel

    transformer = BriaFibo2Transformer2DModel(
        in_channels=4, patch_size=2, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=3 * WIDTH,
        injection_layer_ids=(0, 1), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2,
        gist_min_text_len=16, gist_max_text_len=64, axes_dims=(4, 6, 6), axes_lens=(64, 64, 64),
    )  # fmt: skip
    return {
        "transformer": transformer,
        "scheduler": flow(shift=3.0),
        "vae": flux_2_vae(),
        "text_encoder": qwen_3_vl(36),
        "processor": tokenizer(),
    }


def nucleus() -> dict[str, Any]:
    from diffusers import NucleusMoEImageTransformer2DModel

    transformer = NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4), dense_moe_strategy="leave_first_block_dense",
        num_experts=4, mlp_ratio=8.0, moe_intermediate_dim=16, capacity_factors=2.0,
    )  # fmt: skip
    return {
        "transformer": transformer,
        "scheduler": flow(**DYNAMIC),
        "vae": qwen_image_vae(),
        "text_encoder": qwen_3_vl(8),
        "processor": tokenizer(),
    }


def hidream() -> dict[str, Any]:
    from diffusers import HiDreamImageTransformer2DModel
    from transformers import LlamaConfig, LlamaForCausalLM

    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[WIDTH, WIDTH], text_emb_dim=2 * WIDTH, axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32), llama_layers=[0, 1, 1, 1],
    )  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, attn_implementation="eager"))
    return {
        "scheduler": flow(shift=3.0), "vae": vae(4), "text_encoder": clip(True, 248), "tokenizer": tokenizer(77),
        "text_encoder_2": clip(True, 248), "tokenizer_2": tokenizer(77), "text_encoder_3": t5(),
        "tokenizer_3": tokenizer(), "text_encoder_4": llama, "tokenizer_4": tokenizer(), "transformer": transformer,
    }  # fmt: skip


def dreamlite() -> dict[str, Any]:
    from diffusers import AutoencoderTiny, DreamLiteUNetModel

    unet = DreamLiteUNetModel(
        sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=1, attention_head_dim=4, norm_num_groups=4,
        cross_attention_dim=WIDTH, addition_embed_type="time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16, transformer_layers_per_block=1,
    )  # fmt: skip
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1), scaling_factor=1.2, shift_factor=0.1,
    )  # fmt: skip
    return {
        "text_encoder": qwen_3_vl(2), "tokenizer": tokenizer(), "processor": tokenizer(), "vae": tiny, "unet": unet,
        "scheduler": flow(**DYNAMIC),
    }  # fmt: skip


PIPELINES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "Flux2Pipeline": lambda: flux_2(lambda: mistral_3(31), True),
    "Flux2KleinPipeline": lambda: flux_2(klein_encoder, False),
    "Flux2KleinKVPipeline": lambda: flux_2(klein_encoder, False),
    "Krea2Pipeline": krea2,
    "HunyuanImagePipeline": hunyuan_image,
    "WanPipeline": wan,
    "BriaFiboPipeline": bria_fibo,
    "BriaFibo2Pipeline": bria_fibo_2,
    "NucleusMoEImagePipeline": nucleus,
    "HiDreamImagePipeline": hidream,
    "DreamLitePipeline": dreamlite,
}


def klein_encoder() -> nn.Module:
    return language_model("Qwen3", num_hidden_layers=28)

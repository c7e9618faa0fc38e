"""Tiny random text-to-image pipelines of diffusers, by the name of their class."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.tiny.init import fixed_init

CHAT = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n"
    "{{m.content if m.content is string else m.content[0].text}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = 200  # of every vocabulary
WIDTH = 32  # of every text encoder


def tokenizer(max_length: int = 64) -> Any:
    """Return a tokenizer of characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [*map(chr, range(32, 127)), "\n"]
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<bos>": 3, **{letter: 4 + i for i, letter in enumerate(letters)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<bos>",
        model_max_length=max_length, padding_side="right",
    )  # fmt: skip
    made._tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.chat_template = CHAT
    return made


# --- text encoders and VAEs ---

SIZES: Mapping[str, Any] = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2}
HEADS: Mapping[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
T5: Mapping[str, Any] = {"vocab_size": WORDS, "d_model": WIDTH, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**T5, dense_act_fn="gelu_new"))


def umt5() -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**T5))


def clip(projects: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **{**SIZES, "num_hidden_layers": 3}, num_attention_heads=4, projection_dim=WIDTH, max_position_embeddings=77,
        eos_token_id=1, bos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def language_model(family: str, **more: Any) -> nn.Module:
    """Return a language model of transformers, such as Qwen3."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES, **HEADS, **more)
    model: nn.Module = getattr(transformers, f"{family}Model")(config)
    return model


def vae(channels: int = 4, num_levels: int = 4, **more: Any) -> nn.Module:
    from diffusers import AutoencoderKL

    model: nn.Module = AutoencoderKL(
        block_out_channels=(8,) * num_levels, down_block_types=["DownEncoderBlock2D"] * num_levels,
        up_block_types=["UpDecoderBlock2D"] * num_levels, layers_per_block=1, latent_channels=channels,
        norm_num_groups=4, sample_size=32, **{"scaling_factor": 0.3611, "shift_factor": 0.1159, **more},
    )  # fmt: skip
    return model


def flow(**more: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


DYNAMIC = {"use_dynamic_shifting": True}


# --- pipelines ---


def auraflow() -> dict[str, Any]:
    from diffusers import AuraFlowTransformer2DModel

    transformer = AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=4, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=WIDTH, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(), "text_encoder": umt5(), "vae": vae(4, scaling_factor=0.13025, shift_factor=None),
        "transformer": transformer, "scheduler": flow(shift=1.73),
    }  # fmt: skip


def pixart() -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=WIDTH,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(), "text_encoder": t5(), "vae": vae(4, scaling_factor=0.13025, shift_factor=None),
        "transformer": transformer, "scheduler": DPMSolverMultistepScheduler(beta_schedule="linear"),
    }  # fmt: skip


def sana() -> dict[str, Any]:
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=WIDTH,
        sample_size=32, timestep_scale=0.001,
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
        "tokenizer": tokenizer(), "text_encoder": language_model("Gemma2", sliding_window=16), "vae": dc,
        "transformer": transformer, "scheduler": flow(shift=3.0),
    }  # fmt: skip


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
        "tokenizer": tokenizer(), "text_encoder": language_model("Gemma2", sliding_window=16), "vae": vae(4),
        "transformer": transformer, "scheduler": flow(shift=6.0),
    }  # fmt: skip


def ovis() -> dict[str, Any]:
    from diffusers import OvisImageTransformer2DModel

    transformer = OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return {
        "scheduler": flow(**DYNAMIC), "vae": vae(4), "text_encoder": language_model("Qwen3"), "tokenizer": tokenizer(),
        "transformer": transformer,
    }  # fmt: skip


def cogview4() -> dict[str, Any]:
    from diffusers import CogView4Transformer2DModel
    from transformers import GlmConfig, GlmModel

    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, **DYNAMIC, time_shift_type="linear"
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(), "text_encoder": GlmModel(GlmConfig(**SIZES, **HEADS, pad_token_id=0)),
        "vae": vae(4, scaling_factor=1.1, shift_factor=0.1), "transformer": transformer, "scheduler": scheduler,
    }  # fmt: skip


def sd3() -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, out_channels=4,
    )  # fmt: skip
    return {
        "transformer": transformer, "scheduler": flow(shift=3.0), "vae": vae(4, scaling_factor=1.5, shift_factor=0.06),
        "text_encoder": clip(True), "tokenizer": tokenizer(77), "text_encoder_2": clip(True),
        "tokenizer_2": tokenizer(77), "text_encoder_3": wide_t5(2 * WIDTH), "tokenizer_3": tokenizer(),
    }  # fmt: skip


def wide_t5(width: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**{**T5, "d_model": width}, dense_act_fn="gelu_new"))


def zimage() -> dict[str, Any]:
    from diffusers import ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, qk_norm=True, cap_feat_dim=WIDTH, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )  # fmt: skip
    return {
        "scheduler": flow(shift=3.0), "vae": vae(16), "text_encoder": language_model("Qwen3"), "tokenizer": tokenizer(),
        "transformer": transformer,
    }  # fmt: skip


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


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


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
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
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
        "scheduler": flow(**DYNAMIC), "vae": vae(4), "text_encoder": t5(), "tokenizer": tokenizer(),
        "transformer": transformer,
    }  # fmt: skip


def lumina() -> dict[str, Any]:
    from diffusers import LuminaNextDiT2DModel

    transformer = LuminaNextDiT2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3, num_kv_heads=1,
        multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5, learn_sigma=True, qk_norm=True,
        cross_attention_dim=WIDTH, scaling_factor=1.0,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(), "text_encoder": language_model("Gemma2", sliding_window=16), "vae": vae(4),
        "transformer": transformer, "scheduler": flow(),
    }  # fmt: skip


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


def qwen_2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = {
        "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=words, vision_config=sight))


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
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    video = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.1, 1.2],
    )  # fmt: skip
    return {
        "scheduler": flow(**DYNAMIC), "vae": video, "text_encoder": qwen_2_5_vl(), "tokenizer": tokenizer(),
        "transformer": transformer,
    }  # fmt: skip


def flux_2_vae() -> nn.Module:
    from diffusers import AutoencoderKLFlux2

    model: nn.Module = AutoencoderKLFlux2(
        block_out_channels=(8,) * 4, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    return model


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
        "transformer": transformer, "vae": flux_2_vae(), "tokenizer": tokenizer(), "scheduler": flow(shift=3.0),
        "text_encoder": Mistral3Model(Mistral3Config(text_config=words, vision_config=sight)),
    }  # fmt: skip


def bria() -> dict[str, Any]:
    from diffusers import BriaTransformer2DModel

    transformer = BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    return {
        "transformer": transformer, "scheduler": flow(shift=3.0), "vae": vae(4), "text_encoder": t5(),
        "tokenizer": tokenizer(),
    }  # fmt: skip


def cogview3plus() -> dict[str, Any]:
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusTransformer2DModel

    transformer = CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2, out_channels=4,
        text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=2, pos_embed_max_size=16, sample_size=8,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(), "text_encoder": t5(), "vae": vae(4, shift_factor=None), "transformer": transformer,
        "scheduler": CogVideoXDDIMScheduler(**BETAS, prediction_type="v_prediction"),
    }  # fmt: skip


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
        "tokenizer": tokenizer(), "text_encoder": t5(), "unet": unet_3, "movq": movq,
        "scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }  # fmt: skip


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
    "StableDiffusionPAGPipeline": stable_diffusion,
    "StableDiffusionXLPAGPipeline": stable_diffusion_xl,
    "StableDiffusion3PAGPipeline": sd3,
    "PixArtSigmaPAGPipeline": pixart,
    "SanaPAGPipeline": sana,
    "HunyuanDiTPAGPipeline": hunyuan_dit,
    "ChromaPipeline": chroma,
}


def build_tiny_pipeline(name: str, seed: int = 7) -> Any:
    """Build a pipeline whose weights are all random, gates and statistics included."""
    import diffusers

    with torch.random.fork_rng():
        parts = PIPELINES[name]()
    for number, part in enumerate(parts.values()):
        if isinstance(part, nn.Module):
            state = part.state_dict()
            new = fixed_init(part, seed + number)
            new |= {key: 0.5 + value.abs() for key, value in new.items() if key.endswith("running_var")}
            part.load_state_dict(
                {key: new[key] if value.is_floating_point() else value for key, value in state.items()}
            )
            part.eval().requires_grad_(False)
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    pipe = getattr(diffusers, name)(**parts, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe

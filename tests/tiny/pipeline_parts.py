"""Tokenizer, text encoders, VAEs and schedulers of tiny random pipelines of diffusers."""

import importlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

CHAT = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n"
    "{{m.content if m.content is string else m.content[0].text}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = 200  # of every vocabulary
WIDTH = 32  # of every text encoder


def replace_ftfy(module: str) -> None:
    """Give a pipeline's module a stand-in for ftfy, which repairs damaged letters, if it is not installed."""
    pipeline: Any = importlib.import_module(f"diffusers.pipelines.{module}")
    if not hasattr(pipeline, "ftfy"):
        pipeline.ftfy = SimpleNamespace(fix_text=str)


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
        model_max_length=max_length, padding_side="right", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    made._tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.chat_template = CHAT
    return made


# --- text encoders and VAEs ---

SIZES: Mapping[str, Any] = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2}
HEADS: Mapping[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
T5: Mapping[str, Any] = {"vocab_size": WORDS, "d_model": WIDTH, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}


def t5(width: int = WIDTH) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**{**T5, "d_model": width}, dense_act_fn="gelu_new"))


def umt5() -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**T5))


def clip(projects: bool = False, num_positions: int = 77) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **{**SIZES, "num_hidden_layers": 3}, num_attention_heads=4, projection_dim=WIDTH,
        max_position_embeddings=num_positions, eos_token_id=1, bos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def language_model(family: str, **more: Any) -> nn.Module:
    """Return a language model of transformers, such as Qwen3."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SIZES, **HEADS, **more})
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
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def qwen_2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = {
        "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=words, vision_config=sight))


def flux_2_vae() -> nn.Module:
    from diffusers import AutoencoderKLFlux2

    model: nn.Module = AutoencoderKLFlux2(
        block_out_channels=(8,) * 4, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    return model


def qwen_image_vae() -> nn.Module:
    from diffusers import AutoencoderKLQwenImage

    model: nn.Module = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.1, 1.2],
    )  # fmt: skip
    return model

"""Tiny random pipelines of diffusers that need one more rule each: guidance by a schedule and a second denoiser, a
composite configuration, a list of sizes, other names of options."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tests.tiny.language_model_pipelines import qwen_3_vl, wan_vae
from tests.tiny.pipeline_parts import (
    HEADS,
    SIZES,
    WIDTH,
    clip,
    flow,
    flux_2_vae,
    language_model,
    qwen_2_5_vl,
    replace_ftfy,
    tokenizer,
    vae,
)


def ideogram_4() -> dict[str, Any]:
    from diffusers import Ideogram4Transformer2DModel

    def transformer() -> nn.Module:
        model: nn.Module = Ideogram4Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=48,
            adaln_dim=16, llm_features_dim=13 * WIDTH, mrope_section=(4, 2, 2),
        )  # fmt: skip
        return model

    return {
        "scheduler": flow(), "vae": flux_2_vae(), "text_encoder": qwen_3_vl(36, "Model"), "tokenizer": tokenizer(),
        "transformer": transformer(), "unconditional_transformer": transformer(),
    }  # fmt: skip


def t5_gemma_config() -> Any:
    from transformers import T5GemmaConfig

    sizes = {**SIZES, **HEADS, "sliding_window": 16, "query_pre_attn_scalar": 8}
    return T5GemmaConfig(encoder=dict(sizes), decoder=dict(sizes))


def prx() -> dict[str, Any]:
    from diffusers import PRXTransformer2DModel
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    replace_ftfy("prx.pipeline_prx")
    transformer = PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=WIDTH, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[8, 8],
    )  # fmt: skip
    encoder = T5GemmaEncoder(t5_gemma_config().encoder)
    return {
        "transformer": transformer,
        "scheduler": flow(shift=3.0),
        "text_encoder": encoder,
        "tokenizer": tokenizer(),
        "vae": vae(4),
    }


def kandinsky_5() -> dict[str, Any]:
    from diffusers import Kandinsky5Transformer3DModel

    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=WIDTH, time_dim=16, out_visual_dim=4, model_dim=32, ff_dim=48,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 4, 4),
    )  # fmt: skip
    return {
        "transformer": transformer, "vae": vae(4), "text_encoder": qwen_2_5_vl(), "tokenizer": words_only(),
        "text_encoder_2": clip(), "tokenizer_2": tokenizer(77), "scheduler": flow(shift=5.0),
    }  # fmt: skip


def words_only() -> Any:
    """Return a tokenizer that takes images and videos as a processor does, and needs none."""
    made = tokenizer(2048)
    kind = type(made)

    class WordsOnly(kind):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, images: Any = None, videos: Any = None, **kwargs: Any) -> Any:
            assert images is None and videos is None
            return super().__call__(*args, **kwargs)

    made.__class__ = WordsOnly
    return made


def sana_video() -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, SanaVideoTransformer3DModel

    transformer = SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=WIDTH,
        sample_size=8, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    return {
        "tokenizer": tokenizer(), "text_encoder": language_model("Gemma2", sliding_window=16), "vae": wan_vae(),
        "transformer": transformer, "scheduler": scheduler,
    }  # fmt: skip


MORE: Mapping[str, Callable[[], dict[str, Any]]] = {
    "Ideogram4Pipeline": ideogram_4,
    "PRXPipeline": prx,
    "Kandinsky5T2IPipeline": kandinsky_5,
    "SanaVideoPipeline": sana_video,
}

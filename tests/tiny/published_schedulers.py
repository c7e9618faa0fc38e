"""Tiny random pipelines with the schedulers that their publishers use, which keep timesteps as whole numbers.

Configurations are those of diffusers' conversion scripts (convert_wan_to_diffusers.py, convert_sana_to_diffusers.py,
convert_skyreelsv2_to_diffusers.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

from tests.tiny.language_model_pipelines import wan
from tests.tiny.pipeline_parts import BETAS, WIDTH, replace_ftfy
from tests.tiny.pipelines import sana, stable_diffusion


def unipc(shift: float) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def wan_2_1() -> dict[str, Any]:
    return {**wan(), "scheduler": unipc(3.0)}


def sana_1_5() -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    return {**sana(), "scheduler": scheduler}


def skyreels_v2() -> dict[str, Any]:
    from diffusers import SkyReelsV2Transformer3DModel

    replace_ftfy("skyreels_v2.pipeline_skyreels_v2")
    transformer = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    parts = {name: part for name, part in wan().items() if name != "transformer_2"}
    return {**parts, "transformer": transformer, "scheduler": unipc(8.0)}


def karras() -> dict[str, Any]:
    from diffusers import UniPCMultistepScheduler

    return {**stable_diffusion(), "scheduler": UniPCMultistepScheduler(**BETAS, use_karras_sigmas=True)}


PUBLISHED: Mapping[str, Callable[[], dict[str, Any]]] = {
    "WanPipeline": wan_2_1,
    "SanaPipeline": sana_1_5,
    "SkyReelsV2Pipeline": skyreels_v2,
    "StableDiffusionPipeline": karras,
}

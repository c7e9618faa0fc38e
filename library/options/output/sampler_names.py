"""The values of --sample_sampler: samplers for previews of DDPM models."""

from collections.abc import Mapping
from typing import Any

SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # Settings follow the scheduler files of such checkpoints: sampling ends at the first noise level, and predicted
    # clean latents are not clipped to -1..1, because latents exceed it.
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "lms": ("EulerDiscreteScheduler", {}),  # supplies only the noise levels; `MultistepSampler` does the steps
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}
"""--sample_sampler -> (diffusers class, its arguments apart from the noise schedule)"""

ALIASES: Mapping[str, str] = {f"k_{name}": name for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}

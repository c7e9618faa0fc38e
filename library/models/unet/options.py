"""Hints for options of other models' scripts that a U-Net model lacks, appended to the error for such an option."""

from collections.abc import Mapping

EVENLY = "timesteps are drawn uniformly between --min_timestep and --max_timestep"
INSIDE = "the text encoders are in --pretrained_model_name_or_path"

INSTEAD: Mapping[str, str] = {
    "discrete_flow_shift": EVENLY,
    "training_shift": EVENLY,
    "timestep_sampling": EVENLY,
    "weighting_scheme": "use --min_snr_gamma or --debiased_estimation_loss to weight losses",
    "model_prediction_type": "use --v_parameterization to set the prediction type",
    "guidance_scale": "use --l in a prompt line to set the guidance of its preview",
    "t5xxl_max_token_length": "use --max_token_length",
    "ae": "use --vae",
    **dict.fromkeys(("clip_l", "clip_g", "t5xxl", "text_encoder", "qwen3", "gemma2"), INSIDE),
}

"""What options of the other models' scripts are for a model with a U-Net, as the error for one of them ends."""

from collections.abc import Mapping

EVENLY = "timesteps are drawn evenly between --min_timestep and --max_timestep"
INSIDE = "the text encoders are in --pretrained_model_name_or_path"

INSTEAD: Mapping[str, str] = {
    "discrete_flow_shift": EVENLY,
    "training_shift": EVENLY,
    "timestep_sampling": EVENLY,
    "weighting_scheme": "losses are weighed by --min_snr_gamma or --debiased_estimation_loss",
    "model_prediction_type": "here --v_parameterization says what is predicted",
    "guidance_scale": "--l in the line of a prompt guides its preview",
    "t5xxl_max_token_length": "here it is --max_token_length",
    "ae": "here it is --vae",
    **dict.fromkeys(("clip_l", "clip_g", "t5xxl", "text_encoder", "qwen3", "gemma2"), INSIDE),
}

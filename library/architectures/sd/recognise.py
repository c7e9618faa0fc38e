"""Tell a user what a file is when it is not a Stable Diffusion 1.x checkpoint."""

from collections.abc import Mapping, Sequence

from library.architectures.sd.keys import CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from library.checkpoints.weights import Weights

SD2_TEXT_WIDTH = 1024

# (what a name contains, what such a file is and what to do with it); the first that fits is told
OTHER_MODELS = (
    (("conditioner.embedders.", "diffusion_model.label_emb.", "add_embedding.linear_1"),
     "an SDXL checkpoint; use sdxl_train_network.py"),
    (("joint_blocks.",), "an SD3 checkpoint; use sd3_train_network.py"),
    (("txt_in.individual_token_refiner", "byt5_in."),
     "a HunyuanImage checkpoint; use hunyuan_image_train_network.py"),
    (("double_blocks.", "single_transformer_blocks."), "a FLUX checkpoint; use flux_train_network.py"),
    (("cap_embedder.", "context_refiner."), "a Lumina checkpoint; use lumina_train_network.py"),
    (("llm_adapter.",), "an Anima checkpoint; use anima_train_network.py"),
    (("cond_stage_model.model.",), "an SD 2.x checkpoint; --v2 is not supported yet"),
)  # fmt: skip
NO_MODELS = (  # told only when there is no U-Net: old checkpoints may carry such names beside it
    ((".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lokr_w", ".hada_w", "lora_unet_", "lora_te_"),
     "an adapter (LoRA), not a base model; go on training it with --network_weights"),
    (("control_model.", "controlnet_"), "a ControlNet, not a base model"),
    (("emb_params", "string_to_param"), "a textual inversion embedding, not a base model"),
    (("down_blocks.", "up_blocks.", "mid_block."),
     "the U-Net of a diffusers folder alone; give the folder that has unet/, vae/ and text_encoder/"),
    ((VAE_PREFIX, "encoder.down.", "encoder.down_blocks.", "decoder.conv_in."),
     "a VAE, not a base model; use it with --vae"),
    (("encoder.layers.", "token_embedding"), "a text encoder alone, not a base model"),
)  # fmt: skip

PIPELINES = {
    "StableDiffusionXL": "an SDXL model; use sdxl_train_network.py",
    "StableDiffusion3": "an SD3 model; use sd3_train_network.py",
    "Flux": "a FLUX model; use flux_train_network.py",
    "Lumina": "a Lumina model; use lumina_train_network.py",
    "HunyuanImage": "a HunyuanImage model; use hunyuan_image_train_network.py",
}


def refuse_other_model(flag: str, weights: Weights) -> None:
    """Raise ValueError when a single file is no SD 1.x checkpoint, naming what it is."""
    names = list(weights.shapes)
    has_unet = any(name.startswith(UNET_PREFIX) for name in names)
    what = first_fit(names, OTHER_MODELS if has_unet else OTHER_MODELS + NO_MODELS)
    if what:
        raise ValueError(f"{flag} {weights.origin}: this is {what}")
    if not has_unet:
        raise ValueError(
            f"{flag} {weights.origin}: nothing in it begins with {UNET_PREFIX!r}, so it is no Stable Diffusion "
            f"checkpoint (first names: {', '.join(names[:3]) or 'none'})"
        )
    if not any(name.startswith(CLIP_PREFIX) for name in names):
        raise ValueError(
            f"{flag} {weights.origin} has a U-Net but no text encoder (nothing begins with {CLIP_PREFIX!r}); "
            "use a full checkpoint"
        )
    refuse_sd2(flag, weights.origin, weights.shapes)


def first_fit(names: Sequence[str], kinds: Sequence[tuple[tuple[str, ...], str]]) -> str | None:
    """What the first kind is that a name fits, None when none fits."""
    return next((what for marks, what in kinds if any(mark in name for name in names for mark in marks)), None)


def refuse_sd2(flag: str, origin: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError for a U-Net that listens to SD 2's text encoder, 1024 wide."""
    if any(name.endswith("attn2.to_k.weight") and shape[1] == SD2_TEXT_WIDTH for name, shape in shapes.items()):
        raise ValueError(f"{flag} {origin}: this is an SD 2.x checkpoint; --v2 is not supported yet")


def refuse_other_pipeline(flag: str, origin: str, class_name: str) -> None:
    """Raise ValueError when a diffusers folder says that it holds another base model."""
    for mark, what in PIPELINES.items():
        if class_name.startswith(mark):
            raise ValueError(f"{flag} {origin}: this is {what}")

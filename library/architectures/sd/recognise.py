"""Tell a user what a file is when it is not a Stable Diffusion 1.x checkpoint."""

from collections.abc import Iterable, Mapping

from library.architectures.sd.keys import CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from library.checkpoints.weights import Weights

SD2_TEXT_WIDTH = 1024

# (what a name contains, what such a file is and what to do with it); the first that fits is told
STRANGERS = (
    ((".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lokr_w", ".hada_w", "lora_unet_", "lora_te_"),
     "an adapter (LoRA), not a base model; go on training it with --network_weights"),
    (("conditioner.embedders.", "diffusion_model.label_emb.", "add_embedding.linear_1"),
     "an SDXL checkpoint; use sdxl_train_network.py"),
    (("joint_blocks.",), "an SD3 checkpoint; use sd3_train_network.py"),
    (("txt_in.individual_token_refiner", "byt5_in."),
     "a HunyuanImage checkpoint; use hunyuan_image_train_network.py"),
    (("double_blocks.", "single_transformer_blocks."), "a FLUX checkpoint; use flux_train_network.py"),
    (("cap_embedder.", "context_refiner."), "a Lumina checkpoint; use lumina_train_network.py"),
    (("llm_adapter.",), "an Anima checkpoint; use anima_train_network.py"),
    (("cond_stage_model.model.",), "an SD 2.x checkpoint; --v2 is not supported yet"),
    (("control_model.", "controlnet_cond_embedding"), "a ControlNet, not a base model"),
    (("emb_params", "string_to_param"), "a textual inversion embedding, not a base model"),
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
    names = weights.shapes
    for marks, what in STRANGERS:
        if any(mark in name for name in names for mark in marks):
            raise ValueError(f"{flag} {weights.origin}: this is {what}")
    if not any(name.startswith(UNET_PREFIX) for name in names):
        raise ValueError(f"{flag} {weights.origin}: {describe_part(names)}")
    missing = [prefix for prefix in (CLIP_PREFIX, VAE_PREFIX) if not any(name.startswith(prefix) for name in names)]
    if CLIP_PREFIX in missing:
        raise ValueError(
            f"{flag} {weights.origin} has a U-Net but no text encoder (nothing begins with {CLIP_PREFIX!r}); "
            "use a full checkpoint"
        )
    refuse_sd2(flag, weights.origin, weights.shapes)


def describe_part(names: Iterable[str]) -> str:
    """What a file without "model.diffusion_model." seems to be."""
    names = list(names)
    if any(name.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for name in names):
        return "this is the U-Net of a diffusers folder alone; give the folder that has unet/, vae/ and text_encoder/"
    if any(name.startswith((VAE_PREFIX, "encoder.down", "decoder.")) for name in names):
        return "this is a VAE, not a base model; use it with --vae"
    if any("encoder.layers." in name or "token_embedding" in name for name in names):
        return "this is a text encoder alone, not a base model"
    first = ", ".join(names[:3]) or "none"
    return f"nothing in it begins with {UNET_PREFIX!r}, so it is no Stable Diffusion checkpoint (first names: {first})"


def refuse_sd2(flag: str, origin: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError for a U-Net that listens to SD 2's text encoder, 1024 wide."""
    if any(name.endswith("attn2.to_k.weight") and shape[1] == SD2_TEXT_WIDTH for name, shape in shapes.items()):
        raise ValueError(f"{flag} {origin}: this is an SD 2.x checkpoint; --v2 is not supported yet")


def refuse_other_pipeline(flag: str, origin: str, class_name: str) -> None:
    """Raise ValueError when a diffusers folder says that it holds another base model."""
    for mark, what in PIPELINES.items():
        if class_name.startswith(mark):
            raise ValueError(f"{flag} {origin}: this is {what}")

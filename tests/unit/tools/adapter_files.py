"""Small adapter files for Stable Diffusion 1.x."""

from pathlib import Path

import torch
from torch import Tensor

from library.checkpoints.saving import save_safetensors

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_up_blocks_2_resnets_1_conv1"
CLIP = "lora_te_text_model_encoder_layers_3_mlp_fc1"
METADATA = {
    "ss_network_dim": "4",
    "ss_network_args": '{"conv_dim": "2"}',
    "ss_training_started_at": "1700000000.5",
    "ss_tag_frequency": '{"10_cat": {"cat": 9, "sitting": 4}, "5_dog": {"dog": 7, "sitting": 6}}',
    "modelspec.title": "my cat",
    "sshs_model_hash": "of another file",
    "note": "__import__('os').system('touch ran')",
}


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a Linear and a 3x3 convolution of the U-Net and a Linear of the text encoder; rank 4, alpha 2."""
    generator = torch.Generator().manual_seed(seed)
    state_dict: dict[str, Tensor] = {}
    for name, kernel in ((LINEAR, ()), (CONV, (3, 3)), (CLIP, ())):
        state_dict[f"{name}.alpha"] = torch.tensor(2.0)
        state_dict[f"{name}.lora_down.weight"] = torch.randn(4, 5, *kernel, generator=generator).to(dtype)
        state_dict[f"{name}.lora_up.weight"] = torch.randn(7, 4, *(1,) * len(kernel), generator=generator).to(dtype)
    return state_dict


def write(path: Path, seed: int, extra: dict[str, Tensor] | None = None) -> Path:
    save_safetensors(path, {**tensors(seed), **(extra or {})}, METADATA)
    return path

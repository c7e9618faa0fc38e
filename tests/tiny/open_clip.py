"""Conversion of transformers' CLIP weights to OpenCLIP's layout: q, k and v stacked, the projection transposed."""

import torch
from torch import Tensor

LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert `state`, whose names may begin with "text_model."."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    converted = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    if "text_projection.weight" in state:
        converted["text_projection"] = state["text_projection.weight"].t().contiguous()
    num_layers = len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")})
    for n in range(num_layers):
        theirs, ours = f"encoder.layers.{n}", f"transformer.resblocks.{n}"
        for kind in ("weight", "bias"):
            for old, new in LAYER.items():
                converted[f"{ours}.{new}.{kind}"] = state[f"{theirs}.{old}.{kind}"]
            packed = [state[f"{theirs}.self_attn.{name}_proj.{kind}"] for name in ("q", "k", "v")]
            converted[f"{ours}.attn.in_proj_{kind}"] = torch.cat(packed)
    return converted

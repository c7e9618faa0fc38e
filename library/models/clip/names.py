"""The modules of CLIP text encoders in the three namings of adapter files."""

from collections.abc import Iterator

from library.checkpoints.adapter_names import ModuleNames, text_module

CLIP_BLOCKS = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")  # classes whose linear layers adapters target
CLIP_LINEAR = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
CLIP_LAYER = (*CLIP_LINEAR, "layer_norm1", "layer_norm2")


def clip_paths(num_layers: int) -> Iterator[str]:
    """Yield the path of every module with weights, without the embeddings."""
    yield from (f"encoder.layers.{layer}.{name}" for layer in range(num_layers) for name in CLIP_LAYER)
    yield "final_layer_norm"


def clip_module(path: str, prefix: str, generic: str, diffusers: str) -> ModuleNames:
    """Name a text encoder's module in the three namings, with the prefixes `prefix` ("lora_te1"), `generic` ("clip_l")
    and `diffusers`.

    diffusers reads and writes "text_model." in files, whether or not the loaded model has that level.
    """
    return text_module(f"text_model.{path}", prefix, generic, diffusers, aliases=(f"{diffusers}.{path}",))

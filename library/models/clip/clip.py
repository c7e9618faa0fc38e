"""CLIP text encoders of OpenAI and OpenCLIP as transformers' models, from files in either layout.

A `Component` of such an encoder uses the module paths of transformers 5 below the text model ("encoder.layers.0...",
"final_layer_norm.weight") and, with a projection, "text_projection.weight".

Letters: N sequences, T the 77 positions, W width, P width of the projection.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.weights import Weights, configure, rename_weights, select_weights
from library.memory.devices import send
from library.models.loading import Component, MaybeComponent, materialise
from library.models.names import inverse, swap_stem
from library.models.shapes import Shapes, choose_num_heads, count, shape_of

# CLIP-L has 12 heads at width 768, OpenCLIP-H 16 at 1024, bigG 20 at 1280.
HEAD_WIDTH = 64
PROJECTION = "text_projection.weight"
CLIP_WORDS = "embeddings.token_embedding.weight"
OPEN_CLIP_STEMS = {
    "token_embedding": "embeddings.token_embedding",
    "ln_final": "final_layer_norm",
    "text_projection": "text_projection",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
THIRDS = ("q_proj", "k_proj", "v_proj")  # stacked along the rows of OpenCLIP's in_proj
OPEN_CLIP_LEFT_OUT = ("logit_scale", "attn_mask")  # not used by the text encoder


def clip_component(
    weights: Weights, activation: str, *, projects: bool = False, num_layers: int | None = None
) -> Component:
    """Build a text encoder's component from a file's weights without prefix, in transformers' or OpenCLIP's layout.

    `activation` cannot be inferred from shapes: "quick_gelu" for OpenAI's weights, "gelu" for OpenCLIP's. With
    `projects` the text projection is kept, and the file must have it. `num_layers` drops all later layers. Raises
    UserError naming the file if a weight is missing.
    """
    if any(key.startswith("transformer.resblocks.") for key in weights.shapes):
        weights = from_open_clip(weights)
    else:
        weights = rename_weights(weights, clip_from_any)
    if num_layers is not None:
        weights = drop_layers_from(weights, num_layers)
    if not projects:
        weights = select_weights(weights, {key: key for key in weights.shapes if not key.startswith("text_projection")})
    config = configure(weights, lambda shapes: clip_config(shapes, activation))
    if projects:
        config["projection_dim"] = configure(weights, lambda shapes: shape_of(shapes, PROJECTION))[0]
    return Component(config, weights)


def clip_of_folder(config: Mapping[str, Any], weights: Weights, *, projects: bool = False) -> Component:
    """Build a text encoder's component from a diffusers folder; `projects` keeps the text projection."""
    weights = rename_weights(weights, clip_from_any)
    if not projects:
        weights = select_weights(weights, {key: key for key in weights.shapes if not key.startswith("text_projection")})
    return Component(config, weights)


def clip_from_any(key: str) -> str:
    """Remove "text_model.", which some files have but paths of transformers 5's CLIPTextModel lack."""
    return key.removeprefix("text_model.")


def from_open_clip(weights: Weights) -> Weights:
    """Rename OpenCLIP's text encoder to transformers' names, splitting in_proj into q, k and v."""
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, tuple[str, str | int | None]] = {}  # new name -> (old name, third of the rows or "transposed")
    for key, shape in weights.shapes.items():
        packed = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key)
        if packed:
            for third, name in enumerate(THIRDS):
                new = f"encoder.layers.{packed[1]}.self_attn.{name}.{packed[2]}"
                sources[new], shapes[new] = (key, third), (shape[0] // 3, *shape[1:])
        # OpenCLIP multiplies by this matrix from the right, torch's Linear by the transposed weight. A key
        # "text_projection.weight" already has Linear's layout.
        elif key == "text_projection":
            sources[PROJECTION], shapes[PROJECTION] = (key, "transposed"), shape[::-1]
        elif key not in OPEN_CLIP_LEFT_OUT:
            new = open_clip_name(key)
            sources[new], shapes[new] = (key, None), shape

    def read(name: str) -> Tensor:
        old, part = sources[name]
        tensor = weights.read(old)
        if isinstance(part, int):
            # A view would keep all three in memory.
            return tensor.chunk(3)[part].clone()
        return tensor.t().contiguous() if part == "transposed" else tensor

    return Weights(weights.origin, shapes, read)


def open_clip_name(key: str) -> str:
    """Return transformers' name of a weight that has the same shape in both layouts; unknown names are kept."""
    if key == "positional_embedding":
        return "embeddings.position_embedding.weight"
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", key)
    if layer:
        return f"encoder.layers.{layer[1]}.{swap_stem(layer[2], OPEN_CLIP_LAYER) or layer[2]}"
    return swap_stem(key, OPEN_CLIP_STEMS) or key


def to_open_clip(weights: Weights) -> Weights:
    """Rename transformers' text encoder to OpenCLIP's names, with q, k and v in one tensor: the inverse of
    `from_open_clip`."""
    sources: dict[str, tuple[str, ...]] = {}  # new name -> the old ones, stacked along the rows
    for key in weights.shapes:
        third = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv]_proj)\.(weight|bias)", key)
        if third is None:
            sources[open_clip_key(key)] = (key,)
        elif third[2] == THIRDS[0]:
            new = f"transformer.resblocks.{third[1]}.attn.in_proj_{third[3]}"
            sources[new] = tuple(f"encoder.layers.{third[1]}.self_attn.{name}.{third[3]}" for name in THIRDS)

    def read(name: str) -> Tensor:
        tensors = [weights.read(old) for old in sources[name]]
        if name == "text_projection":
            return tensors[0].t().contiguous()
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def shape(name: str, first: tuple[int, ...]) -> tuple[int, ...]:
        return first[::-1] if name == "text_projection" else (len(sources[name]) * first[0], *first[1:])

    return Weights(weights.origin, {new: shape(new, weights.shapes[old[0]]) for new, old in sources.items()}, read)


def open_clip_key(name: str) -> str:
    """Return OpenCLIP's name of a weight that has the same shape in both layouts."""
    if name == "embeddings.position_embedding.weight":
        return "positional_embedding"
    if name == PROJECTION:
        return "text_projection"
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    if layer:
        return f"transformer.resblocks.{layer[1]}.{swap_stem(layer[2], inverse(OPEN_CLIP_LAYER)) or layer[2]}"
    return swap_stem(name, inverse(OPEN_CLIP_STEMS)) or name


def drop_layers_from(weights: Weights, first: int) -> Weights:
    def stays(key: str) -> bool:
        layer = re.match(r"encoder\.layers\.(\d+)\.", key)
        return layer is None or int(layer[1]) < first

    return select_weights(weights, {key: key for key in weights.shapes if stays(key)})


def clip_config(shapes: Shapes, activation: str = "quick_gelu") -> dict[str, Any]:
    """Return the arguments of transformers' CLIPTextConfig, from names without "text_model."."""
    vocab, width = shape_of(shapes, CLIP_WORDS)
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": count(shapes, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": choose_num_heads(width, width // HEAD_WIDTH),
        "max_position_embeddings": shape_of(shapes, "embeddings.position_embedding.weight")[0],
        "hidden_act": activation,
        # The last two tokens of CLIP's vocabulary are begin and end.
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
        "pad_token_id": vocab - 1,
    }


def empty_clip(config: Mapping[str, Any], projects: bool = False) -> Any:
    """Build transformers' CLIPTextModel, or CLIPTextModelWithProjection with `projects`, on the meta device.

    Only the position IDs, which no file contains, are real tensors.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    model_class = CLIPTextModelWithProjection if projects else CLIPTextModel
    with torch.device("meta"):
        clip = model_class(CLIPTextConfig.from_dict(dict(config)))
    position_ids = torch.arange(clip.config.max_position_embeddings).expand((1, -1))
    clip_body(clip).embeddings.register_buffer("position_ids", position_ids, persistent=False)
    return clip


def clip_body(encoder: nn.Module) -> Any:
    """Return the module with `embeddings`, `encoder` and `final_layer_norm`: in transformers 5 the model itself."""
    return getattr(encoder, "text_model", encoder)


class ClipView(nn.Module):
    """A CLIP text encoder's layers below "text_model.", a level that adapter names have and transformers 5 dropped."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = clip_body(encoder)


def load_clip(component: MaybeComponent, dtype: torch.dtype) -> nn.Module:
    """Load the encoder in `dtype`, frozen, on the CPU; with a projection if the component has one."""
    projects = PROJECTION in component.weights.shapes
    encoder: nn.Module = empty_clip(component.config, projects)
    body = select_weights(component.weights, {key: key for key in component.weights.shapes if key != PROJECTION})
    # Names begin below the body, whose path depends on the class and on the version of transformers.
    materialise(clip_body(encoder), body, dtype)
    if projects:
        weight = select_weights(component.weights, {"weight": PROJECTION})
        materialise(encoder.text_projection, weight, dtype)  # type: ignore[arg-type]
    return encoder.requires_grad_(False).eval()


def hidden_states(encoder: nn.Module, ids_NT: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the states before the first layer and after each, and the last ones after the final norm; each NTW."""
    body = clip_body(encoder)
    states = body(send(ids_NT, body.final_layer_norm.weight.device), output_hidden_states=True)
    return states.hidden_states, states.last_hidden_state


def pool_at_end(normed_NTW: Tensor, ids_NT: Tensor, end_id: int, projection: nn.Module) -> Tensor:
    """Return the projected state at the first end-of-text token, NP."""
    # `argmax` returns the first end token, also where the padding repeats it.
    end_N = send((ids_NT == end_id).int().argmax(dim=1), normed_NTW.device)
    pooled_NP: Tensor = projection(normed_NTW[torch.arange(len(end_N), device=normed_NTW.device), end_N])
    return pooled_NP

"""The vision model of Qwen3-VL (transformers' Qwen3VLVisionModel), and the encoding of captions with images."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from math import floor, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.nn.utils.rnn import pad_sequence

from library.base.errors import about
from library.checkpoints.weights import Weights, configure, find_prefix, with_prefix
from library.memory.devices import send
from library.models.loading import Component, empty_transformers_model, load_component
from library.models.qwen3 import encode_qwen3
from library.models.qwen3_vl import VISION
from library.models.shapes import Shapes, count, shape_of
from library.types import CaptionWithImages, Tokens, plain_caption

MERGE = 2  # patches per side that one token represents
NUM_HEADS = 16
DEEPSTACK = (8, 16, 24)  # layers whose states are added to those of the language model's first layers
DEEPSTACK_OF_4B = (5, 11, 17)
DEPTH_OF_4B = 24
SLOT, VISION_BEGIN, VISION_END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
VISION_MARKS = (SLOT, VISION_BEGIN, VISION_END)
SLOT_SIDE = 32  # pixels of an image that one token represents
LARGEST_AREA = 384**2  # pixels of a reference image that an encoder sees


def vision_component(weights: Weights) -> Component | None:
    """Build the vision model's component from a text encoder's file; None if the file has no vision model."""
    mark = f"{VISION}patch_embed.proj.weight"
    prefix = next((name.removesuffix(mark) for name in weights.shapes if name.endswith(mark)), None)
    if prefix is None:
        return None
    vision = with_prefix(weights, find_prefix(weights.shapes, (f"{prefix}{VISION}",)))
    return Component(configure(vision, vision_config), vision)


def vision_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of transformers' Qwen3VLVisionConfig."""
    width, channels, num_frames, patch, _ = shape_of(shapes, "patch_embed.proj.weight")
    depth = count(shapes, r"blocks\.(\d+)\.")
    return {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, "blocks.0.mlp.linear_fc1.weight")[0],
        "num_heads": NUM_HEADS,
        "in_channels": channels,
        "patch_size": patch,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": num_frames,
        "out_hidden_size": shape_of(shapes, "merger.linear_fc2.weight")[0],
        "num_position_embeddings": shape_of(shapes, "pos_embed.weight")[0],
        "deepstack_visual_indexes": list(DEEPSTACK_OF_4B if depth == DEPTH_OF_4B else DEEPSTACK),
    }


empty_vision = partial(empty_transformers_model, "qwen3_vl", "Qwen3VLVision")
load_vision = partial(load_component, empty_vision)


def encode_with_images(
    language: nn.Module,
    vision: nn.Module,
    ids_S: Tensor,
    slot: int,
    images: Sequence[Tensor],
    layers: Sequence[int] = (),
    has_deepstack: bool = True,
) -> Tensor:
    """Return the states of one caption, shape SE, with images (each CHW) in place of its tokens `slot`: the last ones,
    or those after several `layers`, concatenated as by `encode_layers`.

    Without `has_deepstack` the vision model gives the language model nothing but its last states.
    """
    device = next(vision.parameters()).device
    words_1SE, positions_3S, outputs = embed_with_images(language, vision, ids_S, slot, images)
    added: dict[str, Any] = {}
    if has_deepstack:
        is_slot_1S = (send(ids_S, device) == slot)[None]
        added = {"visual_pos_masks": is_slot_1S, "deepstack_visual_embeds": outputs.deepstack_features}
    states = language(
        inputs_embeds=words_1SE, position_ids=positions_3S[:, None], output_hidden_states=bool(layers), **added
    )
    chosen = [states.hidden_states[layer] for layer in layers] or [states.last_hidden_state]
    return torch.cat(chosen, dim=-1)[0]


def embed_with_images(
    language: nn.Module, vision: nn.Module, ids_S: Tensor, slot: int, images: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Any]:
    """Embed one caption with images (each CHW) in place of its tokens `slot`.

    Returns the embeddings, (1, S, E), the rotary positions, (3, S), and the output of the vision model.
    """
    model: Any = language
    tower: Any = vision
    weight = next(vision.parameters())
    ids_S, patch = send(ids_S, weight.device), tower.config.patch_size
    grids = [(1, image.shape[-2] // patch, image.shape[-1] // patch) for image in images]
    patches_P = torch.cat([cut_patches(image, patch, tower.config.temporal_patch_size) for image in images])
    outputs = tower(send(patches_P, weight.device).to(weight.dtype), grid_thw=send(torch.tensor(grids), weight.device))
    is_slot_S = ids_S == slot
    words_SE = model.embed_tokens(ids_S)
    words_SE = words_SE.masked_scatter(is_slot_S[:, None], outputs.pooler_output.to(words_SE.dtype))
    token_grids = [(height // MERGE, width // MERGE) for _, height, width in grids]
    positions_3S = send(rotary_positions(is_slot_S.tolist(), token_grids), weight.device)
    return words_SE[None], positions_3S, outputs


def fit_images(captions: Sequence[str]) -> tuple[tuple[Tensor, ...], ...]:
    """Read the images of each caption, resized by `fit_image`."""
    return tuple(
        tuple(map(fit_image, caption.read())) if isinstance(caption, CaptionWithImages) else () for caption in captions
    )


def fit_image(image_CHW: Tensor) -> Tensor:
    """Resize a reference image for the text encoder: to at most 384 x 384 pixels in all, sides multiples of 32."""
    H, W = image_CHW.shape[-2:]
    sides = [max(1, round(side / SLOT_SIDE)) * SLOT_SIDE for side in (H, W)]
    if sides[0] * sides[1] > LARGEST_AREA:
        shrinking = sqrt(H * W / LARGEST_AREA)
        sides = [max(1, floor(side / shrinking / SLOT_SIDE)) * SLOT_SIDE for side in (H, W)]
    if sides == [H, W]:
        return image_CHW
    resized_1CHW = interpolate(image_CHW[None], size=sides, mode="bicubic", antialias=True)
    return resized_1CHW[0].clamp(-1, 1)


def number_images(caption: str, images: Sequence[Tensor]) -> str:
    """Return a caption after `Picture 1: `, `Picture 2: `, ..., each followed by the slots of an image."""
    slots = [(image.shape[-2] // SLOT_SIDE) * (image.shape[-1] // SLOT_SIDE) for image in images]
    pictures = [f"Picture {n}: {VISION_BEGIN}{SLOT * count}{VISION_END}" for n, count in enumerate(slots, start=1)]
    # A slot in a caption would be taken for a part of an image.
    return "".join((*pictures, plain_caption(caption).replace(SLOT, "")))


def join_rows(rows: Sequence[Sequence[int]], images: Sequence[Sequence[Tensor]]) -> Tokens:
    """Return the token IDs of captions and their mask, (B, 1, T), 0 for padding, with the images of each caption."""
    ids = [torch.tensor(row) for row in rows]
    ids_BT = pad_sequence(ids, batch_first=True)
    mask_BT = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return Tokens((ids_BT[:, None], mask_BT[:, None]), images=tuple(map(tuple, images)))


def encode_captions(
    encoders: Sequence[nn.Module],
    tokens: Tokens,
    slot: int,
    encoder: str,
    encode_one: Callable[[nn.Module, nn.Module, Tensor, int, Sequence[Tensor]], Tensor] = encode_with_images,
    encode_texts: Callable[[nn.Module, Tensor, Tensor], Tensor] = encode_qwen3,
) -> Tensor:
    """Return states, BTE: of all captions at once, or one by one if any has images.

    `encoders` are the language model and, if its files have one, the vision model. `encode_one` is such a function as
    `encode_with_images`, `encode_texts` encodes captions without images. Raises UserError for images without a vision
    model, naming the `encoder` to use.
    """
    language, *vision = encoders
    ids_BT, mask_BT = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT)
    if not vision and any(tokens.images):
        raise about("--text_encoder")(
            "has no vision model, which reference images require", f"use a complete file or folder of {encoder}"
        )
    # The encoders' states overflow float16.
    with torch.autocast(next(language.parameters()).device.type, enabled=False):
        if not any(tokens.images):
            return encode_texts(language, ids_BT, mask_BT)
        rows = []
        for ids_T, mask_T, shown in zip(ids_BT, mask_BT, tokens.images, strict=True):
            ids_S = ids_T[mask_T.bool()]
            if shown:
                states_SE = encode_one(language, vision[0], ids_S, slot, shown)
            else:
                states_SE = encode_texts(language, ids_S[None], torch.ones_like(ids_S)[None])[0]
            rows.append(pad(states_SE, (0, 0, 0, len(ids_T) - len(ids_S))))
        return torch.stack(rows)


def cut_patches(image_CHW: Tensor, patch: int, num_frames: int) -> Tensor:
    """Cut an image, repeated as the equal frames of a video, into patches; those of one token follow each other."""
    C, H, W = image_CHW.shape
    step = MERGE * patch
    grid = image_CHW.view(C, H // step, MERGE, patch, W // step, MERGE, patch).permute(1, 4, 2, 5, 0, 3, 6)
    frames = grid[..., None, :, :].expand(*grid.shape[:-2], num_frames, patch, patch)
    return frames.reshape(-1, C * num_frames * patch**2)


def rotary_positions(is_slot_S: Sequence[bool], grids: Sequence[tuple[int, int]]) -> Tensor:
    """Return positions (time, row, column) of tokens, (3, S): text advances on all axes, an image on row and column.

    `grids` has the rows and columns of each image's tokens.
    """
    positions: list[Tensor] = []
    offset, remaining = 0, iter(grids)
    for is_slot, run in groupby(is_slot_S):
        num_tokens = len(list(run))
        if is_slot:
            height, width = next(remaining)
            grid_S2 = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2)
            positions_S3 = torch.cat([torch.zeros(num_tokens, 1, dtype=torch.long), grid_S2], dim=1)
            # As in transformers: the text after an image continues behind its longer side.
            advance = max(height, width)
        else:
            positions_S3, advance = torch.arange(num_tokens)[:, None].expand(-1, 3), num_tokens
        positions.append(offset + positions_S3)
        offset += advance
    return torch.cat(positions).T

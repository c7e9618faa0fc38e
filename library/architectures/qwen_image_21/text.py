"""Encoding of captions for Qwen-Image 2.1: Qwen3-VL's last states of a caption, with reference images before it.

Letters: B captions, T tokens of the longest, E width of the encoder, R reference images, C channels, H and W sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from library.models.qwen3_vl_vision import SLOT, VISION_BEGIN, VISION_END, VISION_MARKS, encode_captions, join_rows
from library.types import CaptionWithImages, Conditioning, Tokens, plain_caption

ENCODER = "Qwen3-VL 8B"
NUM_TOKENS = 1024  # of the text that reaches the denoiser, with its template; longer captions are cut
BEGIN, END = "<|im_start|>", "<|im_end|>"
SYSTEM = f"{BEGIN}system\nComprehend and analyze the provided prompt.{END}\n"  # its tokens do not reach the denoiser
TEMPLATE = (f"{BEGIN}user\n", f"{END}\n{BEGIN}assistant\n")
MARKS = (BEGIN, END, *VISION_MARKS)
NO_PLACE = -1  # padding for a caption with fewer images than others


@dataclass(frozen=True)
class QwenImage21Text:
    """The text pipeline of Qwen-Image 2.1: captions in Qwen3-VL's template, with the tokens of reference images
    before them."""

    tokenizer: Any  # transformers' Qwen2Tokenizer, padding on the right
    pixels_per_token: int

    @property
    def max_tokens(self) -> int:
        return NUM_TOKENS - self.count_tokens("".join(TEMPLATE))

    def count_tokens(self, caption: str) -> int:
        return len(self.ids(caption))

    def ids(self, text: str) -> list[int]:
        token_ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return token_ids

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return IDs and their mask, (B, 1, T), 0 for padding, and the images of each caption."""
        images = tuple(caption.read() if isinstance(caption, CaptionWithImages) else () for caption in captions)
        return join_rows([self.row(caption, shown) for caption, shown in zip(captions, images, strict=True)], images)

    def row(self, caption: str, images: Sequence[Tensor]) -> list[int]:
        """Return the token IDs of a caption in its template; truncation cuts a long caption and the template's end."""
        # A slot in a caption would be taken for a part of an image.
        text = plain_caption(caption).replace(SLOT, "")
        begin, end = TEMPLATE
        image_texts = [
            f"<image{number}>{VISION_BEGIN}{SLOT * self.num_slots(image)}{VISION_END}"
            for number, image in enumerate(images, start=1)
        ]
        # The limit counts what the denoiser gets: neither the system message nor the slots of images.
        max_length = len(self.ids(SYSTEM)) + sum(map(self.num_slots, images)) + NUM_TOKENS
        # An empty caption is a space, as in diffusers' pipeline.
        return self.ids(f"{SYSTEM}{begin}{' '.join(image_texts)}{text or ' '}{end}")[:max_length]

    def num_slots(self, image_CHW: Tensor) -> int:
        H, W = image_CHW.shape[-2:]
        return (H // self.pixels_per_token) * (W // self.pixels_per_token)

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"hidden_state": (B, T, E), "attention_mask": (B, T), "image_places": (B, R)}.

        These are the states of text tokens without the system message, and the number of such tokens before each image.
        """
        ids_BT, mask_BT = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT)
        first, slot = len(self.ids(SYSTEM)), self.tokenizer.convert_tokens_to_ids(SLOT)
        shown = tuple(tuple(map(composite_on_white, images)) for images in tokens.images)
        states_BTE = encode_captions(encoders, replace(tokens, images=shown), slot, ENCODER)
        if not any(tokens.images):
            places_BR = torch.empty(len(ids_BT), 0, dtype=torch.long)
            return {
                "hidden_state": states_BTE[:, first:],
                "attention_mask": mask_BT[:, first:],  # kept on the host
                "image_places": places_BR,
            }
        is_text_BT = mask_BT.bool() & (ids_BT != slot)
        is_text_BT[:, :first] = False
        rows = [states_TE[is_text_T] for states_TE, is_text_T in zip(states_BTE, is_text_BT, strict=True)]
        masks = [torch.ones(len(row), dtype=mask_BT.dtype) for row in rows]
        vision_end = self.tokenizer.convert_tokens_to_ids(VISION_END)
        # An image's slots end before this token. The caption, which follows all images, may contain the token too.
        places = [
            torch.nonzero(ids_T[is_text_T] == vision_end)[: len(images), 0]
            for ids_T, is_text_T, images in zip(ids_BT, is_text_BT, tokens.images, strict=True)
        ]
        return {
            "hidden_state": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "image_places": pad_sequence(places, batch_first=True, padding_value=NO_PLACE),
        }


def composite_on_white(image_CHW: Tensor) -> Tensor:
    """Composite an RGBA image of values -1..1 on white, rounded to 8 bits like image files; RGB is unchanged."""
    if len(image_CHW) == 3:
        return image_CHW
    alpha = (image_CHW[3:] + 1) / 2
    blended = (image_CHW[:3] * alpha + (1 - alpha) + 1) * 127.5
    return blended.round() / 127.5 - 1

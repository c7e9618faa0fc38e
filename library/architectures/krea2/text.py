"""Encoding of captions for Krea 2: twelve states of Qwen3-VL for each token of a caption in its chat template, and of
reference images before it.

Letters: B captions, T tokens with the template, L tokens that the denoiser gets, F values of all states of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.devices import send
from library.models.language_models import DESCRIBE, encode_layers
from library.models.qwen3_vl_vision import (
    SLOT,
    VISION_MARKS,
    encode_captions,
    encode_with_images,
    fit_images,
    join_rows,
    number_images,
)
from library.types import Conditioning, Tokens

ENCODER = "Qwen3-VL 4B"
NUM_TOKENS = 512  # most that the denoiser gets without references: a caption and the end of the template
BEGIN, END = DESCRIBE, "<|im_end|>\n<|im_start|>assistant\n"
MARKS = ("<|im_start|>", "<|im_end|>", *VISION_MARKS)
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)  # layers whose states are used; later ones are not loaded


@dataclass(frozen=True)
class Krea2Text:
    """The text pipeline of Krea 2: Qwen3-VL reads a caption in the chat template; the system message is cut off."""

    tokenizer: Any  # transformers' Qwen2Tokenizer
    layers: Sequence[int] = LAYERS

    @cached_property
    def num_begin(self) -> int:
        """The number of tokens before a caption: 34."""
        return self.count_tokens(BEGIN)

    @cached_property
    def end(self) -> list[int]:
        """The five tokens after a caption."""
        return list(self.tokenizer(END)["input_ids"])

    @property
    def max_tokens(self) -> int:
        return NUM_TOKENS - len(self.end)

    def count_tokens(self, caption: str) -> int:
        return len(self.tokenizer(caption, verbose=False)["input_ids"])

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return token IDs and their mask, both (B, 1, T), 0 for padding, which comes last, and the images of each
        caption; a long caption is cut, but not with images."""
        images = fit_images(captions)
        texts = [f"{BEGIN}{number_images(*each)}" for each in zip(captions, images, strict=True)]
        rows = self.tokenizer(texts, verbose=False)["input_ids"]
        longest = self.num_begin + self.max_tokens
        rows = [row if shown else row[:longest] for row, shown in zip(rows, images, strict=True)]
        # The model was trained with padding before the end of the template. That padding was masked and took no
        # positions, so the states of the other tokens are the same. Which token pads is arbitrary.
        return join_rows([[*row, *self.end] for row in rows], images)

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"hidden_state": (B, L, F), "attention_mask": (B, L)}; states of padding are 0."""
        slot = self.tokenizer.convert_tokens_to_ids(SLOT)
        ways = (partial(encode, layers=self.layers) for encode in (encode_with_images, encode_layers))
        states_BLF = encode_captions(encoders, tokens, slot, ENCODER, *ways)[:, self.num_begin :]
        mask_BL = tokens.ids_BLT[1][:, 0, self.num_begin :]
        is_text_BL1: Tensor = send(mask_BL, states_BLF.device)[..., None].bool()
        return {"hidden_state": torch.where(is_text_BL1, states_BLF, 0), "attention_mask": mask_BL}

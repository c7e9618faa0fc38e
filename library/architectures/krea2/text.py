"""Encoding of captions for Krea 2: twelve states of Qwen3-VL for each token of a caption in its chat template.

Letters: B captions, T tokens with the template, L tokens that the denoiser gets, F values of all states of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.devices import send
from library.models.language_models import DESCRIBE, encode_layers
from library.types import Conditioning, Tokens

NUM_TOKENS = 512  # most that the denoiser gets: a caption and the end of the template
BEGIN, END = DESCRIBE, "<|im_end|>\n<|im_start|>assistant\n"
MARKS = ("<|im_start|>", "<|im_end|>")
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
        """Return token IDs and their mask, both (B, 1, T), 0 for padding, which comes last; a long caption is cut."""
        texts = [f"{BEGIN}{caption}" for caption in captions]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.num_begin + self.max_tokens, verbose=False)
        rows = [[*ids, *self.end] for ids in encoded["input_ids"]]
        # The model was trained with padding before the end of the template. That padding was masked and took no
        # positions, so the states of the other tokens are the same. Which token pads is arbitrary.
        T = max(map(len, rows))
        ids_BT = torch.tensor([row + [self.end[0]] * (T - len(row)) for row in rows])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
        return Tokens((ids_BT[:, None], mask_BT[:, None]))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"hidden_state": (B, L, F), "attention_mask": (B, L)}; states of padding are 0."""
        (encoder,) = encoders
        ids_BT, mask_BT = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT)
        # The encoder's states overflow float16.
        with torch.autocast(next(encoder.parameters()).device.type, enabled=False):
            states_BTF = encode_layers(encoder, ids_BT, mask_BT, self.layers)
        mask_BL, states_BLF = mask_BT[:, self.num_begin :], states_BTF[:, self.num_begin :]
        is_text_BL1: Tensor = send(mask_BL, states_BLF.device)[..., None].bool()
        return {"hidden_state": torch.where(is_text_BL1, states_BLF, 0), "attention_mask": mask_BL}

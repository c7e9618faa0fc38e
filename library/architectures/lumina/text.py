"""Encoding of captions for Lumina Image 2.0: the states of Gemma 2.

Letters: B captions, T tokens, E width of the encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.architectures.lumina.gemma import BEGIN, PADDING, encode_gemma
from library.types import Conditioning, Tokens

PROMPT_START = " <Prompt Start> "  # between instruction and caption, as in the model's training
MULTIPLE = 8  # tensors are padded to a multiple of this many positions


@dataclass(frozen=True)
class LuminaText:
    """The text pipeline of Lumina Image 2.0: Gemma reads a caption after an instruction, which may be empty."""

    tokenizer: Any  # transformers' PreTrainedTokenizerFast
    num_tokens: int  # including the begin token and the instruction
    system_prompt: str = ""

    @property
    def max_tokens(self) -> int:
        return self.num_tokens - 1

    def count_tokens(self, caption: str) -> int:
        """Count the tokens of the caption and of the instruction before it."""
        return len(self.tokenize_caption(caption))

    def with_instruction(self, caption: str) -> str:
        """Prepend the instruction to a caption; an empty caption, which means no caption, stays empty."""
        return f"{self.system_prompt}{PROMPT_START}{caption}" if self.system_prompt and caption else caption

    def tokenize_caption(self, caption: str) -> list[int]:
        encoded = self.tokenizer(self.with_instruction(caption), add_special_tokens=False, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return IDs and their mask, both (B, 1, T), 0 for padding: the begin token, the caption, padding."""
        # As in sd-scripts' cache files.
        length = -(-self.num_tokens // MULTIPLE) * MULTIPLE
        begin, padding = self.tokenizer.convert_tokens_to_ids([BEGIN, PADDING])
        rows = [[begin, *self.tokenize_caption(caption)][: self.num_tokens] for caption in captions]
        ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows], dtype=torch.int64)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], dtype=torch.int64)
        return Tokens((ids[:, None], mask[:, None]))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"hidden_state": (B, T, E), "attention_mask": (B, T), "input_ids": (B, T)}. Gradients flow."""
        (gemma,) = encoders
        ids_BT, mask_BT = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT)
        states_BTE = encode_gemma(gemma, ids_BT, mask_BT)
        return {
            "hidden_state": states_BTE,
            "attention_mask": mask_BT,  # kept on the host
            "input_ids": ids_BT,  # only for the files of --cache_text_encoder_outputs_to_disk
        }

"""Captions to the conditioning of Lumina Image 2.0: the states of Gemma 2.

Letters: B captions, T tokens, E width of the encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.architectures.lumina.gemma import BEGIN, PADDING, encode_gemma
from library.types import Conditioning, Tokens

PROMPT_START = " <Prompt Start> "  # stands between the instruction and the caption; the model was trained so
MULTIPLE = 8  # of positions in a tensor


@dataclass(frozen=True)
class LuminaText:
    """What Gemma reads: an instruction, which may be empty, and the caption."""

    tokenizer: Any  # transformers' PreTrainedTokenizerFast
    num_tokens: int  # the begin token and the instruction are some of them
    system_prompt: str = ""

    @property
    def max_tokens(self) -> int:
        return self.num_tokens - 1

    def count_tokens(self, caption: str) -> int:
        """Tokens of the caption and of the instruction before it."""
        return len(self.ids_of(caption))

    def worded(self, caption: str) -> str:
        """The caption behind the instruction. An empty one, which stands for no caption, has none."""
        return f"{self.system_prompt}{PROMPT_START}{caption}" if self.system_prompt and caption else caption

    def ids_of(self, caption: str) -> list[int]:
        found = self.tokenizer(self.worded(caption), add_special_tokens=False, verbose=False)
        ids: list[int] = found["input_ids"]
        return ids

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Ids (B, 1, T) and which of them are no padding (B, 1, T): the begin token, the caption, padding."""
        length = -(-self.num_tokens // MULTIPLE) * MULTIPLE
        begin, padding = self.tokenizer.convert_tokens_to_ids([BEGIN, PADDING])
        rows = [[begin, *self.ids_of(caption)][: self.num_tokens] for caption in captions]
        ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows], dtype=torch.int64)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], dtype=torch.int64)
        return Tokens((ids[:, None], mask[:, None]))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """{"hidden_state": (B, T, E), "attention_mask": (B, T), "input_ids": (B, T)}. Gradients flow."""
        (gemma,) = encoders
        ids_BT, mask_BT = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT)
        states_BTE = encode_gemma(gemma, ids_BT, mask_BT)
        return {
            "hidden_state": states_BTE,
            "attention_mask": mask_BT,  # stays on the host
            "input_ids": ids_BT,  # only for the files of --cache_text_encoder_outputs_to_disk
        }

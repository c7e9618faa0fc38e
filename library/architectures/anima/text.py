"""Encoding of captions for Anima: Qwen3's states and T5's token IDs, which the denoiser's text adapter combines.

Letters: B captions, S Qwen3 tokens, L T5 tokens, E width of Qwen3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from torch import nn

from library.memory.devices import send
from library.models.qwen3 import encode_qwen3
from library.models.t5 import count_t5_tokens, tokenize_t5
from library.types import Conditioning, Tokens


@dataclass(frozen=True)
class AnimaText:
    """The text pipeline of Anima, whose two tokenizers read the same caption."""

    qwen3_tokenizer: Any  # transformers' Qwen2Tokenizer, padding on the right
    t5_tokenizer: Any  # transformers' T5TokenizerFast
    num_qwen3_tokens: int
    num_t5_tokens: int

    @property
    def max_tokens(self) -> int:
        return min(self.num_qwen3_tokens, self.num_t5_tokens - 1)  # without T5's end token

    def count_tokens(self, caption: str) -> int:
        """Count the tokens of a caption with both tokenizers, and return the larger number."""
        return max(count_t5_tokens(tokenizer, caption) for tokenizer in (self.qwen3_tokenizer, self.t5_tokenizer))

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return Qwen3's IDs and mask (B, 1, S), then T5's (B, 1, L); masks are 0 for padding."""
        encoded = self.qwen3_tokenizer(
            list(captions), max_length=self.num_qwen3_tokens, padding="max_length", truncation=True, return_tensors="pt"
        )
        ids_BS, mask_BS = encoded["input_ids"].long(), encoded["attention_mask"]
        ids_BL, mask_BL = tokenize_t5(self.t5_tokenizer, captions, self.num_t5_tokens)
        return Tokens(tuple(tokens[:, None] for tokens in (ids_BS, mask_BS, ids_BL, mask_BL)))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"prompt_embeds": (B, S, E), "attn_mask": (B, S), "t5_input_ids": (B, L), "t5_attn_mask": (B, L)}."""
        ids_BS, mask_BS, ids_BL, mask_BL = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT)
        states_BSE = encode_qwen3(encoders[0], ids_BS, mask_BS)
        device = states_BSE.device
        return {
            "prompt_embeds": states_BSE,
            "attn_mask": send(mask_BS, device),
            # 32 bits, as in sd-scripts' cache files.
            "t5_input_ids": send(ids_BL.int(), device),
            "t5_attn_mask": send(mask_BL.int(), device),
        }

    @property
    def identity(self) -> str:
        """A digest of everything that determines a caption's token IDs."""
        digest = blake2b(digest_size=16)
        for tokenizer in (self.qwen3_tokenizer, self.t5_tokenizer):
            digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
        return f"{digest.hexdigest()} {self.num_qwen3_tokens} {self.num_t5_tokens}"

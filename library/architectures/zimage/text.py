"""Encoding of captions for Z-Image: Qwen3's states of a caption in its chat template.

Letters: B captions, S tokens of the longest.
"""

from typing import Any

from torch import Tensor, nn

from library.models.language_models import ChatText
from library.models.qwen3 import BEGIN, END, encode_before_last_layer
from library.types import Conditioning

NUM_TOKENS = 512  # with the template
TEMPLATE = (f"{BEGIN}user\n", f"{END}\n{BEGIN}assistant\n")  # Qwen3's chat template with thinking enabled


def encode(encoder: nn.Module, ids_BS: Tensor, mask_BS: Tensor) -> Conditioning:
    """Return {"hidden_state": (B, S, width of the encoder), "attention_mask": (B, S)}, the mask on the host."""
    return {"hidden_state": encode_before_last_layer(encoder, ids_BS, mask_BS), "attention_mask": mask_BS}


def build_chat_text(tokenizer: Any) -> ChatText:
    """Build the text pipeline; `tokenizer` is transformers' Qwen2Tokenizer, padding on the right."""
    return ChatText(tokenizer, TEMPLATE, NUM_TOKENS, "longest", encode)

"""Encoding of captions for FLUX.2: three states of a language model for a caption inside its chat template.

Letters: B captions, S tokens.
"""

from typing import Any

from torch import Tensor, nn

from library.architectures.flux_2.releases import TextEncoder
from library.models.language_models import ChatText, encode_layers
from library.types import Conditioning

NUM_TOKENS = 512  # with the template and padding, to all of which the denoiser attends


def build_chat_text(encoder: TextEncoder, tokenizer: Any) -> ChatText:
    """Build the text pipeline; `tokenizer` is transformers', padding on the side that the encoder was trained with."""

    def encode(model: nn.Module, ids_BS: Tensor, mask_BS: Tensor) -> Conditioning:
        """Return {"hidden_state": (B, 512, width of three states)}.

        It includes padding, which attends to the caption and which the denoiser attends to.
        """
        return {"hidden_state": encode_layers(model, ids_BS, mask_BS, encoder.layers)}

    return ChatText(tokenizer, encoder.template, NUM_TOKENS, "max_length", encode, encoder.removed)

"""Encoding of captions for MOSS-Image: Qwen3.5's last states of a user's message with the caption, and with reference
images before it.

Letters: B captions, T tokens of the longest, E width of the encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from library.architectures.moss_image.qwen3_5 import HUB_NAME, encode_with_images
from library.base.determinism import deterministic_mode
from library.base.errors import error_in
from library.models.qwen3_vl_vision import SLOT, encode_captions, fit_images, join_rows, number_images
from library.types import Conditioning, Tokens, plain_caption

NUM_TOKENS = 4096  # with the template and reference images; longer captions are cut


@dataclass(frozen=True)
class MossImageText:
    """The text pipeline of MOSS-Image: captions in Qwen3.5's chat template, all of whose tokens reach the denoiser."""

    tokenizer: Any  # transformers'

    @property
    def max_tokens(self) -> int:
        return NUM_TOKENS - len(self.row("", ()))

    def count_tokens(self, caption: str) -> int:
        return len(self.ids(caption))

    def ids(self, text: str) -> list[int]:
        token_ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return token_ids

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return IDs and their mask, (B, 1, T), 0 for padding, and the images of each caption.

        Raises UserError for a caption that is too long for its reference images.
        """
        images = fit_images(captions)
        return join_rows([self.row(caption, shown) for caption, shown in zip(captions, images, strict=True)], images)

    def row(self, caption: str, images: Sequence[Tensor]) -> list[int]:
        """Return the token IDs of a caption in its template; truncation cuts a long caption and the template's end."""
        message = {"role": "user", "content": number_images(caption, images)}
        ids = self.ids(
            self.tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
        )
        if images and len(ids) > NUM_TOKENS:
            raise error_in("caption")(
                f"a caption and its {len(images)} reference images have {len(ids)} tokens, but the text encoder reads "
                f"{NUM_TOKENS}",
                f"shorten the caption: {plain_caption(caption)[:60]!r}",
            )
        return ids[:NUM_TOKENS]

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"hidden_state": (B, T, E), "attention_mask": (B, T)}, the mask on the host."""
        slot = self.tokenizer.convert_tokens_to_ids(SLOT)
        # Deterministic mode refuses the encoder's cumulative sums of 64 values, though torch adds those of rows in a
        # fixed order.
        with deterministic_mode(False):
            states_BTE = encode_captions(encoders, tokens, slot, HUB_NAME, encode_with_images)
        return {"hidden_state": states_BTE, "attention_mask": tokens.ids_BLT[1][:, 0]}

"""Encoding of captions for FLUX.3 Image Klein: eight states of Qwen3-VL for each token of a caption in its template.

Letters: B captions, S tokens of the longest, L tokens of the longest window, F values of all states of a token.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from library.memory.devices import send
from library.models.language_models import ChatText
from library.types import Conditioning

NUM_TOKENS = 4096  # most that the denoiser gets, with the template; the planner counts as many
WINDOW = 80  # captions are padded to multiples, and the denoiser attends to that padding
TEMPLATE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
LAYERS = (4, 8, 12, 16, 20, 24, 28, 32)  # layers whose states are used; later ones are not loaded


def build_text(tokenizer: Any) -> ChatText:
    """Build the text pipeline; `tokenizer` is transformers', which pads on the right."""
    encode = partial(encode_windows, pad_id=tokenizer.pad_token_id)
    return ChatText(tokenizer, TEMPLATE, NUM_TOKENS, "longest", encode)


def encode_windows(encoder: nn.Module, ids_BS: Tensor, mask_BS: Tensor, pad_id: int) -> Conditioning:
    """Return {"hidden_state": (B, L, F), "attention_mask": (B, L)}, the mask 1 inside each caption's window and on the
    host, states outside of it 0."""
    windows_B = ((mask_BS.sum(1) + WINDOW - 1) // WINDOW * WINDOW).clamp(max=NUM_TOKENS)
    L = int(windows_B.max())
    padding = (0, L - ids_BS.shape[1])
    ids_BL, mask_BL = pad(ids_BS, padding, value=pad_id), pad(mask_BS, padding)
    # transformers' releases place padding differently; the model was trained with all of it at 1.
    places_BL = torch.arange(L).masked_fill(mask_BL == 0, 1)
    device = next(encoder.parameters()).device
    outputs = encoder(
        send(ids_BL, device),
        attention_mask=send(mask_BL, device),
        position_ids=send(places_BL, device),
        output_hidden_states=True,
    )
    is_inside_BL = torch.arange(L) < windows_B[:, None]
    states_BLF = torch.cat([outputs.hidden_states[layer] for layer in LAYERS], dim=-1)
    inside_BLF = torch.where(send(is_inside_BL, device)[..., None], states_BLF, 0)
    return {"hidden_state": inside_BLF, "attention_mask": is_inside_BL.long()}

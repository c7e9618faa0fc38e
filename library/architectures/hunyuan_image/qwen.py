"""The text encoder of HunyuanImage 2.1: the language model of Qwen2.5-VL (transformers), from a file or a folder.

The states before the last two layers are used, so these layers and the last norm are not loaded. Letters: B captions, T
tokens, E width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.base.errors import UserError, error_in, of_file
from library.checkpoints.weights import Weights, configure, list_first_names, select_weights
from library.memory.devices import send
from library.models.language_models import DESCRIBE, PREFIXES, WORDS, extract_decoder, remove_last_norm
from library.models.loading import Component, empty_transformers_model, load_component
from library.models.shapes import Shapes, count, shape_of
from library.models.tokenizer_files import BYTE_PAIR_FILES, TokenizerFiles, holds_byte_pairs

HUB_NAME = "Qwen/Qwen2.5-VL-7B-Instruct"
TOKENIZER = TokenizerFiles(
    HUB_NAME,
    BYTE_PAIR_FILES,
    holds_byte_pairs,
    "Qwen2.5-VL",
    "tokenizer.json and tokenizer_config.json",
    "Qwen2TokenizerFast",
)
HEAD_WIDTH = 128
ROPE_BASE = 1_000_000
EPS = 1e-6
NUM_UNUSED_LAYERS = 2
TEMPLATE = f"{DESCRIBE}{{}}<|im_end|>"
NUM_TEMPLATE_TOKENS = 34  # before the caption


def qwen_component(weights: Weights, config: Mapping[str, Any] | None = None) -> Component:
    """Build the encoder's component under the module paths of transformers' Qwen2_5_VLTextModel; `config` is a
    folder's.

    Raises UserError naming the file if it holds something else.
    """
    decoder = extract_decoder(weights, PREFIXES)
    # Qwen3 has the same names, but no biases.
    if decoder is None or "layers.0.self_attn.q_proj.bias" not in decoder.shapes:
        raise of_file(weights.origin)(f"is not a Qwen2.5-VL text encoder (first names: {list_first_names(weights)})")
    weights = decoder
    num_layers = count(weights.shapes, r"layers\.(\d+)\.") - NUM_UNUSED_LAYERS
    if num_layers < 1:
        raise of_file(weights.origin)(f"has {num_layers + NUM_UNUSED_LAYERS} layers; Qwen2.5-VL 7B has 28")
    kept = [key for key in weights.shapes if key == WORDS or is_used(key, num_layers)]
    weights = select_weights(weights, {key: key for key in kept})
    folder_config = dict(config or {})
    return Component(
        configure(weights, lambda shapes: qwen_config(shapes, folder_config.get("text_config", folder_config))), weights
    )


def is_used(key: str, num_layers: int) -> bool:
    return key.startswith("layers.") and int(key.split(".")[1]) < num_layers


def qwen_config(shapes: Shapes, folder_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of transformers' Qwen2_5_VLTextConfig; `folder_config` is a folder's, or empty."""
    vocab, width = shape_of(shapes, WORDS)
    num_keys = shape_of(shapes, "layers.0.self_attn.k_proj.weight")[0]
    # Tiny models have narrower heads than 128, which only a folder's configuration says.
    num_heads = folder_config.get("num_attention_heads") or max(width // HEAD_WIDTH, 1)
    head_width = width // num_heads
    if num_heads * head_width != width or num_keys % head_width:
        raise UserError(f"width {width} with {num_heads} heads and keys of {num_keys}; Qwen2.5-VL has heads of 128")
    num_spatial_pairs = head_width // 2 - head_width // 8
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, "layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": count(shapes, r"layers\.(\d+)\."),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_keys // head_width,
        "rms_norm_eps": EPS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": ROPE_BASE,
            # Without images the three positions of a token are equal, so any sections give the same angles.
            "mrope_section": [head_width // 8, num_spatial_pairs // 2, num_spatial_pairs - num_spatial_pairs // 2],
        },
        "bos_token_id": None,  # used only for text generation
        "eos_token_id": None,
    }


def empty_qwen(config: Mapping[str, Any]) -> nn.Module:
    """Build transformers' Qwen2_5_VLTextModel without its last norm and with weights on the meta device."""
    return remove_last_norm(empty_transformers_model("qwen2_5_vl", "Qwen2_5_VLText", config))


load_qwen = partial(load_component, empty_qwen)


def encode_qwen(encoder: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the states after the last loaded layer, without those of the template's beginning, (B, T - 34, E)."""
    device = next(encoder.parameters()).device
    states_BTE: Tensor = encoder(send(ids_BT, device), attention_mask=send(mask_BT, device)).last_hidden_state
    return states_BTE[:, NUM_TEMPLATE_TOKENS:]


def tokenize_qwen(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Return (IDs, mask) of captions in the template, both (B, T), padded on the right; padding has mask 0."""
    # Not `format`, which would read braces in captions.
    texts = [TEMPLATE.replace("{}", caption) for caption in captions]
    length = max_tokens + NUM_TEMPLATE_TOKENS
    encoded = tokenizer(texts, max_length=length, padding="longest", truncation=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def load_qwen_tokenizer(folders: Sequence[Path], cache_dir: str | None, num_words: int | None) -> Any:
    """Load Qwen2.5-VL's tokenizer, padding on the right, as described at `TokenizerFiles.load`.

    Raises UserError for another model's tokenizer, which encodes the template in another number of tokens.
    """
    tokenizer = TOKENIZER.load(folders, cache_dir, num_words, padding_side="right")
    num_tokens = len(tokenizer(TEMPLATE.partition("{}")[0])["input_ids"])
    if num_tokens != NUM_TEMPLATE_TOKENS:
        raise error_in(path=tokenizer.name_or_path)(
            f"the tokenizer {tokenizer.name_or_path} encodes the system prompt in {num_tokens} tokens instead of "
            f"{NUM_TEMPLATE_TOKENS}: it belongs to another model",
            f"replace it with {HUB_NAME}'s",
        )
    return tokenizer

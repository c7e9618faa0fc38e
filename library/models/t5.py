"""T5 text encoders (v1.1, gated) as transformers' T5EncoderModel, from files in its layout or from a folder.

A `Component` of such an encoder has the module paths of transformers, the word embedding only as "shared.weight".

Letters: B captions, T tokens, W width.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import of_file
from library.checkpoints.weights import Weights, configure, find_prefix, list_first_names, select_weights, with_prefix
from library.memory.devices import send
from library.models.loading import Component, MaybeComponent, materialise, text_encoder_dtype
from library.models.shapes import Shapes, count, shape_of
from library.models.tokenizer_files import TokenizerFiles

T5_XXL_NAMES = ("text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "")  # possible prefixes in files
WORDS = ("shared.weight", "encoder.embed_tokens.weight")  # two names of one tensor; files have either or both
T5_BLOCKS = ("T5Attention", "T5DenseGatedActDense")  # classes whose linear layers adapters target
T5_LINEAR = (
    *(f"layer.0.SelfAttention.{name}" for name in ("q", "k", "v", "o")),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)
DISTANCE = 128  # relative positions beyond it share one bucket


def t5_component(weights: Weights) -> Component:
    """Build a text encoder's component from a single file. Raises UserError naming the file for anything else."""
    weights = with_prefix(weights, find_prefix(weights.shapes, T5_XXL_NAMES))
    if not any(name in weights.shapes for name in WORDS) or "encoder.final_layer_norm.weight" not in weights.shapes:
        first = list_first_names(weights)
        raise of_file(weights.origin)(f"is not a T5 encoder: no {WORDS[0]} or no final norm (first names: {first})")
    weights = with_one_embedding(weights)
    return Component(configure(weights, t5_config), weights)


def t5_of_folder(config: Mapping[str, Any], weights: Weights) -> Component:
    """Build a text encoder's component from a diffusers folder."""
    return Component(config, with_one_embedding(weights))


def with_one_embedding(weights: Weights) -> Weights:
    """Keep the encoder's weights with the word embedding under one name; a decoder is dropped."""
    words = next((name for name in WORDS if name in weights.shapes), None)
    names = {key: key for key in weights.shapes if key.startswith("encoder.") and key not in WORDS}
    return select_weights(weights, names if words is None else {WORDS[0]: words, **names})


def t5_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of transformers' T5Config."""
    vocab, width = shape_of(shapes, WORDS[0])
    buckets, num_heads = shape_of(shapes, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    is_gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes
    return {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": shape_of(shapes, "encoder.block.0.layer.0.SelfAttention.q.weight")[0] // num_heads,
        "d_ff": shape_of(shapes, "encoder.block.0.layer.1.DenseReluDense.wo.weight")[1],
        "num_layers": count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": num_heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": DISTANCE,
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
        "layer_norm_epsilon": 1e-6,
    }


def empty_t5(config: Mapping[str, Any]) -> Any:
    """Build transformers' T5EncoderModel on the meta device; both names of the word embedding are one module."""
    from transformers import T5Config, T5EncoderModel

    # T5's own dropout would act whenever a module is in train mode.
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict({**config, "dropout_rate": 0.0}))
    model.encoder.embed_tokens = model.shared  # transformers 5 makes two, which would take twice the memory
    return model


def precisions(dtype: torch.dtype) -> str:
    """Name the precisions of CLIP's and T5's features, for the identity of their caches."""
    return str(dtype) if text_encoder_dtype(dtype) == dtype else f"{dtype}, T5 {text_encoder_dtype(dtype)}"


def load_t5(component: MaybeComponent, dtype: torch.dtype) -> nn.Module:
    """Load the encoder with its weights in `text_encoder_dtype(dtype)`, frozen, on the CPU."""
    model: Any = empty_t5(component.config)
    # The module's state has the shared embedding under both names.
    names = {WORDS[1]: WORDS[0]} | {key: key for key in component.weights.shapes}
    return materialise(model, select_weights(component.weights, names), text_encoder_dtype(dtype))


def encode_t5(encoder: nn.Module, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Return the last states, after the final norm, BTW; tokens whose mask is 0 are not attended to.

    Under autocast to float16 the encoder runs in bfloat16, see `text_encoder_dtype`.
    """
    device = next(encoder.parameters()).device
    mask = None if mask_BT is None else send(mask_BT, device)
    device_type = device.type
    is_float16 = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
    with torch.autocast(device_type, torch.bfloat16) if is_float16 else nullcontext():
        hidden_BTW: Tensor = encoder(send(ids_BT, device), attention_mask=mask).last_hidden_state
    return hidden_BTW


def tokenize_t5(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Return (IDs, mask) of shape (B, length): a caption's tokens, the end token, padding; the mask is 0 for
    padding."""
    encoding = tokenizer(list(captions), max_length=length, padding="max_length", truncation=True, return_tensors="pt")
    return encoding["input_ids"], encoding["attention_mask"]


def count_t5_tokens(tokenizer: Any, caption: str) -> int:
    """Count the tokens of a caption without the end token."""
    return len(tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"])


def holds_t5_tokenizer(folder: Path) -> bool:
    """Return True if a folder has the files of T5's tokenizer."""
    is_t5 = (folder / "spiece.model").is_file()
    # Folders of byte-pair tokenizers, such as CLIP's, have a tokenizer.json too, beside merges.txt.
    return is_t5 or ((folder / "tokenizer.json").is_file() and not (folder / "merges.txt").is_file())


TOKENIZER = TokenizerFiles(
    "google/t5-v1_1-xxl",
    ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    holds_t5_tokenizer,
    "T5",
    "tokenizer.json (or spiece.model)",
    "T5TokenizerFast",
)
load_t5_tokenizer = TOKENIZER.load

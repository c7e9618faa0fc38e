"""T5 text encoders: every file layout matches transformers with the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from library.checkpoints.quantised import open_checkpoint
from library.models.t5 import TOKENIZER, encode_t5, load_t5, load_t5_tokenizer, t5_component, t5_of_folder, tokenize_t5
from tests.tiny.flux import T5, write_t5_tokenizer
from tests.tiny.init import fixed_init
from tests.tolerances import FLOAT32_DEEP

IDS_BT = torch.tensor([[5, 6, 7, 1, 0, 0], [9, 3, 1, 0, 0, 0]])
MASK_BT = (IDS_BT != 0).long()


@pytest.fixture(scope="module")
def t5_state() -> dict[str, Tensor]:
    """Return weights with the embedding under one of its two names only."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**T5, vocab_size=20))
    return {name: tensor for name, tensor in fixed_init(model, 4).items() if name != "encoder.embed_tokens.weight"}


def reference(t5_state: dict[str, Tensor], mask_BT: Tensor | None) -> Tensor:
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(**T5, vocab_size=20)).eval()
    model.load_state_dict({**t5_state, "encoder.embed_tokens.weight": t5_state["shared.weight"]})
    hidden: Tensor = model(IDS_BT, attention_mask=mask_BT).last_hidden_state
    return hidden


def load_from_file(tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "t5.safetensors")
    return load_t5(t5_component(open_checkpoint(folder / "t5.safetensors")), dtype)


@pytest.mark.parametrize("mask_BT", [None, MASK_BT], ids=["all", "masked"])
@pytest.mark.parametrize("embedding_name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_a_file_with_either_embedding_name_matches_transformers(
    t5_state: dict[str, Tensor], tmp_path: Path, embedding_name: str, mask_BT: Tensor | None
) -> None:
    tensors = {embedding_name if name == "shared.weight" else name: tensor for name, tensor in t5_state.items()}
    model = load_from_file(tensors, tmp_path)
    torch.testing.assert_close(encode_t5(model, IDS_BT, mask_BT), reference(t5_state, mask_BT), **FLOAT32_DEEP)
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_a_folder_matches_transformers(t5_state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(t5_state, tmp_path / "model.safetensors")
    component = t5_of_folder({**T5, "vocab_size": 20}, open_checkpoint(tmp_path / "model.safetensors"))
    model = load_t5(component, torch.float32)
    torch.testing.assert_close(encode_t5(model, IDS_BT, None), reference(t5_state, None), **FLOAT32_DEEP)


def test_the_decoder_of_a_full_model_is_ignored(t5_state: dict[str, Tensor], tmp_path: Path) -> None:
    full_state = {
        **t5_state,
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2),
        "lm_head.weight": torch.ones(2),
    }
    torch.testing.assert_close(
        encode_t5(load_from_file(full_state, tmp_path), IDS_BT, None), reference(t5_state, None), **FLOAT32_DEEP
    )


@pytest.mark.parametrize("has_scales", [False, True], ids=["plain", "scaled"])
def test_fp8_files_match_their_dequantised_values(
    t5_state: dict[str, Tensor], tmp_path: Path, has_scales: bool
) -> None:
    stored: dict[str, Tensor] = {}
    dequantised: dict[str, Tensor] = {}
    for name, tensor in t5_state.items():
        is_linear = tensor.ndim == 2 and name != "shared.weight" and "relative_attention_bias" not in name
        if has_scales and not is_linear:
            stored[name] = dequantised[name] = tensor
            continue
        scale = tensor.abs().max() / 448 if has_scales else torch.tensor(1.0)
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        dequantised[name] = stored[name].float() * scale
        if has_scales:
            stored[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
    if has_scales:
        stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    model = load_from_file(stored, tmp_path)
    torch.testing.assert_close(encode_t5(model, IDS_BT, None), reference(dequantised, None), **FLOAT32_DEEP)


def test_dropout_is_off_in_train_mode(t5_state: dict[str, Tensor], tmp_path: Path) -> None:
    """--gradient_checkpointing puts a trained encoder in train mode, where T5's dropout would make it noisy."""
    model = load_from_file(t5_state, tmp_path).train()
    assert torch.equal(encode_t5(model, IDS_BT, None), encode_t5(model, IDS_BT, None))


def test_a_file_that_is_not_t5_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t5.safetensors is not a T5 encoder: .* \(first names: thing.weight\)"):
        load_from_file({"thing.weight": torch.ones(2, 2)}, tmp_path)


def test_captions_are_truncated_so_that_they_end_with_the_end_token(tmp_path: Path) -> None:
    num_words = write_t5_tokenizer(tmp_path / "tokenizer_2")
    tokenizer = load_t5_tokenizer([tmp_path / "tokenizer_2"], None, num_words)
    ids_BT, mask_BT = tokenize_t5(tokenizer, ["a red cat", "", "dog " * 20], 6)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert ids_BT.shape == mask_BT.shape == (3, 6)
    assert ids_BT[:, -1].tolist() == [pad, pad, end] and ids_BT[1].tolist() == [end, *[pad] * 5]
    assert mask_BT.sum(1).tolist() == [4, 1, 6]


def test_a_tokenizer_is_loaded_from_the_first_folder_that_has_one(tmp_path: Path) -> None:
    write_t5_tokenizer(tmp_path / "cache" / "google_t5-v1_1-xxl")
    (tmp_path / "clip").mkdir()
    for name in ("tokenizer.json", "merges.txt"):  # CLIP's files
        (tmp_path / "clip" / name).write_text(json.dumps({}))
    folders = [tmp_path / "nothing", tmp_path / "clip"]
    assert TOKENIZER.find(folders, str(tmp_path / "cache")) == tmp_path / "cache" / "google_t5-v1_1-xxl"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write_t5_tokenizer(tmp_path / "tokenizer_2")
    with pytest.raises(ValueError, match="T5 has 3 embeddings: it belongs to another model"):
        load_t5_tokenizer([tmp_path / "tokenizer_2"], None, 3)


def test_float16_runs_keep_t5_in_bfloat16(t5_state: dict[str, Tensor], tmp_path: Path) -> None:
    """T5's hidden states exceed 65504, here because of a large output matrix in the first feed-forward layer."""
    large = {**t5_state, "encoder.block.0.layer.1.DenseReluDense.wo.weight": torch.full((32, 48), 3e5)}
    model = load_from_file(large, tmp_path, torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        with torch.autocast("cpu", torch.float16):
            actual = encode_t5(model, IDS_BT, MASK_BT)
        assert not model.half()(IDS_BT, attention_mask=MASK_BT).last_hidden_state.isfinite().all()
        expected = reference(large, MASK_BT)
    assert actual.dtype == torch.bfloat16 and actual.isfinite().all()
    is_caption = MASK_BT.bool()
    torch.testing.assert_close(actual.float()[is_caption], expected[is_caption], rtol=0.05, atol=0.05)

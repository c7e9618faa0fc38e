"""T5 text encoders: any file gives what transformers makes of the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from library.checkpoints.quantised import open_checkpoint
from library.models.t5 import (
    TOKENIZER,
    encode_t5,
    load_t5,
    load_t5_tokenizer,
    t5_component,
    t5_of_folder,
    tokenize_t5,
)
from tests.tiny.flux import T5, write_t5_tokenizer
from tests.tiny.init import fixed_init
from tests.tolerances import FLOAT32_DEEP

IDS_BT = torch.tensor([[5, 6, 7, 1, 0, 0], [9, 3, 1, 0, 0, 0]])
MASK_BT = (IDS_BT != 0).long()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights without the second name of the embedding."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**T5, vocab_size=20))
    return {name: tensor for name, tensor in fixed_init(model, 4).items() if name != "encoder.embed_tokens.weight"}


def reference(state: dict[str, Tensor], mask_BT: Tensor | None) -> Tensor:
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(**T5, vocab_size=20)).eval()
    model.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]})
    hidden: Tensor = model(IDS_BT, attention_mask=mask_BT).last_hidden_state
    return hidden


def loaded(tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "t5.safetensors")
    return load_t5(t5_component(open_checkpoint(folder / "t5.safetensors")), dtype)


@pytest.mark.parametrize("mask_BT", [None, MASK_BT], ids=["all", "masked"])
@pytest.mark.parametrize("words", ["shared.weight", "encoder.embed_tokens.weight"])
def test_a_file_with_either_embedding_gives_what_transformers_does(
    state: dict[str, Tensor], tmp_path: Path, words: str, mask_BT: Tensor | None
) -> None:
    tensors = {words if name == "shared.weight" else name: tensor for name, tensor in state.items()}
    model = loaded(tensors, tmp_path)
    torch.testing.assert_close(encode_t5(model, IDS_BT, mask_BT), reference(state, mask_BT), **FLOAT32_DEEP)
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_a_folder_gives_the_same(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "model.safetensors")
    component = t5_of_folder({**T5, "vocab_size": 20}, open_checkpoint(tmp_path / "model.safetensors"))
    model = load_t5(component, torch.float32)
    torch.testing.assert_close(encode_t5(model, IDS_BT, None), reference(state, None), **FLOAT32_DEEP)


def test_the_decoder_of_a_whole_model_is_left_out(state: dict[str, Tensor], tmp_path: Path) -> None:
    whole = {
        **state,
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2),
        "lm_head.weight": torch.ones(2),
    }
    torch.testing.assert_close(encode_t5(loaded(whole, tmp_path), IDS_BT, None), reference(state, None), **FLOAT32_DEEP)


@pytest.mark.parametrize("has_scales", [False, True], ids=["plain", "scaled"])
def test_fp8_files_give_what_their_values_say(state: dict[str, Tensor], tmp_path: Path, has_scales: bool) -> None:
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in state.items():
        is_linear = tensor.ndim == 2 and name != "shared.weight" and "relative_attention_bias" not in name
        if has_scales and not is_linear:
            stored[name] = meant[name] = tensor
            continue
        scale = tensor.abs().max() / 448 if has_scales else torch.tensor(1.0)
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        meant[name] = stored[name].float() * scale
        if has_scales:
            stored[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
    if has_scales:
        stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    model = loaded(stored, tmp_path)
    torch.testing.assert_close(encode_t5(model, IDS_BT, None), reference(meant, None), **FLOAT32_DEEP)


def test_nothing_is_dropped_in_train_mode(state: dict[str, Tensor], tmp_path: Path) -> None:
    """--gradient_checkpointing puts a trained encoder into train mode; T5's own dropout would make it noisy."""
    model = loaded(state, tmp_path).train()
    assert torch.equal(encode_t5(model, IDS_BT, None), encode_t5(model, IDS_BT, None))


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t5.safetensors is not a T5 encoder: .* \(first names: thing.weight\)"):
        loaded({"thing.weight": torch.ones(2, 2)}, tmp_path)


def test_captions_end_with_the_end_token_and_are_cut_before_it(tmp_path: Path) -> None:
    num_words = write_t5_tokenizer(tmp_path / "tokenizer_2")
    tokenizer = load_t5_tokenizer([tmp_path / "tokenizer_2"], None, num_words)
    ids_BT, mask_BT = tokenize_t5(tokenizer, ["a red cat", "", "dog " * 20], 6)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert ids_BT.shape == mask_BT.shape == (3, 6)
    assert ids_BT[:, -1].tolist() == [pad, pad, end] and ids_BT[1].tolist() == [end, *[pad] * 5]
    assert mask_BT.sum(1).tolist() == [4, 1, 6]


def test_a_tokenizer_is_taken_from_the_first_place_that_has_one(tmp_path: Path) -> None:
    write_t5_tokenizer(tmp_path / "cache" / "google_t5-v1_1-xxl")
    (tmp_path / "clip").mkdir()
    for name in ("tokenizer.json", "merges.txt"):  # CLIP's
        (tmp_path / "clip" / name).write_text(json.dumps({}))
    folders = [tmp_path / "nothing", tmp_path / "clip"]
    assert TOKENIZER.find(folders, str(tmp_path / "cache")) == tmp_path / "cache" / "google_t5-v1_1-xxl"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write_t5_tokenizer(tmp_path / "tokenizer_2")
    with pytest.raises(ValueError, match="T5 has 3 embeddings: it belongs to another model"):
        load_t5_tokenizer([tmp_path / "tokenizer_2"], None, 3)


def test_float16_runs_keep_t5_in_bfloat16(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Its hidden states exceed 65504, here by a large output matrix of the first feed-forward layer."""
    large = {**state, "encoder.block.0.layer.1.DenseReluDense.wo.weight": torch.full((32, 48), 3e5)}
    model = loaded(large, tmp_path, torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        with torch.autocast("cpu", torch.float16):
            found = encode_t5(model, IDS_BT, MASK_BT)
        assert not model.half()(IDS_BT, attention_mask=MASK_BT).last_hidden_state.isfinite().all()
        wanted = reference(large, MASK_BT)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    kept = MASK_BT.bool()
    torch.testing.assert_close(found.float()[kept], wanted[kept], rtol=0.05, atol=0.05)

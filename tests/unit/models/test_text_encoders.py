"""Text encoders against transformers: T5, Qwen3-VL, and the emphasis notation."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from library.base.errors import UserError
from library.checkpoints.model_lookup import open_model
from library.checkpoints.quantised import open_checkpoint
from library.checkpoints.weights import Weights
from library.models.clip.emphasis import parse_emphasis
from library.models.language_models import choose_load, encode_layers, with_first_layers
from library.models.qwen3 import FOLDER, Qwen3Release, qwen3_component
from library.models.qwen3_vl import load_qwen3_vl, qwen3_vl_component, qwen3_vl_config
from library.models.t5 import TOKENIZER, encode_t5, load_t5, load_t5_tokenizer, t5_component, t5_of_folder, tokenize_t5
from tests.tiny.flux import T5, write_t5_tokenizer
from tests.tiny.init import fixed_init
from tests.tiny.qwen3_vl import tiny_qwen3_vl
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


# Qwen3-VL's language model gives the hidden states of transformers' full model, from every layout of its file.

RELEASE = Qwen3Release("--text_encoder", "Qwen/Qwen3-VL-4B-Instruct", "text_encoders.qwen3vl_4b.transformer.model.")
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def full_model() -> Any:
    """Return transformers' full model, including the vision model, with random weights."""
    return tiny_qwen3_vl(3, NUM_TOKENS)


def save_component(
    full_model: Any, folder: Path, prefix: str = "model.language_model.", vision: str = "model.visual."
) -> Any:
    state = {prefix + key: tensor for key, tensor in full_model.language_model.state_dict().items()}
    state |= {vision + key: tensor for key, tensor in full_model.visual.state_dict().items()}
    save_file({**state, "lm_head.weight": torch.ones(NUM_TOKENS, 2)}, folder / "qwen3vl.safetensors")
    return open_component(str(folder / "qwen3vl.safetensors"))


def open_component(name: str) -> Any:
    config, weights = open_model(RELEASE.flag, name, FOLDER)
    return qwen3_vl_component(weights, config, RELEASE)


def compute_states(encoder: Any, layers: tuple[int, ...], ids: Tensor) -> Tensor:
    return encode_layers(encoder, ids, torch.ones_like(ids), layers)


@pytest.mark.parametrize(
    ("prefix", "vision"),
    [
        ("model.language_model.", "model.visual."),
        ("language_model.model.", "visual."),
        ("model.", "visual."),
        ("language_model.", "visual."),
        (RELEASE.prefix, "text_encoders.qwen3vl_4b.transformer.visual."),
    ],
)
def test_states_match_the_full_model_under_every_prefix(
    full_model: Any, tmp_path: Path, prefix: str, vision: str
) -> None:
    ids = torch.randint(NUM_TOKENS, (2, 9), generator=torch.Generator().manual_seed(1))
    actual = compute_states(
        load_qwen3_vl(save_component(full_model, tmp_path, prefix, vision), torch.float32), (0, 2, 3), ids
    )
    expected = full_model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(actual, torch.cat([expected[layer] for layer in (0, 2, 3)], dim=-1), **FLOAT32_DEEP)


def test_the_last_hidden_state_is_before_the_final_norm(full_model: Any, tmp_path: Path) -> None:
    ids = torch.randint(NUM_TOKENS, (1, 7), generator=torch.Generator().manual_seed(2))
    norm_inputs: list[Tensor] = []
    with full_model.language_model.norm.register_forward_pre_hook(lambda norm, inputs: norm_inputs.append(inputs[0])):
        full_model(ids)
    encoder: Any = load_qwen3_vl(save_component(full_model, tmp_path), torch.float32)
    torch.testing.assert_close(compute_states(encoder, (4,), ids), norm_inputs[0], **FLOAT32_DEEP)
    torch.testing.assert_close(encoder(ids).last_hidden_state, norm_inputs[0], **FLOAT32_DEEP)


def test_later_layers_are_not_needed(full_model: Any, tmp_path: Path) -> None:
    ids = torch.arange(6)[None]
    short = with_first_layers(save_component(full_model, tmp_path), 3, RELEASE.flag)
    encoder: Any = load_qwen3_vl(short, torch.float32)
    assert len(encoder.layers) == 3
    expected = full_model(ids, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(compute_states(encoder, (3,), ids), expected, **FLOAT32_DEEP)


def test_folders_and_sharded_files_are_read(full_model: Any, tmp_path: Path) -> None:
    full_model.save_pretrained(str(tmp_path / "folder"), max_shard_size="20kB")
    shards = sorted((tmp_path / "folder").glob("model-00001-of-*.safetensors"))
    expected = save_component(full_model, tmp_path).weights
    for name in (str(tmp_path / "folder"), str(shards[0])):
        actual = open_component(name).weights
        assert set(actual.shapes) == set(expected.shapes)
        assert all(torch.equal(actual.read(key), expected.read(key)) for key in actual.shapes)


def test_the_language_model_may_be_kept_in_8_bits(full_model: Any, tmp_path: Path) -> None:
    ids = torch.arange(8)[None]
    expected, actual = (
        compute_states(
            choose_load(load_qwen3_vl, "Qwen3-VL", in_8_bits)(save_component(full_model, tmp_path), torch.float32),
            (4,),
            ids,
        )
        for in_8_bits in (False, True)
    )
    assert not torch.equal(actual, expected)
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=-1).min() > 0.95


def test_the_rope_settings_match_the_published_model() -> None:
    shapes = {"embed_tokens.weight": (9, 64), "layers.0.self_attn.q_norm.weight": (128,)}
    shapes |= {f"layers.0.self_attn.{name}_proj.weight": (256, 64) for name in "qk"}
    config = qwen3_vl_config({**shapes, "layers.0.mlp.gate_proj.weight": (80, 64)})
    assert (config["rope_theta"], config["rms_norm_eps"]) == (5_000_000, 1e-6)
    assert config["rope_scaling"] == {"rope_type": "default", "mrope_section": [24, 20, 20]}


def test_other_models_are_refused(full_model: Any, tmp_path: Path) -> None:
    weights = save_component(full_model, tmp_path).weights
    without_norms = {key: shape for key, shape in weights.shapes.items() if "q_norm" not in key}
    with pytest.raises(UserError, match=r"--text_encoder a is not a Qwen3-VL text encoder .*use Qwen/Qwen3-VL-4B-Inst"):
        qwen3_vl_component(Weights("a", without_norms, weights.read), None, RELEASE)
    with pytest.raises(UserError, match=r"is not a Qwen3-VL text encoder \(qwen3's\)"):
        qwen3_vl_component(weights, {"model_type": "qwen3"}, RELEASE)
    with pytest.raises(UserError, match="is not a Qwen3 text encoder"):
        qwen3_component(open_model("--text_encoder", str(tmp_path / "qwen3vl.safetensors"), FOLDER)[1], RELEASE)


def test_a_file_that_may_be_qwen3_is_warned_about(full_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    state = fixed_init(full_model.language_model, 3)
    weights = Weights("b", {key: tuple(tensor.shape) for key, tensor in state.items()}, state.__getitem__)
    with caplog.at_level(logging.WARNING):
        qwen3_vl_component(weights, None, RELEASE)
    assert "--text_encoder b has no vision model. If it is Qwen3, which" in caplog.text


# Parsing of the emphasis notation in captions.

CASES = {
    "a cat": [("a cat", 1.0)],
    "a (red) cat": [("a ", 1.0), ("red", 1.1), (" cat", 1.0)],
    "a ((red)) cat": [("a ", 1.0), ("red", 1.1 * 1.1), (" cat", 1.0)],
    "a (red:1.3) cat": [("a ", 1.0), ("red", 1.3), (" cat", 1.0)],
    "a (red : .5 ) cat": [("a ", 1.0), ("red ", 0.5), (" cat", 1.0)],
    "[dull] cat": [("dull", 1 / 1.1), (" cat", 1.0)],
    "(a [b] c:2)": [("a ", 2.0), ("b", 2 / 1.1), (" c", 2.0)],
    "(a (b:1.5) c)": [("a ", 1.1), ("b", 1.5 * 1.1), (" c", 1.1)],
    r"a \(film\) \[x\] \\": [("a (film) [x] \\", 1.0)],
    "never (closed [here": [("never ", 1.0), ("closed ", 1.1), ("here", 1.1 / 1.1)],
    "never) opened]": [("never) opened]", 1.0)],
    "ratio 16:9": [("ratio 16:9", 1.0)],
    "smile :) :1.5)": [("smile :) :1.5)", 1.0)],
    "[square:1.5] stays": [("square:1.5", 1 / 1.1), (" stays", 1.0)],
    "": [],
    "()": [],
}


@pytest.mark.parametrize("caption", CASES)
def test_a_caption_is_split_into_weighted_pieces(caption):
    actual, expected = parse_emphasis(caption), CASES[caption]
    assert [text for text, _ in actual] == [text for text, _ in expected]
    assert [weight for _, weight in actual] == pytest.approx([weight for _, weight in expected], rel=1e-12)


@given(st.text(alphabet="ab ,:.1()[]\\"))
def test_only_notation_is_removed_from_the_text(caption):
    text_of_pieces = "".join(text for text, _ in parse_emphasis(caption))
    assert [c for c in text_of_pieces if c in "ab ,"] == [c for c in caption if c in "ab ,"] or ":" in caption


@given(st.text(alphabet="ab ,é:.1"))
def test_a_caption_without_brackets_is_one_piece_of_weight_1(caption):
    assert parse_emphasis(caption) == ([(caption, 1.0)] if caption else [])

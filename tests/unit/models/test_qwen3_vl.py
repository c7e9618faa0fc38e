"""Qwen3-VL's language model gives the hidden states of transformers' full model, from every layout of its file."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from library.base.errors import UserError
from library.checkpoints.model_lookup import open_model
from library.checkpoints.weights import Weights
from library.models.language_models import choose_load, encode_layers, with_first_layers
from library.models.qwen3 import FOLDER, Qwen3Release, qwen3_component
from library.models.qwen3_vl import load_qwen3_vl, qwen3_vl_component, qwen3_vl_config
from tests.tiny.init import fixed_init
from tests.tiny.qwen3_vl import tiny_qwen3_vl
from tests.tolerances import FLOAT32_DEEP

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

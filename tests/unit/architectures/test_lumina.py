"""Lumina Image 2.0: text encoders and captions."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.architectures.lumina import gemma
from library.architectures.lumina.gemma import find_gemma_tokenizer, load_gemma_tokenizer
from library.architectures.lumina.text import LuminaText
from tests.running import tiny_model
from tests.tiny.lumina import build_tiny_lumina
from tests.tolerances import EXACT, FLOAT32_SAME_MATH
from tests.unit.architectures.test_dit_files import open_tiny

tiny = tiny_model("lumina", 3)


def test_a_folder_of_another_text_encoder_is_refused(tiny: list[str], tmp_path: Path) -> None:
    build_tiny_lumina(tmp_path / "folder", 4, "diffusers")
    config = tmp_path / "folder" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "gemma3_text"}))
    index = tiny.index("--gemma2") + 1
    with pytest.raises(ValueError, match=r"^--gemma2 .* config.json names model_type 'gemma3_text'"):
        open_tiny("lumina", [*tiny[:index], str(config.parent)])


def test_a_tokenizer_of_another_model_is_refused(tiny: list[str], tmp_path: Path) -> None:
    folder = Path(tiny[1]).parent / "tokenizer"
    with pytest.raises(ValueError, match=r"has token IDs up to \d+, but Gemma has 7 embeddings: it belongs to an"):
        load_gemma_tokenizer([folder], None, num_words=7)
    text = (folder / "tokenizer.json").read_text().replace("<bos>", "<cls>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="has no <bos>: it belongs to another model"):
        load_gemma_tokenizer([tmp_path], None, num_words=1000)


# Captions of Lumina Image 2.0: the tokens that Gemma reads and the hidden states that the denoiser receives.

BEGIN, PADDING = 2, 0


@pytest.fixture(scope="module")
def text(tiny: list[str]) -> LuminaText:
    tokenizer = load_gemma_tokenizer([Path(tiny[1]).parent / "tokenizer"], None, 1000)
    return LuminaText(tokenizer, num_tokens=20)


def test_a_caption_follows_the_begin_token_and_precedes_padding(text: LuminaText) -> None:
    ids, mask = (tensor[:, 0] for tensor in text.tokenize(["red cat", "", "dog" * 40]).ids_BLT)
    assert ids.shape == mask.shape == (3, 24)  # a multiple of 8; the caption ends at 20
    caption_ids = text.tokenize_caption("red cat")
    assert ids[0].tolist() == [BEGIN, *caption_ids, *[PADDING] * (23 - len(caption_ids))]
    assert mask.sum(1).tolist() == [1 + len(caption_ids), 1, 20]
    assert text.count_tokens("red cat") == len(caption_ids)
    assert ids[2, :20].tolist() == [BEGIN, *text.tokenize_caption("dog" * 40)[:19]] and not mask[2, 20:].any()


def test_the_system_prompt_precedes_captions_that_are_not_empty(text: LuminaText) -> None:
    instructed = replace(text, system_prompt="be good", num_tokens=64)
    assert instructed.with_instruction("a cat") == "be good <Prompt Start> a cat"
    assert instructed.with_instruction("") == ""
    (ids, _), (plain, _) = (
        instructed.tokenize(["a cat"]).ids_BLT,
        replace(text, num_tokens=64).tokenize(["a cat"]).ids_BLT,
    )
    assert not torch.equal(ids, plain)
    assert instructed.count_tokens("a cat") == text.count_tokens("be good <Prompt Start> a cat")
    for actual, expected in zip(
        instructed.tokenize([""]).ids_BLT, replace(text, num_tokens=64).tokenize([""]).ids_BLT, strict=True
    ):
        assert torch.equal(actual, expected)


def test_the_denoiser_gets_the_input_of_the_last_layer(tiny: list[str], text: LuminaText) -> None:
    (encoder,) = open_tiny("lumina", tiny).text_encoders()
    seen: list[torch.Tensor] = []
    last = encoder.layers[-1]  # type: ignore[index]
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features = text.encode([encoder], text.tokenize(["red cat", "a dog"]))
    handle.remove()
    torch.testing.assert_close(features["hidden_state"], seen[0], **EXACT)
    assert features["hidden_state"].shape == (2, 24, 32)


def test_gemma_caps_its_attention_logits_whatever_the_default_of_transformers(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Gemma2Model

    monkeypatch.setattr(Gemma2Model, "_supports_sdpa", True)  # as up to 5.0; sdpa does not cap
    (encoder,) = open_tiny("lumina", tiny).text_encoders()
    assert encoder.config._attn_implementation == "eager"  # type: ignore[union-attr]


def test_padding_does_not_change_the_states_of_a_caption(tiny: list[str], text: LuminaText) -> None:
    (encoder,) = open_tiny("lumina", tiny).text_encoders()
    few, many = replace(text, num_tokens=8), replace(text, num_tokens=40)
    short, long = (kind.encode([encoder], kind.tokenize(["red cat"])) for kind in (few, many))
    num = int(short["attention_mask"].sum())
    torch.testing.assert_close(short["hidden_state"][:, :num], long["hidden_state"][:, :num], **FLOAT32_SAME_MATH)


def test_the_tokenizer_is_found_where_sd_scripts_keeps_it(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(name: str, patterns: Sequence[str]) -> Path:
        raise ConnectionError("no network")

    monkeypatch.setattr(gemma, "fetch_snapshot", no_network)
    with pytest.raises(ValueError, match=r"no network.*Put tokenizer\.json of Gemma 2 into one of them, or into"):
        find_gemma_tokenizer([tmp_path / "tokenizer"], str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"and give --tokenizer_cache_dir <folder>$"):
        find_gemma_tokenizer([tmp_path / "tokenizer"], None)
    snapshot = tmp_path / "cache" / "models--google--gemma-2-2b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text("{}")
    assert find_gemma_tokenizer([tmp_path / "tokenizer"], str(tmp_path / "cache")) == snapshot / "tokenizer.json"


def test_a_downloaded_tokenizer_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []

    def succeed_on_the_second(name: str, patterns: Sequence[str]) -> Path:
        requests.append(name)
        if name != "google/gemma-2-2b":
            raise ConnectionError("gone")
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / "tokenizer.json").write_text("{}")
        return tmp_path / "hub"

    monkeypatch.setattr(gemma, "fetch_snapshot", succeed_on_the_second)
    cache = tmp_path / "cache"
    assert find_gemma_tokenizer([tmp_path / "none"], str(cache)) == tmp_path / "hub" / "tokenizer.json"
    assert requests == ["Alpha-VLLM/Lumina-Image-2.0", "google/gemma-2-2b"]
    cached = find_gemma_tokenizer([tmp_path / "none"], str(cache))
    assert cached == cache / "Alpha-VLLM_Lumina-Image-2.0" / "tokenizer.json" and len(requests) == 2

"""SD 1.x text encoding against transformers and a literal recomputation of chunks and emphasis."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from library.architectures.sd.assembly import build
from library.options.model import ModelOptions
from library.options.train import TrainOptions
from tests.tolerances import EXACT, FLOAT32_DEEP

CAPTIONS = ["a red cat and a dog", "", "Ünïcödé 猫, 12%\n(round) [square]"]


def encode(folder: Path, captions: list[str], **model: object) -> Tensor:
    arch = build(TrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(folder), **model)))
    return arch.text.encode(arch.load.text_encoders(), arch.text.tokenize(captions))["hidden_state"]


@pytest.fixture(scope="module")
def theirs(tiny_sd_folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Load the same folder with transformers."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd_folder / "tokenizer")
    return tokenizer, CLIPTextModel.from_pretrained(tiny_sd_folder / "text_encoder").eval()


def their_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]


@torch.no_grad()
def test_the_last_hidden_state_matches_transformers(tiny_sd_folder, theirs):
    tokenizer, model = theirs
    wanted_BTW = model(their_ids(tokenizer, CAPTIONS)).last_hidden_state
    torch.testing.assert_close(encode(tiny_sd_folder, CAPTIONS), wanted_BTW, **EXACT)


@torch.no_grad()
def test_clip_skip_1_is_the_last_hidden_state(tiny_sd_folder):
    torch.testing.assert_close(encode(tiny_sd_folder, CAPTIONS, clip_skip=1), encode(tiny_sd_folder, CAPTIONS), **EXACT)


@torch.no_grad()
def test_clip_skip_2_is_the_penultimate_layer_with_the_final_norm(tiny_sd_folder, theirs):
    tokenizer, model = theirs
    states = model(their_ids(tokenizer, CAPTIONS), output_hidden_states=True).hidden_states
    wanted_BTW = model.final_layer_norm(states[-2])
    torch.testing.assert_close(encode(tiny_sd_folder, CAPTIONS, clip_skip=2), wanted_BTW, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize(("max_token_length", "num_positions"), [(150, 152), (225, 227)])
@pytest.mark.parametrize("num_words", [3, 75, 76, 140, 300])
def test_long_captions_are_encoded_in_chunks_and_joined(
    tiny_sd_folder, theirs, max_token_length, num_positions, num_words
):
    """Chunks of 75 tokens are each enclosed by begin and end tokens; only the first begin and last end are kept."""
    tokenizer, model = theirs
    caption = " ".join(["red", "cat", "and", "dog", "x"][i % 5] for i in range(num_words))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer(caption, add_special_tokens=False)["input_ids"][:max_token_length]
    assert len(ids) == min(num_words, max_token_length)
    ids += [end] * (max_token_length - len(ids))
    rows = []
    for start in range(0, max_token_length, 75):
        chunk = torch.tensor([[begin, *ids[start : start + 75], end]])
        hidden = model(chunk).last_hidden_state[0]
        for position in range(77):
            is_first_begin = position == 0 and start == 0
            is_last_end = position == 76 and start == max_token_length - 75
            if 1 <= position <= 75 or is_first_begin or is_last_end:
                rows.append(hidden[position])
    found_BTW = encode(tiny_sd_folder, [caption], max_token_length=max_token_length)
    assert found_BTW.shape == (1, num_positions, 32)
    torch.testing.assert_close(found_BTW[0], torch.stack(rows), **FLOAT32_DEEP)


@torch.no_grad()
def test_emphasis_scales_the_features_of_its_tokens(tiny_sd_folder, theirs):
    tokenizer, model = theirs
    plain_TW = model(their_ids(tokenizer, ["a red cat and dog x"])).last_hidden_state[0]
    factors_T = torch.ones(77)
    factors_T[2] = 1.1  # red
    factors_T[3] = 1.1 * 1.3  # cat
    factors_T[5] = 1 / 1.1  # dog
    found_BTW = encode(tiny_sd_folder, ["a (red (cat:1.3)) and [dog] x"], weighted_captions=True)
    torch.testing.assert_close(found_BTW[0], plain_TW * factors_T[:, None], **FLOAT32_DEEP)


@torch.no_grad()
def test_emphasis_on_a_long_caption_scales_all_but_begin_end_and_padding(tiny_sd_folder):
    caption = " ".join(["cat"] * 100)
    plain = encode(tiny_sd_folder, [caption], max_token_length=150)[0]
    weighted = encode(tiny_sd_folder, [f"({caption}:2)"], max_token_length=150, weighted_captions=True)[0]
    factors_T = torch.tensor([1.0] + [2.0] * 100 + [1.0] * 51)
    torch.testing.assert_close(weighted, plain * factors_T[:, None], **FLOAT32_DEEP)


@torch.no_grad()
def test_without_the_flag_brackets_are_plain_text(tiny_sd_folder):
    caption = ["a (red:1.3) cat"]
    with_flag, without = encode(tiny_sd_folder, caption, weighted_captions=True), encode(tiny_sd_folder, caption)
    assert not torch.allclose(with_flag, without)

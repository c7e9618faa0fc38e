"""SD 1.x captions: token ids, text encoder states and where the tokenizer is found."""

import shutil

import pytest
import torch

from library.models import tokenizer_files
from library.models.clip.tokenizer import TOKENIZER, load_tokenizer


def test_a_caption_is_wrapped_and_padded_with_the_end_token(open_sd, tiny_sd_folder):
    text = open_sd(tiny_sd_folder).text
    begin, end = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id
    (ids_BLT,) = text.tokenize(["red cat", ""]).ids_BLT
    cat, red = text.tokenizer.convert_tokens_to_ids(["cat</w>", "red</w>"])
    assert ids_BLT.shape == (2, 1, 77)
    assert ids_BLT[0, 0].tolist() == [begin, red, cat] + [end] * 74
    assert ids_BLT[1, 0].tolist() == [begin] + [end] * 76


@pytest.mark.parametrize(("max_token_length", "max_tokens"), [(None, 75), (150, 150), (225, 225)])
def test_long_captions_are_counted_in_full_and_truncated_at_the_limit(
    open_sd, tiny_sd_folder, max_token_length, max_tokens
):
    text = open_sd(tiny_sd_folder, max_token_length=max_token_length).text
    caption = " ".join(["cat"] * 400)
    assert (text.max_tokens, text.count_tokens(caption)) == (max_tokens, 400)
    (ids_BLT,) = text.tokenize([caption]).ids_BLT
    cat = text.tokenizer.convert_tokens_to_ids("cat</w>")
    assert ids_BLT.shape == (1, max_tokens // 75, 77)
    assert ids_BLT[0, :, 1:-1].flatten().tolist() == [cat] * max_tokens
    assert set(ids_BLT[0, :, 0].tolist()) == {text.tokenizer.bos_token_id}
    assert set(ids_BLT[0, :, -1].tolist()) == {text.tokenizer.eos_token_id}


def test_emphasis_notation_is_not_counted_as_tokens(open_sd, tiny_sd_folder):
    caption = "(red:1.4) [cat]"
    assert open_sd(tiny_sd_folder, weighted_captions=True).text.count_tokens(caption) == 2
    assert open_sd(tiny_sd_folder).text.count_tokens(caption) > 2


def test_emphasis_follows_its_token_into_the_next_chunk(open_sd, tiny_sd_folder):
    text = open_sd(tiny_sd_folder, weighted_captions=True, max_token_length=150).text
    tokens = text.tokenize([" ".join(["cat"] * 74) + " (red dog:1.5) and"])
    (weights_BLT,) = tokens.weights_BLT
    assert weights_BLT[0, 0].tolist() == [1.0] * 75 + [1.5, 1.0]
    assert weights_BLT[0, 1].tolist() == [1.0, 1.5] + [1.0] * 75


@pytest.mark.parametrize("clip_skip", [None, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_first_layer(open_sd, tiny_sd_folder, clip_skip, checkpointing):
    arch = open_sd(tiny_sd_folder, clip_skip=clip_skip)
    (encoder,) = arch.load.text_encoders()
    if checkpointing:
        encoder.train()
        encoder.gradient_checkpointing_enable()
    weight = encoder.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    arch.text.encode([encoder], arch.text.tokenize(["a dog"]))["hidden_state"].square().sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_clip_skip_2_leaves_the_last_layer_out(open_sd, tiny_sd_folder):
    arch = open_sd(tiny_sd_folder, clip_skip=2)
    (encoder,) = arch.load.text_encoders()
    tokens = arch.text.tokenize(["red dog"])
    before = arch.text.encode([encoder], tokens)["hidden_state"]
    encoder.encoder.layers[-1].mlp.fc2.weight.data += 1
    assert torch.equal(arch.text.encode([encoder], tokens)["hidden_state"], before)


def test_the_tokenizer_is_found_in_the_folder_or_next_to_the_file(tiny_sd_folder, tiny_sd_file):
    for model, folder in ((tiny_sd_folder, tiny_sd_folder), (tiny_sd_file, tiny_sd_file.parent)):
        assert load_tokenizer(model, None, 522).name_or_path == str(folder / "tokenizer")


def test_the_tokenizer_is_read_from_the_cache_folder(tiny_sd_file, tmp_path):
    cached = tmp_path / "cache" / "openai_clip-vit-large-patch14"
    cached.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny_sd_file.parent / "tokenizer" / name, cached)
    ids = load_tokenizer(tmp_path / "alone.safetensors", str(tmp_path / "cache"), 522)("a red cat")["input_ids"]
    assert ids == load_tokenizer(tiny_sd_file, None, 522)("a red cat")["input_ids"]


def test_a_downloaded_tokenizer_is_kept_in_the_cache_folder(tiny_sd_file, tmp_path, monkeypatch):
    requests = []

    def fetch(name, patterns):
        requests.append(name)
        return tiny_sd_file.parent / "tokenizer"

    monkeypatch.setattr(tokenizer_files, "fetch_snapshot", fetch)
    for _ in range(2):
        load_tokenizer(tmp_path / "alone.safetensors", str(tmp_path / "cache"), 522)
    assert requests == [TOKENIZER.hub_name]


def test_the_error_for_a_missing_tokenizer_says_which_files_to_put_where(tmp_path, monkeypatch):
    def fetch(name, patterns):
        raise ConnectionError("timed out")

    monkeypatch.setattr(tokenizer_files, "fetch_snapshot", fetch)
    with pytest.raises(ValueError, match=r"Put vocab.json and merges.txt") as error:
        load_tokenizer(tmp_path / "alone.safetensors", None, 522)
    message = str(error.value)
    assert str(tmp_path / "tokenizer") in message and "timed out" in message
    assert "<folder>/openai_clip-vit-large-patch14 and give --tokenizer_cache_dir <folder>" in message
    with pytest.raises(ValueError, match=r"Put vocab.json and merges.txt") as error:
        load_tokenizer(tmp_path / "alone.safetensors", str(tmp_path / "kept"), 522)
    assert str(tmp_path / "kept" / "openai_clip-vit-large-patch14") in str(error.value)


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused(open_sd, tiny_sd_file, tmp_path):
    """A tokenizer/ folder next to a single file may belong to another model."""
    import json

    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_sd_file.parent / "tokenizer", folder)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab["<|endoftext|>"] = 60_000
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    shutil.copy(tiny_sd_file, tmp_path)
    with pytest.raises(ValueError, match=r"has token IDs up to 60000, but CLIP has 522 embeddings"):
        open_sd(tmp_path / tiny_sd_file.name)

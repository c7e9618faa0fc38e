"""--caption: a tiny random Florence-2 writes text beside the photos that have none."""

from pathlib import Path

import pytest
import torch

from library.base.errors import UserError
from library.train_photos.captioner import write_captions
from library.train_photos.photos import find_photos
from tests.tiny.pipeline_parts import WORDS, tokenizer
from tests.train_photos.test_train import draw_photo


def build_tiny_captioner(folder: Path) -> str:
    from transformers import (
        BartConfig,
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
        Florence2VisionConfig,
        PreTrainedTokenizerFast,
    )

    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer()._tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<bos>",
        extra_special_tokens={"image_token": "<image>"},
    )
    sight = Florence2VisionConfig(
        depths=(1, 1, 1, 1), embed_dim=(8, 8, 8, 16), num_heads=(2, 2, 2, 2), num_groups=(2, 2, 2, 2), window_size=4,
        projection_dim=16,
    )  # fmt: skip
    text = BartConfig(
        vocab_size=WORDS, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=3,
        eos_token_id=1, decoder_start_token_id=3,
    )  # fmt: skip
    config = Florence2Config(
        text_config=text.to_dict(), vision_config=sight.to_dict(), image_token_id=words.image_token_id
    )
    torch.manual_seed(3)
    model = Florence2ForConditionalGeneration(config)
    model.generation_config.min_new_tokens, model.generation_config.forced_eos_token_id = 4, None
    model.generation_config.suppress_tokens = [*range(5), *range(99, WORDS)]  # neither blanks nor special tokens
    model.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    images = CLIPImageProcessor(size=size, crop_size=size, image_seq_length=5)
    Florence2Processor(images, words).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_captions_are_written_for_photos_without_one(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        draw_photo(number).save(photos / f"{number}.png")
    (photos / "0.txt").write_text("my own words")
    model = build_tiny_captioner(tmp_path / "captioner")
    assert write_captions(find_photos(photos), model) == 1
    assert (photos / "0.txt").read_text() == "my own words"
    assert (photos / "1.txt").read_text().strip()
    assert write_captions(find_photos(photos), model) == 0


def test_a_captioner_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    draw_photo(1).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"--caption: .*nowhere cannot be loaded"):
        write_captions(find_photos(tmp_path), str(tmp_path / "nowhere"))
    assert not (tmp_path / "a.txt").exists()

"""Text encoders and tokenizers of other models are refused for Lumina Image 2.0."""

import json
from pathlib import Path

import pytest

from library.architectures.lumina.gemma import load_gemma_tokenizer
from tests.tiny.lumina import build_tiny_lumina
from tests.unit.architectures.test_dit_files import open_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_lumina(tmp_path_factory.mktemp("lumina"), 3)


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

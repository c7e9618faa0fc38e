"""Lumina Image 2.0 models load alike in every layout; other files are refused with what they are and what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from library.architectures.lumina.gemma import load_gemma_tokenizer
from library.architectures.lumina.load import open_loader
from library.architectures.lumina.options import LuminaOptions
from library.models.dit_loader import DitLoader
from lumina_train_network import setup_parser
from tests.tiny.changes import assert_same_models, with_changes
from tests.tiny.lumina import build_tiny_lumina

BASE = "--pretrained_model_name_or_path"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_lumina(tmp_path_factory.mktemp("lumina"), 3)


def open_tiny(arguments: list[str]) -> DitLoader:
    return open_loader(LuminaOptions.from_args(setup_parser().parse_args(arguments)))


@pytest.mark.parametrize(
    ("flag", "changes", "message"),
    [
        (BASE, {"x_embedder.weight": torch.ones(72, 16)}, "takes 16 values per patch, but only 64"),
        (
            BASE,
            {"cap_embedder.1.weight": torch.ones(72, 48)},
            "32, but the transformer expects text features of width 48",
        ),
        (
            BASE,
            {"t_embedder.mlp.2.weight": None},
            "t_embedder.mlp.2.weight is missing; use a complete Lumina Image 2.0",
        ),
        (BASE, {"layers.0.attention.qkv.weight": torch.ones(80, 72)}, "heads of 12, 80 outputs of q, k and v"),
        (BASE, {"layers.0.attention.qkv.weight": None}, "it has no layers.0.attention.qkv.weight"),
        (
            "--ae",
            {"decoder.conv_in.weight": torch.ones(16, 4, 3, 3)},
            "has 4 latent channels, but Lumina Image 2.0 needs",
        ),
        ("--ae", {"decoder.conv_in.weight": None}, "is not a VAE: it has no decoder.conv_in.weight"),
        ("--gemma2", {"model.embed_tokens.weight": None}, "gemma_2_2b.safetensors is not a Gemma 2 text encoder"),
        ("--gemma2", {"model.layers.0.pre_feedforward_layernorm.weight": None}, "is not a Gemma 2 text encoder"),
        (
            "--gemma2",
            {"model.layers.0.self_attn.k_proj.weight": None},
            "gemma_2_2b.safetensors: layers.0.self_attn.k_proj.weight is missing",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_incompatible_file_is_refused_with_the_reason(
    tiny: list[str], tmp_path: Path, flag: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        open_tiny(with_changes(tiny, flag, tmp_path, changes))


@pytest.mark.parametrize("flag", ["--ae", "--gemma2"])
def test_the_error_for_a_missing_part_names_its_flag(tiny: list[str], flag: str) -> None:
    index = tiny.index(flag)
    with pytest.raises(ValueError, match=f"{flag} is missing"):
        open_tiny(tiny[:index] + tiny[index + 2 :])


@pytest.mark.parametrize("part", ["denoiser", "text_encoders"])
def test_a_missing_weight_is_reported_when_the_model_is_loaded(tiny: list[str], tmp_path: Path, part: str) -> None:
    flag, name = {
        "denoiser": (BASE, "layers.1.feed_forward.w2.weight"),
        "text_encoders": ("--gemma2", "model.layers.1.mlp.up_proj.weight"),
    }[part]
    loader = open_tiny(with_changes(tiny, flag, tmp_path, {name: None}))
    with pytest.raises(ValueError, match=f"is incomplete: 1 of the .* {name.removeprefix('model.')}"):
        getattr(loader, part)()


def test_every_layout_gives_the_same_models(tiny: list[str], tmp_path: Path) -> None:
    expected = open_tiny(tiny)
    for layout in ("whole", "diffusers"):
        actual = open_tiny(build_tiny_lumina(tmp_path / layout, 3, layout))  # type: ignore[arg-type]
        assert_same_models(actual, expected)


def test_parts_of_a_folder_can_be_replaced_by_files(tiny: list[str], tmp_path: Path) -> None:
    folder = build_tiny_lumina(tmp_path / "folder", 4, "diffusers")
    for name in ("vae", "text_encoder"):
        shutil.rmtree(tmp_path / "folder" / name)
    loader = open_tiny([*folder, *tiny[tiny.index("--ae") :]])
    expected = open_tiny(tiny).text_encoders()[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loader.text_encoders()[0].state_dict().items())


def test_a_folder_of_another_text_encoder_is_refused(tiny: list[str], tmp_path: Path) -> None:
    build_tiny_lumina(tmp_path / "folder", 4, "diffusers")
    config = tmp_path / "folder" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "gemma3_text"}))
    index = tiny.index("--gemma2") + 1
    with pytest.raises(ValueError, match=r"^--gemma2 .* config.json names model_type 'gemma3_text'"):
        open_tiny([*tiny[:index], str(config.parent)])


def test_models_are_loaded_frozen_and_in_the_precision_of_the_run(tiny: list[str]) -> None:
    loader = open_tiny([*tiny, "--mixed_precision", "bf16", "--no_half_vae"])
    assert {p.dtype for p in loader.denoiser().parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loader.vae().parameters()} == {torch.float32}
    (gemma,) = loader.text_encoders()
    assert not any(p.requires_grad for p in gemma.parameters())
    assert not any(buffer.is_meta for buffer in gemma.buffers())


def test_a_tokenizer_of_another_model_is_refused(tiny: list[str], tmp_path: Path) -> None:
    folder = Path(tiny[1]).parent / "tokenizer"
    with pytest.raises(ValueError, match=r"has token IDs up to \d+, but Gemma has 7 embeddings: it belongs to an"):
        load_gemma_tokenizer([folder], None, num_words=7)
    text = (folder / "tokenizer.json").read_text().replace("<bos>", "<cls>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="has no <bos>: it belongs to another model"):
        load_gemma_tokenizer([tmp_path], None, num_words=1000)

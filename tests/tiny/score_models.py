"""Tiny random models that score images, saved as transformers saves them."""

from pathlib import Path
from typing import Any

from tests.tiny.init import fixed_init
from tests.tiny.sd import write_tokenizer

SIDE = 28  # of the images that they see
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}


def save(model: Any, seed: int, folder: Path) -> None:
    model.load_state_dict(fixed_init(model, seed))
    model.save_pretrained(folder)


def write_dinov2(folder: Path) -> Path:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(hidden_size=16, image_size=SIDE, patch_size=14, **LAYERS))
    save(model, 3, folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": SIDE, "width": SIDE}}
    BitImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], **sizes).save_pretrained(
        folder
    )
    return folder


def write_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    num_words = write_tokenizer(folder)
    text = {
        "vocab_size": num_words,
        "hidden_size": 16,
        "intermediate_size": 32,
        "bos_token_id": num_words - 2,
        "eos_token_id": num_words - 1,
        **LAYERS,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "image_size": SIDE, "patch_size": 14, **LAYERS}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    save(CLIPModel(config), 4, folder)
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder

"""Names and shapes of full-size text encoders of FLUX.2, Krea 2 and Z-Image."""

import pytest

from library.architectures.flux_2.mistral import empty_mistral
from library.architectures.flux_2.releases import DEV, KLEIN_4B, KLEIN_9B, Release
from library.architectures.krea2.load import FILES as KREA_2
from library.architectures.krea2.text import LAYERS
from library.architectures.zimage.load import FILES as Z_IMAGE
from library.models.qwen3 import empty_qwen3
from library.models.qwen3_vl import empty_qwen3_vl
from tests.contracts.full_size import shapes_of_model, weights_of_shapes
from tests.tiny import flux_2 as tiny
from tests.tiny.flux_2 import full_size_encoder
from tests.tiny.krea2 import FULL_SIZE, full_size_qwen3_vl
from tests.tiny.zimage import full_size_qwen3


@pytest.mark.parametrize(
    ("release", "prefix"),
    [(DEV, p) for p in ("", "model.", "language_model.model.", "model.language_model.", DEV.encoder.model.prefix)]
    + [(r, p) for r in (KLEIN_4B, KLEIN_9B) for p in ("", "model.", r.encoder.model.prefix)],
    ids=lambda value: value.name if isinstance(value, Release) else value,
)
def test_the_used_text_encoder_layers_load_with_every_prefix(release: Release, prefix: str) -> None:
    shapes = shapes_of_model(full_size_encoder(release.name))
    num_layers = release.encoder.layers[-1]
    expected = {k: s for k, s in shapes.items() if not k.startswith("layers.") or int(k.split(".")[1]) < num_layers}
    weights = weights_of_shapes({prefix + name: shape for name, shape in shapes.items()})
    component = release.encoder.model.open(None, weights)
    empty = empty_mistral if release is DEV else empty_qwen3
    assert shapes_of_model(empty(component.config)) == expected
    assert component.config["hidden_size"] * len(release.encoder.layers) == release.text_width
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": num_layers}
    assert heads.items() <= component.config.items()


def test_mistral_has_no_sliding_window() -> None:
    config = {**tiny.MISTRAL, "vocab_size": 8, "num_hidden_layers": 1}
    assert empty_mistral(config).config.sliding_window is None


def test_the_used_layers_of_krea_2s_text_encoder_load() -> None:
    shapes = shapes_of_model(full_size_qwen3_vl())
    expected = {k: s for k, s in shapes.items() if not k.startswith("layers.35.")}
    names = {f"model.language_model.{name}": shape for name, shape in shapes.items()}
    weights = weights_of_shapes({**names, "model.visual.pos_embed.weight": (2304, 1024)})
    component = KREA_2.encoder.open(None, weights)
    assert shapes_of_model(empty_qwen3_vl(component.config)) == expected
    assert component.config["hidden_size"] == FULL_SIZE.fusion.width and len(LAYERS) == FULL_SIZE.num_states
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 35}
    assert heads.items() <= component.config.items()


@pytest.mark.parametrize("prefix", [Z_IMAGE.encoder.prefix, "model.", ""])
def test_qwen3_4b_loads_with_every_prefix(prefix: str) -> None:
    expected = shapes_of_model(full_size_qwen3())
    weights = weights_of_shapes({prefix + name: shape for name, shape in expected.items()})
    component = Z_IMAGE.encoder.open(None, weights)
    assert shapes_of_model(empty_qwen3(component.config)) == expected
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 36}
    assert heads.items() <= component.config.items()

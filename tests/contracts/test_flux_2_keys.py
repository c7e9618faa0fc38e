"""Names and shapes of full-size FLUX.2 files, checked with the converters of diffusers."""

import pytest

from library.architectures.flux_2.mistral import empty_mistral
from library.architectures.flux_2.releases import DEV, KLEIN_4B, KLEIN_9B, Release
from tests.contracts.full_size import shapes_of_model, weights_of_shapes
from tests.tiny import flux_2 as tiny
from tests.tiny.flux_2 import full_size_encoder


@pytest.mark.parametrize(
    ("release", "prefix"),
    [(DEV, p) for p in ("", "model.", "language_model.model.", "model.language_model.", DEV.encoder.prefix)]
    + [(r, p) for r in (KLEIN_4B, KLEIN_9B) for p in ("", "model.", r.encoder.prefix)],
    ids=lambda value: value.name if isinstance(value, Release) else value,
)
def test_the_used_text_encoder_layers_load_with_every_prefix(release: Release, prefix: str) -> None:
    shapes = shapes_of_model(full_size_encoder(release.name))
    num_layers = release.encoder.layers[-1]
    expected = {k: s for k, s in shapes.items() if not k.startswith("layers.") or int(k.split(".")[1]) < num_layers}
    component = release.encoder.open(weights_of_shapes({prefix + name: shape for name, shape in shapes.items()}))
    assert shapes_of_model(release.encoder.empty(component.config)) == expected
    assert component.config["hidden_size"] * len(release.encoder.layers) == release.text_width
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": num_layers}
    assert heads.items() <= component.config.items()


def test_mistral_has_no_sliding_window() -> None:
    config = {**tiny.MISTRAL, "vocab_size": 8, "num_hidden_layers": 1}
    assert empty_mistral(config).config.sliding_window is None

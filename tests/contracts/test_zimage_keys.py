"""Names and shapes of full-size Z-Image files, checked with the converters of diffusers."""

import pytest

from library.architectures.zimage.load import QWEN3
from library.models.qwen3 import empty_qwen3, qwen3_component
from tests.contracts.full_size import shapes_of_model, weights_of_shapes
from tests.tiny.zimage import full_size_qwen3


@pytest.mark.parametrize("prefix", QWEN3.prefixes)
def test_qwen3_4b_loads_with_every_prefix(prefix: str) -> None:
    expected = shapes_of_model(full_size_qwen3())
    component = qwen3_component(weights_of_shapes({prefix + name: shape for name, shape in expected.items()}), QWEN3)
    assert shapes_of_model(empty_qwen3(component.config)) == expected
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 36}
    assert heads.items() <= component.config.items()

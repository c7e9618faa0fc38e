"""Names and shapes of full-size Krea 2 files, checked with the converters of diffusers."""

from library.architectures.krea2.load import QWEN3_VL
from library.architectures.krea2.text import LAYERS
from library.models.language_models import with_first_layers
from library.models.qwen3_vl import empty_qwen3_vl, qwen3_vl_component
from tests.contracts.full_size import shapes_of_model, weights_of_shapes
from tests.tiny.krea2 import FULL_SIZE, full_size_qwen3_vl


def test_the_used_text_encoder_layers_load() -> None:
    shapes = shapes_of_model(full_size_qwen3_vl())
    expected = {k: s for k, s in shapes.items() if not k.startswith("layers.35.")}
    names = {f"model.language_model.{name}": shape for name, shape in shapes.items()}
    weights = weights_of_shapes({**names, "model.visual.pos_embed.weight": (2304, 1024)})
    component = with_first_layers(qwen3_vl_component(weights, None, QWEN3_VL), LAYERS[-1], QWEN3_VL.flag)
    assert shapes_of_model(empty_qwen3_vl(component.config)) == expected
    assert component.config["hidden_size"] == FULL_SIZE.fusion.width and len(LAYERS) == FULL_SIZE.num_states
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 35}
    assert heads.items() <= component.config.items()

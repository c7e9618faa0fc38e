"""The names and shapes of the full-size checkpoints of Stable Diffusion 3 and 3.5 are a contract."""

import pytest
import torch

from library.architectures.sd3.model import MMDiT, read_config
from tests.tiny.sd3 import full_size_keys

FACTS = full_size_keys()
PARAMETERS = {"sd3-medium": 2_084_951_104, "sd3.5-medium": 2_469_663_936, "sd3.5-large": 8_146_280_768}


@pytest.mark.parametrize("name", FACTS["mmdit"])
def test_the_denoiser_has_exactly_the_weights_of_the_checkpoint(name: str) -> None:
    expected = {key: tuple(shape) for key, shape in FACTS["mmdit"][name].items()}
    with torch.device("meta"):
        model = MMDiT(read_config(expected))
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == expected
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == PARAMETERS[name]


def test_hyperparameters_are_inferred_from_shapes() -> None:
    configs = {name: read_config({k: tuple(s) for k, s in keys.items()}) for name, keys in FACTS["mmdit"].items()}
    medium, medium_5, large = (configs[name] for name in ("sd3-medium", "sd3.5-medium", "sd3.5-large"))
    assert (medium.width, medium.depth, medium.head_width, medium.positions_side) == (1536, 24, 64, 192)
    assert (medium_5.width, medium_5.depth, medium_5.head_width, medium_5.positions_side) == (1536, 24, 64, 384)
    assert (large.width, large.depth, large.head_width, large.positions_side) == (2432, 38, 64, 192)
    assert [c.norms_queries for c in (medium, medium_5, large)] == [False, True, True]
    assert [c.dual_attention for c in (medium, medium_5, large)] == [set(), set(range(13)), set()]


def test_a_checkpoint_with_a_missing_part_raises_an_error_that_names_it() -> None:
    keys = {key: tuple(shape) for key, shape in FACTS["mmdit"]["sd3-medium"].items()}
    with pytest.raises(ValueError, match=r"y_embedder\.mlp\.0\.weight is missing; use a complete SD3"):
        read_config({key: shape for key, shape in keys.items() if "y_embedder" not in key})
    with pytest.raises(ValueError, match=r"its joint_blocks are numbered \[0, 2, 3"):
        read_config({key: shape for key, shape in keys.items() if not key.startswith("joint_blocks.1.")})

"""LyCORIS finds the layers of Stable Diffusion 2.1 and XL in our views, at full size, and names them as files do."""

import pytest
import torch

from tests.contracts.full_size import facts, view_for_networks
from tests.tiers import first_is_fast

kohya = pytest.importorskip("lycoris.kohya")


@pytest.mark.parametrize("model", first_is_fast(["sd21", "sdxl"]))
def test_its_modules_have_the_names_of_a_plain_lora(model: str) -> None:
    with torch.device("meta"):
        network = kohya.create_network(1.0, 4, 1, None, *view_for_networks(model), algo="lora", preset="attn-mlp")
    wanted = {key.partition(".")[0] for key in facts(f"lora_keys_{model}")["networks.lora"]["default"]}
    assert {module.lora_name for module in network.loras} == wanted


def test_its_default_preset_fits() -> None:
    """LyCORIS 4 lists the timestep embedding layers and their diffusers class."""
    with torch.device("meta"):
        network = kohya.create_network(1.0, 4, 1, None, *view_for_networks("sd21"), algo="lora", conv_dim="4")
    names = [module.lora_name.removeprefix("lora_unet_") for module in network.loras]
    assert {"conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2"} <= set(names)
    assert len(names) == len(set(names))

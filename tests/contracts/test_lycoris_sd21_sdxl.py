"""LyCORIS finds the layers of Stable Diffusion 2.1 and XL in our views, at full size, and names them as files do."""

import pytest
import torch

from tests.contracts.full_size import facts, seen_by_networks

kohya = pytest.importorskip("lycoris.kohya")


TIME = {"lora_unet_time_embedding_linear_1", "lora_unet_time_embedding_linear_2"}  # its preset knows diffusers' class


@pytest.mark.parametrize(("model", "more"), [("sd21", TIME), ("sdxl", set())])
def test_its_modules_have_the_names_of_a_plain_lora(model: str, more: set[str]) -> None:
    with torch.device("meta"):
        network = kohya.create_network(1.0, 4, 1, None, *seen_by_networks(model), algo="lora", preset="attn-mlp")
    wanted = {key.partition(".")[0] for key in facts(f"lora_keys_{model}")["networks.lora"]["default"]}
    assert {module.lora_name for module in network.loras} == wanted | more

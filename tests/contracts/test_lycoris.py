"""LyCORIS works as a third-party network module on the view of a U-Net."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.sd.layers import view
from library.base.errors import UserError
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from networks.core.protocol import AdoptedNetwork, adopt, open_network_module
from tests.contracts.full_size import facts, view_for_networks
from tests.hiding import lazily
from tests.parity.test_dit_lora import tiny_clip, tiny_unet
from tests.tiers import first_is_fast
from tests.tolerances import FLOAT32_DEEP

diffusers, kohya = lazily("diffusers"), lazily("lycoris.kohya")


LOKR = {"algo": "lokr", "preset": "attn-mlp", "factor": "4", "dropout": None}


@pytest.fixture
def models() -> tuple[Any, tuple[nn.Module | list[nn.Module], nn.Module]]:
    unet = tiny_unet(501, torch.float32)
    return unet, view([tiny_clip(502, torch.float32)], unet)


def build_lokr(viewed: tuple[Any, nn.Module], seed: int) -> AdoptedNetwork:
    torch.manual_seed(seed)
    module = open_network_module("lycoris.kohya")
    network = adopt(module.create_network(1.0, 2, 1.0, None, *viewed, neuron_dropout=None, **LOKR))  # type: ignore[arg-type]
    network.apply_to(*viewed, True, True)
    return network


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(503)
    yield torch.randn(2, 4, 8, 8), torch.tensor([3, 777]), torch.randn(2, 5, 32)


def test_lokr_trains_and_its_file_restores_the_trained_model(models: Any, tmp_path: Path) -> None:
    unet, viewed = models
    batch = next(batches())
    base = unet(*batch).sample
    network = build_lokr(viewed, 504)
    groups, names = network.parameter_groups([1e-2], None, 1e-2)
    assert len(groups) >= 2 and (names is None or len(names) == len(groups))
    optimizer = torch.optim.AdamW(groups)
    network.prepare_gradients(*viewed)
    losses = []
    for _ in range(5):
        network.start_epoch(*viewed)
        network.start_step(*viewed)
        loss = unet(*batch).sample.sub(1).square().mean()
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.trainable_parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    network.module.eval()
    trained = unet(*batch).sample
    assert (trained - base).abs().max() > 1e-3

    path = tmp_path / "lokr.safetensors"
    network.save_weights(path, None, {"ss_steps": "5"})
    assert [p.name for p in tmp_path.iterdir()] == ["lokr.safetensors"]
    assert read_metadata(path)["ss_steps"] == "5"
    keys = load_state_dict(path)
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lokr_") for key in keys)
    assert any(
        key.startswith("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lokr_") for key in keys
    )

    fresh = tiny_unet(501, torch.float32)
    again = build_lokr(view([tiny_clip(502, torch.float32)], fresh), 505)
    assert not torch.allclose(fresh(*batch).sample, trained, atol=1e-4)
    again.load_weights(path)
    again.module.eval()
    torch.testing.assert_close(fresh(*batch).sample, trained, **FLOAT32_DEEP)


def test_a_multiplier_of_0_disables_lokr(models: Any) -> None:
    unet, viewed = models
    batch = next(batches())
    base = unet(*batch).sample
    network = build_lokr(viewed, 506)
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert not torch.allclose(unet(*batch).sample, base, atol=1e-4)
    network.set_multiplier(0.0)
    torch.testing.assert_close(unet(*batch).sample, base, **FLOAT32_DEEP)


def test_the_error_for_an_unsuitable_preset_suggests_one_that_fits() -> None:
    module = open_network_module("lycoris.kohya")
    unet = tiny_unet(507, torch.float32)
    with pytest.raises(ValueError, match=r"lycoris\.kohya cannot make a network .*preset=attn-mlp"):
        module.create_network(1.0, 2, 1.0, None, None, unet, algo="lokr", preset="full")  # type: ignore[arg-type]


def test_a_rank_that_does_not_fit_the_model_is_a_user_error(models: Any) -> None:
    """Front ends pass a conv_dim of 1 to LyCORIS's BOFT, which fits few layers."""
    _, viewed = models
    module = open_network_module("lycoris.kohya")
    with pytest.raises(UserError, match=r"lycoris\.kohya cannot make a network .*check --network_dim"):
        module.create_network(1.0, 4, 1.0, None, *viewed, algo="boft", preset="full", conv_dim="1")  # type: ignore[arg-type]


# LyCORIS finds the layers of Stable Diffusion 2.1 and XL in our views, at full size, and names them as files do.


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

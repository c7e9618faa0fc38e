"""New adapters of networks.oft and networks.oft_flux: placement, outputs and files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.architectures.sd.layers import view
from library.base.errors import UserError
from networks import oft, oft_flux
from networks.core.network.network import AdapterNetwork
from tests.parity.test_lora_merge import tiny_clip, tiny_unet
from tests.tiny.flux import tiny_flux
from tests.tolerances import FLOAT32_DEEP


def on_sd(seed: int, blocks: int = 4, alpha: float = 1e-3, **arguments: str) -> tuple[AdapterNetwork, Any]:
    models = view([tiny_clip(seed, torch.float32)], tiny_unet(seed, torch.float32))
    return oft.create_network(1.0, blocks, alpha, None, *models, **arguments), models


def test_only_attention_layers_are_adapted_unless_all_are_requested() -> None:
    names = {name.partition(".")[0] for name in on_sd(701)[0].state_dict()}
    assert names and all("_attn1_" in name or "_attn2_" in name for name in names)
    every = {name.partition(".")[0] for name in on_sd(701, enable_all_linear="True")[0].state_dict()}
    assert names < every and any("_ff_net_" in name for name in every - names)
    conv = {name.partition(".")[0] for name in on_sd(701, enable_conv="True")[0].state_dict()}
    assert (
        names < conv and any(name.endswith("_conv1") for name in conv) and not any("_ff_net_" in name for name in conv)
    )
    assert not any(name.startswith("lora_te") for name in every | conv)


def test_fused_projections_of_flux_are_rotated_separately() -> None:
    network = oft_flux.create_network(1.0, 4, 1e-3, None, [], tiny_flux(702), enable_all_linear="True")
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    width = tiny_flux(702).double_blocks[0].img_attn.qkv.in_features
    rest = tiny_flux(702).single_blocks[0].linear1.out_features - 3 * width
    qkv, linear1 = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"
    assert [shapes[f"{qkv}.oft_blocks.{i}"] for i in range(3)] == [[4, width // 4, width // 4]] * 3
    assert shapes[f"{linear1}.oft_blocks.3"] == [4, rest // 4, rest // 4] and f"{qkv}.oft_blocks.3" not in shapes
    alone = oft_flux.create_network(1.0, 4, 1e-3, None, [], tiny_flux(702))
    assert {name.split("_")[2] for name in alone.state_dict()} == {"double"}


def rotate(weight: Tensor, blocks_Dbb: Tensor, limit: float) -> Tensor:
    """Return the rotated weight by definition, in float64: each block of rows times (1 + Q) / (1 - Q)."""
    skew = (blocks_Dbb - blocks_Dbb.mT).double()
    skew = skew * min(1.0, limit * len(weight) / float(skew.norm()))
    identity = torch.eye(skew.shape[1], dtype=torch.float64)
    rotations_Dbb = (identity + skew) @ torch.linalg.inv(identity - skew)
    rows = weight.double().unflatten(0, blocks_Dbb.shape[:2])
    return torch.einsum("knm,knp->kmp", rotations_Dbb, rows).flatten(0, 1)


@pytest.mark.parametrize("alpha", [1e-3, 10.0])
def test_angles_rotate_the_rows_of_a_weight_within_the_limit(alpha: float) -> None:
    network, (_, unet) = on_sd(703, alpha=alpha)
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    network.apply_to(None, unet, False, True)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(705))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    blocks = network.get_parameter("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.oft_blocks")
    with torch.no_grad():
        blocks.normal_(generator=torch.Generator().manual_seed(706))
    expected = nn.functional.linear(x.double(), rotate(layer.weight.detach(), blocks.detach(), alpha))
    torch.testing.assert_close(layer(x).double(), expected, **FLOAT32_DEEP)


def test_a_saved_network_is_trained_further(tmp_path: Path) -> None:
    network, models = on_sd(707)
    network.apply_to(*models, True, True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(708))
    network.save_weights(str(tmp_path / "oft.safetensors"), None, {})
    saved = load_file(tmp_path / "oft.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"oft_blocks", "alpha"}
    file = str(tmp_path / "oft.safetensors")
    reloaded, weights = oft.create_network_from_weights(1.0, file, None, *on_sd(707)[1])
    reloaded.load_weights(file)
    assert reloaded.state_dict().keys() == network.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in reloaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_keeps_the_limit_of_its_alpha(dtype: torch.dtype) -> None:
    first, second = (on_sd(708, alpha=alpha)[0].to(dtype) for alpha in (1e-3, 1e-4))
    second.load_state_dict(first.state_dict())
    limits = {adapter.change.limit for adapter in second.adapters.values()}  # type: ignore[union-attr]
    assert limits == {float(torch.tensor(1e-3))}


@pytest.mark.parametrize(("blocks", "fits"), [(5, 4), (3, 2), (16, 8)])
def test_blocks_that_do_not_divide_a_layer_are_refused_with_a_number_that_does(blocks: int, fits: int) -> None:
    message = rf"--network_dim {blocks} is the number of blocks .*attn1\.to_q has 16 of them; .* such as {fits},"
    with pytest.raises(UserError, match=message):
        on_sd(709, blocks=blocks)


def test_a_lora_alpha_is_no_limit_and_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    on_sd(710, alpha=1.0)
    assert "--network_alpha 1 limits no angle" in caplog.text


def test_adapters_can_be_created_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert (
            on_sd(711)[0]
            .get_parameter("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.oft_blocks")
            .is_meta
        )

"""networks.oft_v2 and networks.boft: arguments, block sizes, the COFT limit, memory, files that do not match."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from networks import boft, loha, oft_v2
from networks.core.changes.orthogonal import Orthogonal
from networks.core.files.adapter_file import read_adapter_file
from networks.core.files.module_weights import ModuleWeights
from networks.core.kinds.oft_v2 import ANGLES, OftV2, make_fresh
from networks.core.network.network import AdapterNetwork
from tests.tolerances import FLOAT64
from tests.unit.networks.test_dora import Largest
from tests.unit.networks.test_forms import CONV, LINEAR, outputs, perturb
from tests.unit.networks.toy import toy_models


def make_network(seed: int, dim: int | None = None, **arguments: str) -> AdapterNetwork:
    text, unet = toy_models(seed)
    return oft_v2.create_network(1.0, dim, 1.0, None, text, unet, **arguments)


def shape_of(network: AdapterNetwork, name: str) -> list[int]:
    return list(network.adapters[name].change.stored_tensors()[ANGLES].shape)


@pytest.mark.parametrize(
    ("dim", "arguments", "shape"),
    [
        (4, {}, [2, 6]),  # 8 inputs in 2 blocks of 4, of 4 * 3 / 2 angles
        (4, {"oft_block_size": "2"}, [4, 1]),
        (None, {"block_size": "8"}, [1, 28]),
        (None, {}, [1, 28]),  # 32 is more than there are
        (5, {}, [2, 6]),
        (4, {"oft_block_share": "True"}, [1, 6]),
    ],
)
def test_block_sizes_follow_from_the_arguments(dim: int | None, arguments: dict[str, str], shape: list[int]) -> None:
    assert shape_of(make_network(8001, dim, **arguments), LINEAR) == shape


def test_blocks_of_larger_kernels_cover_all_their_columns() -> None:
    assert shape_of(make_network(8011, 4, enable_conv="True"), CONV) == [
        54 // 3,
        3,
    ]  # 6 * 3 * 3, of which 4 is no divisor
    assert shape_of(make_network(8012, 4, enable_conv="True", conv_dim="9"), CONV) == [6, 36]
    assert CONV not in make_network(8013, 4).adapters


def test_a_block_size_that_does_not_divide_the_layer_can_be_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"is 5, which does not divide the 7 inputs of a layer, and .*auto_adjust=False"
    ):
        make_network(8021, 5, auto_adjust="False")
    with pytest.raises(ValueError, match="one input has nothing to turn"):
        make_fresh(nn.Linear(1, 4), 4)


def test_include_patterns_exclude_everything_else() -> None:
    chosen = make_network(8031, 4, include_patterns=r"['.*to_q', 'mid\\..*']", exclude_patterns="up.*").adapters
    assert {adapter.target.path for adapter in chosen.values()} == {
        "down.0.attention.to_q",
        "mid.attention.proj_in",
        "mid.attention.to_q",
        "up.0.attention.to_q",
    }


def test_arguments_without_effect_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        make_network(8041, 4, block_size="2", conv_alpha="2", conv_dim="2", block_share="1", dropout="0.1")
    for message in (
        "OFT: --network_dim is the size of the blocks; --network_alpha does not count",
        "--network_dim 4 has no effect: --network_args block_size=2",
        "--network_args conv_alpha has no effect: a rotation has no alpha",
        "--network_dropout has no effect with block_share",
    ):
        assert message in caplog.text
    loha.create_network(1.0, 3, 2.0, None, *toy_models(8042), coft="True", enable_conv="1")
    assert "--network_args coft has no effect; it belongs to networks.oft_v2" in caplog.text
    assert (
        "--network_args enable_conv has no effect; it belongs to networks.boft, networks.oft and networks.oft_v2"
        in caplog.text
    )


def test_a_file_overrides_the_number_of_factors_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    text, unet = toy_models(8047)
    network = boft.create_network(1.0, 2, 1.0, None, text, unet, boft_n_butterfly_factor="2", include_patterns=".*to_q")
    weights = network.state_dict()
    boft.create_network_from_weights(
        1.0, "file", None, text, unet, dict(weights), boft_n_butterfly_factor="3", auto_adjust="0"
    )
    assert "boft_n_butterfly_factor, auto_adjust has no effect" in caplog.text


def test_boft_refuses_two_block_sizes_and_logs_which_one_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="block_size=4 and boft_block_num=2 say the same in two ways"):
        boft.create_network(1.0, None, 1.0, None, *toy_models(8046), boft_block_size="4", boft_block_num="2")
    with caplog.at_level("INFO"):
        network = boft.create_network(1.0, 3, 1.0, None, *toy_models(8046), boft_block_num="1", boft_dropout="0.2")
    assert "boft_block_num gives the sizes of blocks; --network_dim and --network_alpha do not count" in caplog.text
    change: Any = network.adapters[LINEAR].change
    assert list(change.boft_R.shape) == [1, 1, 8, 8] and change.drops.neuron == 0.2


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"boft_R": (1, 2, 4, 4)}, "without its boft_s"),
        ({"boft_s": (6, 1)}, "without its boft_R"),
        ({"boft_R": (2, 3, 2, 2), "boft_s": (6, 1)}, "of the shape [2, 3, 2, 2]; it needs (factors, blocks, b, b)"),
        ({"boft_R": (8, 4, 4), "boft_s": (6, 1)}, "of the shape [8, 4, 4]; it needs (factors, blocks, b, b)"),
        ({"boft_R": (1, 2, 4, 4), "boft_s": (6, 2)}, "it needs one number for each output"),
    ],
)
def test_tensors_that_are_not_boft_are_named(tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str) -> None:
    tensors_of_file = {f"{LINEAR}.{leaf}": torch.ones(shape) for leaf, shape in tensors.items()}
    save_safetensors(tmp_path / "x.safetensors", tensors_of_file, {})
    with pytest.raises(ValueError, match=re.escape(message)):
        read_adapter_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "arguments", [{"dropout": "0.1", "dropout_probability": "0.2"}, {"block_size": "4", "oft_block_size": "2"}]
)
def test_two_names_of_one_argument_must_agree(arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="mean the same"):
        make_network(8051, 4, **arguments)


def test_the_coft_limit_is_enforced_before_each_step_and_in_the_file(tmp_path: Path) -> None:
    network = make_network(8061, 4, coft="True", coft_eps="0.05")
    perturb(network, 8062)
    network.save_weights(str(tmp_path / "x.safetensors"), None, {})
    saved = load_state_dict(tmp_path / "x.safetensors")
    network.on_optimizer_step_start(1, 0)
    for name, adapter in network.adapters.items():
        change: Any = adapter.change
        lengths = change.rotation.angles(1.0).detach().norm(dim=(2, 3))
        assert lengths.max() <= 0.05 / lengths.shape[1] ** 0.5 * (1 + 1e-6)
        assert lengths.max() == pytest.approx(0.05 / lengths.shape[1] ** 0.5, rel=1e-5)
        torch.testing.assert_close(saved[f"{name}.{ANGLES}"], change.get_parameter(ANGLES).detach())


@pytest.mark.parametrize("shape", [(5, 96), (2, 96, 4, 4)])
def test_neither_pass_creates_a_tensor_as_large_as_the_weight(shape: tuple[int, ...]) -> None:
    layer: Any = nn.Linear(96, 640) if len(shape) == 2 else nn.Conv2d(96, 640, 1)
    change = make_fresh(layer.requires_grad_(False), 8)
    x = torch.randn(shape, requires_grad=True)
    with Largest() as largest:
        change.forward(x, lambda turned: turned, 1.0).square().sum().backward()
    assert 0 < largest.num_values <= max(96 * 8, x.numel()) < layer.weight.numel()


def test_a_rotated_convolution_saves_its_input_and_no_weight() -> None:
    layer = nn.Conv2d(32, 64, 3, padding=1).requires_grad_(False)
    change = make_fresh(layer, 8)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        change.forward(torch.randn(1, 32, 2, 2, requires_grad=True), layer, 1.0)
    assert max(tensor.numel() for tensor in saved) < layer.weight.numel() / 4


def test_norms_count_shared_blocks_once_per_use() -> None:
    torch.manual_seed(8071)
    layer = nn.Linear(24, 4).double().requires_grad_(False)
    angles = torch.randn(1, 6, dtype=torch.float64) * 1e-4
    shared, apart = Orthogonal(layer, OftV2(angles)), Orthogonal(layer, OftV2(angles.expand(6, 6).clone()))
    torch.testing.assert_close(shared.norm(), apart.norm(), **FLOAT64)
    identity = torch.eye(24, dtype=torch.float64)
    assert shared.norm().item() == pytest.approx((shared.merged(identity) - identity).norm().item(), rel=1e-6)


def test_dropped_blocks_are_the_identity_and_others_are_not() -> None:
    torch.manual_seed(8081)
    layer = nn.Linear(12, 12, bias=False).requires_grad_(False)
    network = oft_v2.create_network(1.0, 4, 1.0, None, *toy_models(8082), dropout_probability="0.5")
    assert {adapter.change.drops.neuron for adapter in network.adapters.values()} == {0.5}  # type: ignore[attr-defined]
    change = Orthogonal(layer, OftV2(torch.randn(3, 6) * 0.3), drops=next(iter(network.adapters.values())).change.drops)  # type: ignore[attr-defined]
    layer.weight.data = torch.eye(12)
    x = torch.randn(1, 12)
    full = change.eval().forward(x, layer, 1.0).view(3, 4)
    patterns = set()
    for _ in range(200):
        actual = change.train().forward(x, layer, 1.0).view(3, 4)
        is_left = [torch.allclose(block, alone) for block, alone in zip(actual, x.view(3, 4), strict=True)]
        for block, turned, dropped in zip(actual, full, is_left, strict=True):
            assert dropped or torch.allclose(block, turned)
        patterns.add(tuple(is_left))
    assert len(patterns) == 8


def test_a_block_size_that_differs_from_the_file_is_named_with_a_fix(tmp_path: Path) -> None:
    path = str(tmp_path / "x.safetensors")
    network = make_network(8091, 2)
    perturb(network, 8092)
    network.save_weights(path, None, {})
    with pytest.raises(
        ValueError, match=r"has blocks of 2 in .*give it blocks of 3; add --dim_from_weights.*--network_dim=2"
    ):
        make_network(8091, 4).load_weights(path)
    with pytest.raises(ValueError, match=r"it needs \[1, 1\]; add --dim_from_weights"):
        make_network(8091, 2, block_share="True").load_weights(path)


@pytest.mark.parametrize("shape", [(2, 4), (6,), (2, 0)])
def test_tensors_that_are_not_angles_are_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_safetensors(tmp_path / "x.safetensors", {f"{LINEAR}.{ANGLES}": torch.ones(shape)}, {})
    with pytest.raises(ValueError, match=re.escape(f"has {LINEAR}.{ANGLES} of the shape {list(shape)}")):
        read_adapter_file(tmp_path / "x.safetensors")


def test_the_summary_counts_blocks(caplog: pytest.LogCaptureFixture) -> None:
    text, unet = toy_models(8101)
    network = oft_v2.create_network(1.0, 4, 1.0, None, text, unet, train_norm="True")
    with caplog.at_level("INFO"):
        network.apply_to(text, unet)
    assert "denoiser: 6 modules adapted, blocks of 3, 4, 90 parameters; 3 norms" in caplog.text
    assert len(outputs(text, unet, 8102)) == 2


@pytest.mark.parametrize(
    "leaves", [{"oft_R.weight": (2, 6)}, {"boft_R": (1, 2, 4, 4), "boft_s": (6, 1)}, {"oft_blocks": (2, 3, 3)}]
)
def test_magnitudes_next_to_a_rotation_are_refused_and_never_dropped(leaves: dict[str, tuple[int, ...]]) -> None:
    tensors = {leaf: torch.zeros(shape) for leaf, shape in leaves.items()}
    module = ModuleWeights("lora_unet_x", {**tensors, "dora_scale": torch.ones(6, 1)}, {})
    with pytest.raises(ValueError, match="lora_unet_x: dora_scale beside a rotation is not computed here"):
        module.merged(torch.zeros(6, 8), 1.0)

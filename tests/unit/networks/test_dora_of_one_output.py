"""A layer with one output gets no magnitudes, which programs would take for one per output."""

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.architectures.specs import list_specs
from library.checkpoints.compatibility import count_outputs, is_dora_per_output, readings
from library.training.models.preflight import models_on_meta_device
from library.training.step.context import Models
from networks import lora_krea2
from networks.core.changes.alpha import ScaledDelta
from networks.core.network.network import AdapterNetwork
from tests.running import STARTED, Finished, make_images
from tests.tiers import first_is_fast
from tests.tiny.bases import BASES
from tests.tolerances import FLOAT32_SAME_MATH

EPS = torch.finfo(torch.float32).eps
PROJECTOR = "lora_unet_txtfusion_projector"
KINDS = ("networks.lora", "networks.loha", "networks.lokr")
DORA = {"dora_wd": "True"}
FAMILIES = sorted(BASES, key=lambda name: name != "krea2")


def comfyui_weight(weight: Tensor, change: Tensor, dora_scale: Tensor | None) -> Tensor:
    """Return the weight that ComfyUI computes from a change and its magnitudes.

    Magnitudes as many along the first axis as the weight has rows belong to the rows, and the norms are those of the
    base's rows. Others belong to the columns of the changed weight.
    """
    changed = weight + change
    if dora_scale is None:
        return changed
    of_rows = dora_scale.shape[0] == weight.shape[0]
    axes = [axis for axis in range(weight.dim()) if axis != (0 if of_rows else 1)]
    norms = torch.linalg.vector_norm(weight if of_rows else changed, dim=axes, keepdim=True)
    return changed * (dora_scale / (norms + EPS))


def build_architecture(name: str, folder: Path) -> Any:
    """Write a tiny base model and open it by its script's options."""
    base = BASES[name]
    args = importlib.import_module(base.script).setup_parser().parse_args(base.build(folder))
    return STARTED[base.script].build(STARTED[base.script].options.from_args(args))


def network_on(models: Models, module: str, **arguments: str) -> AdapterNetwork:
    text_encoder, denoiser = models.network_view
    network: AdapterNetwork = importlib.import_module(module).create_network(
        1.0, 2, 1.0, None, text_encoder, denoiser, **DORA, **arguments
    )
    return network


@pytest.mark.parametrize("name", first_is_fast(FAMILIES))
def test_programs_take_no_magnitudes_of_any_base_model_for_those_of_outputs(name: str, tmp_path: Path) -> None:
    models = models_on_meta_device(build_architecture(name, tmp_path))
    for module in KINDS:
        with torch.device("meta"):
            network = network_on(models, module, **({"conv_dim": "2"} if name in ("sd", "sd2", "sdxl") else {}))
        num_magnitudes = 0
        for adapter in network.adapters.values():
            magnitudes = adapter.change.stored_tensors().get("dora_scale")
            if magnitudes is not None:
                num_magnitudes += 1
                assert magnitudes.shape[0] != adapter.target.module.weight.shape[0], adapter.target.name
        assert num_magnitudes > 10


@pytest.fixture
def krea2(tmp_path: Path) -> Models:
    """Krea 2 with weights, whose projector of text states has one output."""
    arch = build_architecture("krea2", tmp_path)
    denoiser = arch.load.denoiser().float()
    return Models(denoiser, [], None, arch.view([], denoiser))


def perturb(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(831)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("module", ["networks.lora", "networks.lokr"])
def test_comfyui_computes_what_was_trained(krea2: Models, module: str, is_trained: bool) -> None:
    network = network_on(krea2, module)
    if is_trained:
        perturb(network)
    for name, adapter in network.adapters.items():
        change, weight = adapter.change, adapter.target.module.weight
        assert isinstance(change, ScaledDelta)
        read = comfyui_weight(weight, change.weight(), change.stored_tensors().get("dora_scale"))
        trained = adapter.merged()["weight"] if is_trained else weight
        torch.testing.assert_close(read, trained, **FLOAT32_SAME_MATH, msg=name)
    assert "dora_scale" not in network.adapters[PROJECTOR].change.stored_tensors()


def test_the_log_says_so_once(krea2: Models, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        network_on(krea2, "networks.lora")
    assert caplog.text.count(f"{PROJECTOR} has one output and gets no magnitudes") == 1


# Files and states of earlier versions


@pytest.fixture
def earlier(krea2: Models, monkeypatch: pytest.MonkeyPatch) -> AdapterNetwork:
    """Return the network of an earlier version, with magnitudes in every layer."""
    with monkeypatch.context() as patch:
        patch.setattr("networks.core.network.members.can_have_magnitudes", lambda layer: True)
        network = network_on(krea2, "networks.lora")
    perturb(network)
    return network


def test_an_earlier_file_is_loaded_as_it_was_trained(
    krea2: Models, earlier: AdapterNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = str(tmp_path / "earlier.safetensors")
    earlier.save_weights(file, None, {})
    network = network_on(krea2, "networks.lora")
    network.load_weights(file)
    assert f"{PROJECTOR} keeps the magnitudes (DoRA) that it has in {file}" in caplog.text
    from_file, _ = lora_krea2.create_network_from_weights(1.0, file, None, [], krea2.network_view[1])
    from_file.load_weights(file)
    for_merging, tensors = lora_krea2.create_network_from_weights(
        1.0, file, None, [], krea2.network_view[1], for_inference=True
    )
    merged = {part.layer: part.merged(getattr(part.layer, part.parameter)) for part in for_merging.merging(tensors)}
    for name, adapter in earlier.adapters.items():
        expected = adapter.merged()["weight"]
        for other in (network, from_file):
            torch.testing.assert_close(other.adapters[name].merged()["weight"], expected, **FLOAT32_SAME_MATH)
        torch.testing.assert_close(merged[adapter.target.module], expected, **FLOAT32_SAME_MATH)


def test_an_earlier_state_gives_the_parameters_it_was_trained_with(krea2: Models, earlier: AdapterNetwork) -> None:
    state = earlier.state_dict()
    network = network_on(krea2, "networks.lora")
    network.prepare_for({name: tensor.shape for name, tensor in state.items()}, "a state")
    network.load_state_dict(state)
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in earlier.named_parameters()]
    expected = earlier.adapters[PROJECTOR].merged()["weight"]
    assert torch.equal(network.adapters[PROJECTOR].merged()["weight"], expected)


@pytest.mark.slow
def test_an_earlier_run_is_resumed_as_it_began(
    train: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_images(tmp_path / "data" / "1_thing", 2).parent
    arguments = [
        *BASES["krea2"].build(tmp_path), "--train_data_dir", str(data), "--resolution", "64", "--output_dir",
        str(tmp_path / "out"), "--network_module", "networks.lora", "--network_dim", "2", "--network_args",
        "dora_wd=True", "--learning_rate", "1e-2", "--seed", "5", "--save_state", "--max_data_loader_n_workers", "0",
        "--max_train_steps", "3",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("networks.core.network.members.can_have_magnitudes", lambda layer: True)
        whole = train([*arguments, "--output_name", "whole", "--save_every_n_steps", "1"], "krea2_train_network")
        assert whole.status == 0, whole.stderr
    state = str(tmp_path / "out" / "whole-step00000001-state")
    rest = train([*arguments, "--output_name", "rest", "--resume", state], "krea2_train_network")
    assert rest.status == 0, rest.stderr
    assert rest.losses == whole.losses[1:]
    expected, actual = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("whole", "rest"))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def test_an_earlier_file_is_said_to_act_differently(earlier: AdapterNetwork, krea2: Models, tmp_path: Path) -> None:
    for network, num_inexact in ((earlier, 4), (network_on(krea2, "networks.lora"), 0)):
        network.save_weights(str(tmp_path / "file.safetensors"), None, {})
        shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "file.safetensors").items()}
        by_program = {reading.program: reading for reading in readings(list_specs(), shapes, {})}
        for program in ("ComfyUI", "Forge", "A1111-style"):
            if by_program[program].amount != "none":
                assert len(by_program[program].inexact) == num_inexact
        assert (by_program["ComfyUI"].amount == "all") is (num_inexact == 0)


@pytest.mark.parametrize(
    "factors",
    [
        {"lora_down.weight": (4, 12), "lora_up.weight": (1, 4)},
        {"lora_A.weight": (4, 12), "lora_B.weight": (1, 4)},
        {"hada_w1_a": (1, 4), "hada_w1_b": (4, 12)},
        {"hada_w1_a": (4, 1), "hada_w1_b": (4, 12), "hada_t1": (4, 4, 3, 3)},
        {"lokr_w1": (1, 3), "lokr_w2": (1, 4)},
        {"lokr_w1_a": (1, 2), "lokr_w1_b": (2, 3), "lokr_w2_a": (1, 2), "lokr_w2_b": (2, 4)},
        {"lokr_w1": (1, 3), "lokr_w2_a": (2, 1), "lokr_w2_b": (2, 4), "lokr_t2": (2, 2, 3, 3)},
    ],
)
def test_the_factors_tell_the_number_of_outputs(factors: dict[str, tuple[int, ...]]) -> None:
    assert count_outputs(factors) == 1
    assert is_dora_per_output({**factors, "dora_scale": (1, 12)})
    assert not is_dora_per_output(factors)

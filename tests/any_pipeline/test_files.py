"""Adapter files are loaded by the pipeline's own load_lora_weights where it has one, else through PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.any_pipeline.targets import with_targets
from library.architectures.any_pipeline.trees import join_values
from library.checkpoints.files import load_state_dict
from networks import lora
from tests.any_pipeline.test_convention import measured
from tests.tiers import first_is_fast
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline
from tests.tolerances import FLOAT32_SAME_MATH


def attach_adapter(denoiser: Any, component: str) -> Any:
    """Attach a random adapter to a denoiser, and return the network."""
    with_targets(denoiser, component)
    network: Any = lora.create_network(1.0, 4, 2, None, [], denoiser)
    network.apply_to([], denoiser, False, True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def load_into(pipe: Any, component: str, path: Path) -> None:
    """Load a file as the docs say."""
    has_own = getattr(getattr(pipe, component), "load_lora_adapter", None) is not None
    if has_own and component in getattr(pipe, "_lora_loadable_modules", ()):
        pipe.load_lora_weights(str(path))
        return
    denoiser, state = getattr(pipe, component), load_state_dict(path)
    if has_own:
        denoiser.load_lora_adapter(state, prefix=component)
        return
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    layers = {key.removeprefix(f"{component}."): tensor for key, tensor in state.items()}
    paths = [key.removesuffix(".lora_A.weight") for key in layers if key.endswith(".lora_A.weight")]
    rank = len(next(tensor for key, tensor in layers.items() if key.endswith(".lora_A.weight")))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=paths), denoiser)
    set_peft_model_state_dict(denoiser, layers)


@pytest.mark.parametrize("name", first_is_fast(sorted(PIPELINES)))
def test_the_saved_file_gives_the_trained_prediction(name: str, tmp_path: Path) -> None:
    _, convention, maps = measured(name)
    pipe, path, component = build_tiny_pipeline(name), tmp_path / "a.safetensors", convention.denoiser

    def predict(of: Any) -> Tensor:
        with torch.no_grad():
            return join_values(getattr(of, component)(**maps.kwargs))

    before = predict(pipe)
    attach_adapter(getattr(pipe, component), component).save_weights(str(path), None, {})
    trained = predict(pipe)
    assert all(key.startswith(f"{component}.") for key in load_state_dict(path))
    assert any(key.endswith(".lora_A.weight") for key in load_state_dict(path))
    fresh = build_tiny_pipeline(name)
    load_into(fresh, component, path)
    torch.testing.assert_close(predict(fresh), trained, **FLOAT32_SAME_MATH)
    assert (trained - before).abs().max() > 1e-3

"""Adapter files are loaded by the pipeline's own load_lora_weights where it has one, else through PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.any_pipeline.folder import open_folder
from library.architectures.any_pipeline.targets import with_targets
from library.architectures.any_pipeline.trees import join_values
from library.base.errors import UserError
from library.checkpoints.files import load_state_dict
from library.commands.base_models import open_base_model
from networks import dylora, loha, lora
from tests.any_pipeline.test_convention import measured
from tests.tiers import first_is_fast
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAME_MATH, FLOAT32_SAMPLED
from tools import extract_lora_from_dylora, extract_lora_from_models, merge_lora


def attach_adapter(denoiser: Any, component: str, kind: Any = lora) -> Any:
    """Attach a random adapter to a denoiser, and return the network."""
    with_targets(denoiser, component)
    network: Any = kind.create_network(1.0, 4, 2, None, [], denoiser)
    network.apply_to([], denoiser, False, True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def save_adapter(pipe: Any, component: str, path: Path, kind: Any = lora) -> None:
    """Attach a random adapter and save it."""
    network = attach_adapter(getattr(pipe, component), component, kind)
    network.save_weights(str(path), None, {"ss_base_model_version": "any_pipeline"})


def predict(pipe: Any, component: str, kwargs: Any) -> Tensor:
    with torch.no_grad():
        return join_values(getattr(pipe, component)(**kwargs))


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
    before = predict(pipe, component, maps.kwargs)
    save_adapter(pipe, component, path)
    trained = predict(pipe, component, maps.kwargs)
    assert all(key.startswith(f"{component}.") for key in load_state_dict(path))
    assert any(key.endswith(".lora_A.weight") for key in load_state_dict(path))
    fresh = build_tiny_pipeline(name)
    load_into(fresh, component, path)
    torch.testing.assert_close(predict(fresh, component, maps.kwargs), trained, **FLOAT32_SAME_MATH)
    assert (trained - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", first_is_fast(sorted(PIPELINES)))
def test_an_adapter_is_merged_into_a_folder_and_extracted_again(name: str, tmp_path: Path) -> None:
    _, convention, maps = measured(name)
    component, kwargs = convention.denoiser, maps.kwargs
    pipe, base, merged = build_tiny_pipeline(name), tmp_path / "base", tmp_path / "merged"
    pipe.save_pretrained(base)
    save_adapter(pipe, component, tmp_path / "a.safetensors")
    trained = predict(pipe, component, kwargs)
    merge = ["--sd_model", base, "--models", tmp_path / "a.safetensors", "--save_to", merged]
    assert merge_lora.main([str(word) for word in merge]) == 0
    of_merged = type(pipe).from_pretrained(merged)
    torch.testing.assert_close(predict(of_merged, component, kwargs), trained, **FLOAT32_DEEP)
    extract = ["--model_org", base, "--model_tuned", merged, "--save_to", tmp_path / "b.safetensors", "--dim", "4"]
    assert extract_lora_from_models.main([str(word) for word in extract]) == 0
    fresh = build_tiny_pipeline(name)
    load_into(fresh, component, tmp_path / "b.safetensors")
    torch.testing.assert_close(predict(fresh, component, kwargs), trained, **FLOAT32_SAMPLED)


def test_adapters_of_a_pipeline_become_one(tmp_path: Path) -> None:
    name = "AuraFlowPipeline"
    _, convention, maps = measured(name)
    pipe, component = build_tiny_pipeline(name), convention.denoiser
    for number, kind in enumerate((loha, lora)):
        save_adapter(pipe, component, tmp_path / f"{number}.safetensors", kind)
    trained = predict(pipe, component, maps.kwargs)
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    assert (
        merge_lora.main(["--models", *map(str, files), "--concat", "--save_to", str(tmp_path / "both.safetensors")])
        == 0
    )
    fresh = build_tiny_pipeline(name)
    load_into(fresh, component, tmp_path / "both.safetensors")
    torch.testing.assert_close(predict(fresh, component, maps.kwargs), trained, **FLOAT32_SAME_MATH)


def test_a_dylora_of_a_pipeline_is_cut(tmp_path: Path) -> None:
    name = "AuraFlowPipeline"
    _, convention, maps = measured(name)
    component, base = convention.denoiser, predict(build_tiny_pipeline(name), convention.denoiser, maps.kwargs)
    save_adapter(build_tiny_pipeline(name), component, tmp_path / "a.safetensors", dylora)
    cut = ["--model", tmp_path / "a.safetensors", "--save_to", tmp_path / "cut.safetensors", "--unit", "2"]
    assert extract_lora_from_dylora.main([str(word) for word in cut]) == 0
    whole, half = (load_state_dict(tmp_path / f"{stem}.safetensors") for stem in ("cut-0004", "cut-0002"))
    assert whole.keys() == half.keys() and all(key.startswith(f"{component}.") for key in half)
    fresh = build_tiny_pipeline(name)
    load_into(fresh, component, tmp_path / "cut-0002.safetensors")
    assert (predict(fresh, component, maps.kwargs) - base).abs().max() > 1e-3


def test_a_folder_that_is_not_trained_is_merged_into_and_its_errors_name_the_option(tmp_path: Path) -> None:
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "LCMScheduler"]}))
    with pytest.raises(UserError, match="distilled to a few steps"):
        open_folder(str(tmp_path), trusts_code=False)
    assert len(open_base_model("--sd_model", tmp_path).files[0].modules) == 70
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^--sd_model: .*transformer has no weights"):
        open_base_model("--sd_model", tmp_path)

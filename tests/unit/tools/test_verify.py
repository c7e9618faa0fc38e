"""tools/verify.py: what it compares, and what it says of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.architectures.flux import reference as flux_reference
from library.architectures.sd3 import reference as sd3_reference
from library.memory.planner.gpus import TYPICAL
from library.memory.planner.prediction import Way, predict
from library.models.reference import first_and_last
from tests.tiny.chroma import CONFIG as CHROMA
from tests.tiny.chroma import tiny_chroma
from tests.tiny.flux import CONFIG as FLUX
from tests.tiny.flux import tiny_flux
from tests.tiny.init import fixed_init
from tests.tiny.sd3 import CONFIGS, mmdit_weights
from tests.unit.memory.planner.test_choice import counted_step
from tools.verify import compare_files, compare_with_plan, last_error

EXACT = 1e-5  # of the largest value, in float32


def denoisers() -> dict[str, tuple[Any, nn.Module]]:
    """Models with more blocks than are compared, and the module that compares them."""
    from library.architectures.flux.model import Flux
    from library.architectures.sd3.model import MMDiT

    with torch.device("meta"):
        flux, chroma = (Flux(replace(config, num_double=3, num_single=4)) for config in (FLUX, CHROMA))
    for seed, model in enumerate((flux, chroma)):
        model.load_state_dict(fixed_init(model, 61 + seed), assign=True)
    found: dict[str, tuple[Any, nn.Module]] = {
        "flux": (flux_reference, flux),
        "schnell": (flux_reference, tiny_flux(63, has_guidance=False)),
        "chroma": (flux_reference, chroma),
        "one block": (flux_reference, tiny_chroma(64, replace(CHROMA, num_double=1, num_single=1))),
    }
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            mmdit = MMDiT(config)
        mmdit.load_state_dict(mmdit_weights(config, 65), assign=True)
        found[f"sd3 {name}"] = sd3_reference, mmdit
    return {name: (module, model.requires_grad_(False).eval()) for name, (module, model) in found.items()}


def difference(module: Any, model: nn.Module) -> float:
    with torch.no_grad():
        found, expected = module.outputs(model, torch.Generator().manual_seed(3))
    return float((found - expected).abs().max() / expected.abs().max())


def test_our_denoisers_are_those_of_diffusers_in_their_first_and_last_blocks() -> None:
    for name, (module, model) in denoisers().items():
        assert difference(module, model) < EXACT, name


def test_a_denoiser_that_computes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, model = denoisers()["flux"]
    split = flux_reference.diffusers_state

    def with_another_weight(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
        return {**split(state, width), "single_transformer_blocks.1.norm.linear.bias": torch.ones(3 * width)}

    monkeypatch.setattr(flux_reference, "diffusers_state", with_another_weight)
    assert difference(module, model) > 100 * EXACT


def test_the_first_and_the_last_block_are_renumbered() -> None:
    state = {f"blocks.{i}.a.weight": torch.full((2,), i, dtype=torch.bfloat16) for i in (0, 1, 2, 10)}
    state["other.weight"] = torch.ones(1)
    found, counts = first_and_last(state, ("blocks",))
    assert counts == [2] and found.keys() == {"blocks.0.a.weight", "blocks.1.a.weight", "other.weight"}
    assert found["blocks.1.a.weight"].tolist() == [10.0, 10.0]
    assert found["blocks.1.a.weight"].dtype == torch.float32


def test_files_are_compared_byte_for_byte(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors", "d.safetensors")]
    tensors = {"x": torch.tensor([1.0, -4.0]), "y": torch.ones(3)}
    save_file(tensors, paths[0], {"time": "1"})
    save_file(tensors, paths[1], {"time": "2"})
    save_file({**tensors, "y": torch.tensor([1.0, 1.0, 1.125])}, paths[2])
    save_file({"x": tensors["x"]}, paths[3])
    same, other, fewer = (compare_files(paths[0], path) for path in paths[1:])
    assert not same.is_wrong and same.found == "equal byte for byte (2 tensors)"
    assert other.is_wrong and other.found.startswith("1 of 2 tensors differ by up to 3.1e-02 (")
    assert fewer.is_wrong


def step(seconds: float, peak: int | None) -> dict[str, Any]:
    return {"timing": {"seconds": seconds}, "memory": None if peak is None else {"card_peak": peak}}


def test_time_and_memory_are_put_beside_the_plan() -> None:
    steps = [step(9.0, None)] * 5 + [step(0.5, 3 * 2**30), step(0.75, None), step(0.25, 4 * 2**30)]
    planned = predict(counted_step(), Way(), TYPICAL[0])
    time, memory = compare_with_plan(steps, planned)
    assert time.found == f"0.50 s (median of 3), {planned.seconds:.2f} s a pass planned"
    assert memory.found == f"4.0 GiB in tensors at the peak, {planned.tensor_bytes / 2**30:.1f} GiB planned"
    _, memory = compare_with_plan([step(1.0, None)] * 9, planned)
    assert memory.found.startswith("not measured without a GPU: ")


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("Traceback\n  File secret.py\nlibrary.errors.UserError: --ae secret is not there", "UserError, see above"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "out of memory, see above"),
        ("killed", "see above"),
    ],
)
def test_of_an_error_only_its_kind_is_said(log: str, said: str) -> None:
    assert last_error(log) == said

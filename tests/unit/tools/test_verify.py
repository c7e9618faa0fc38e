"""tools/verify.py: its comparisons and how it reports them."""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.architectures.specs import list_specs
from library.memory.planner.gpus import TYPICAL
from library.memory.planner.prediction import MemoryMode, predict
from library.models.reference import select_first_and_last, with_weights
from tests.tiny.anima import tiny_anima
from tests.tiny.chroma import tiny_chroma
from tests.tiny.flux import tiny_flux
from tests.tiny.flux_2 import tiny_flux_2
from tests.tiny.hunyuan_image import tiny_hunyuan_image
from tests.tiny.init import fixed_init
from tests.tiny.krea2 import tiny_krea2
from tests.tiny.lumina import tiny_lumina
from tests.tiny.qwen_image_21 import tiny_qwen_image_21
from tests.tiny.sd3 import CONFIGS, tiny_mmdit
from tests.tiny.zimage import tiny_zimage
from tests.unit.memory.planner.test_choice import counted_step
from tools.verify import compare_files, compare_with_diffusers, compare_with_plan, find_error

EXACT = 1e-5  # of the largest value, in float32


def of_size(model: Any, seed: int, **changes: Any) -> Any:
    """Return a model of the same class with random weights and other sizes."""
    with torch.device("meta"):
        other = type(model)(replace(model.config, **changes))
    other.load_state_dict(fixed_init(other, seed), assign=True)
    return other.requires_grad_(False).eval()


def denoisers() -> dict[str, Callable[[], nn.Module]]:
    """Return model builders by name; most models have more blocks than are compared."""
    streams, refined = {"num_double": 3, "num_single": 4}, {"num_layers": 4}
    builders: dict[str, Callable[[], nn.Module]] = {
        "flux": lambda: of_size(tiny_flux(61), 61, **streams),
        "flux schnell": lambda: tiny_flux(63, has_guidance=False),
        "flux chroma": lambda: of_size(tiny_chroma(62), 62, **streams),
        "flux chroma with one block": lambda: of_size(tiny_chroma(64), 64, num_double=1, num_single=1),
        "lumina": lambda: of_size(tiny_lumina(66), 66, **refined),
        "zimage": lambda: of_size(tiny_zimage(67), 67, **refined),
        "anima": lambda: of_size(tiny_anima(68), 68, num_blocks=4),
        "hunyuan_image": lambda: of_size(tiny_hunyuan_image(69), 69, **streams),
        "flux_2 klein": lambda: of_size(tiny_flux_2(70), 70, **streams),
        "flux_2 dev": lambda: of_size(tiny_flux_2(71, is_dev=True), 71, **streams),
        "krea2": lambda: of_size(tiny_krea2(72), 72, num_blocks=3),
        "qwen_image_21": lambda: of_size(tiny_qwen_image_21(73), 73, num_blocks=3),
    }
    return builders | {f"sd3 {name}": partial(tiny_mmdit, config, 65) for name, config in CONFIGS.items()}


def package_of(model: nn.Module) -> str:
    return type(model).__module__.rpartition(".")[0]


def difference(model: nn.Module) -> float:
    module: Any = importlib.import_module(f"{package_of(model)}.reference")
    with torch.no_grad():
        actual, expected = module.outputs(model, torch.Generator().manual_seed(3))
    assert actual.shape == expected.shape and expected.abs().max() > 0.1
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", denoisers())
def test_our_denoisers_match_diffusers_in_their_first_and_last_blocks(name: str) -> None:
    assert difference(denoisers()[name]()) < EXACT


def test_each_of_our_denoisers_is_compared() -> None:
    """Every package with its own denoiser has a reference."""
    packages = {Path(spec.build.__code__.co_filename).parent for spec in list_specs()}
    expected = {folder.name for folder in packages if (folder / "model.py").exists()}
    assert expected == {name.split()[0] for name in denoisers()}
    assert all((folder / "reference.py").exists() for folder in packages if folder.name in expected)


@pytest.mark.parametrize("name", {name.split()[0]: name for name in denoisers()}.values())
def test_a_denoiser_with_other_outputs_is_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In diffusers' class, one matrix of the last block is a tenth larger."""

    def with_another_weight(model: Any, state: Mapping[str, Tensor]) -> Any:
        last = [key for key, tensor in state.items() if re.search(r"(blocks|layers)\.\d", key) and tensor.ndim == 2][-1]
        return with_weights(model, {**state, last: 1.1 * state[last]})

    model = denoisers()[name]()
    module = importlib.import_module(f"{package_of(model)}.reference")
    monkeypatch.setattr(module, "with_weights", with_another_weight)
    assert difference(model) > 100 * EXACT


def test_a_class_that_the_installed_diffusers_lacks_is_reported_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    model = denoisers()["lumina"]()
    assert re.fullmatch(r"first and last blocks differ .*", compare_with_diffusers(model, package_of(model)).found)
    monkeypatch.delattr(diffusers, "Lumina2Transformer2DModel")
    monkeypatch.delitem(diffusers._class_to_module, "Lumina2Transformer2DModel")
    result = compare_with_diffusers(model, package_of(model))
    expected = f"not compared: diffusers {diffusers.__version__} has no Lumina2Transformer2DModel"
    assert not result.is_wrong and result.found == expected


def test_the_first_and_the_last_block_are_renumbered() -> None:
    state = {f"blocks.{i}.a.weight": torch.full((2,), i, dtype=torch.bfloat16) for i in (0, 1, 2, 10)}
    state["other.weight"] = torch.ones(1)
    selected, counts = select_first_and_last(state, ("blocks",))
    assert counts == [2] and selected.keys() == {"blocks.0.a.weight", "blocks.1.a.weight", "other.weight"}
    assert selected["blocks.1.a.weight"].tolist() == [10.0, 10.0]
    assert selected["blocks.1.a.weight"].dtype == torch.float32


def test_files_are_compared_byte_for_byte(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors", "d.safetensors")]
    tensors = {"x": torch.tensor([1.0, -4.0]), "y": torch.ones(3)}
    save_file(tensors, paths[0], {"time": "1"})
    save_file(tensors, paths[1], {"time": "2"})
    save_file({**tensors, "y": torch.tensor([1.0, 1.0, 1.125])}, paths[2])
    save_file({"x": tensors["x"]}, paths[3])
    same, other, fewer = (compare_files(paths[0], path) for path in paths[1:])
    assert not same.is_wrong and same.found == "identical (2 tensors)"
    assert other.is_wrong and other.found.startswith("1 of 2 tensors differ by up to 3.1e-02 (")
    assert fewer.is_wrong


def step(seconds: float, peak: int | None) -> dict[str, Any]:
    return {"timing": {"seconds": seconds}, "memory": None if peak is None else {"card_peak": peak}}


def test_time_and_memory_are_compared_with_the_plan() -> None:
    steps = [step(9.0, None)] * 5 + [step(0.5, 3 * 2**30), step(0.75, None), step(0.25, 4 * 2**30)]
    planned = predict(counted_step(), MemoryMode(), TYPICAL[0])
    time, memory = compare_with_plan(steps, planned)
    assert time.found == f"0.50 s (median of 3), {planned.seconds:.2f} s per batch planned"
    assert memory.found == f"4.0 GiB in tensors at the peak, {planned.tensor_bytes / 2**30:.1f} GiB planned"
    _, memory = compare_with_plan([step(1.0, None)] * 9, planned)
    assert memory.found.startswith("not measured without a GPU: ")


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("Traceback\n  File secret.py\nlibrary.errors.UserError: --ae secret is not there", "UserError, see above"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "out of memory, see above"),
        ("killed", "see above"),
    ],
)
def test_only_the_type_of_an_error_is_reported(log: str, expected: str) -> None:
    assert find_error(log) == expected

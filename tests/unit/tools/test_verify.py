"""tools/verify.py: its comparisons and how it reports them."""

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library import architectures
from library.commands.counted_plan import read_training_options
from library.models import reference
from library.models.reference import select_first_and_last, with_weights
from library.training.config_file import SECRETS
from tests.tiny.bases import BASES
from tools import verify
from tools.verify import (
    PlannedStep,
    compare_files,
    compare_with_diffusers,
    compare_with_plan,
    find_error,
    prepare_trial,
)

EXACT = 1e-5  # of the largest value, in float32


DENOISERS: Mapping[str, Callable[[], nn.Module]] = {  # most have more blocks than are compared
    name: build for base in BASES.values() for name, build in base.verified.items()
}


def package_of(model: nn.Module) -> str:
    return type(model).__module__.rpartition(".")[0]


def difference(model: nn.Module) -> float:
    module: Any = importlib.import_module(f"{package_of(model)}.reference")
    with torch.no_grad():
        actual, expected = module.outputs(model, torch.Generator().manual_seed(3))
    assert actual.shape == expected.shape and expected.abs().max() > 0.1
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", DENOISERS)
def test_our_denoisers_match_diffusers_in_their_first_and_last_blocks(name: str) -> None:
    assert difference(DENOISERS[name]()) < EXACT


def test_each_of_our_denoisers_is_compared() -> None:
    """Every package with its own denoiser has a reference, but for models that diffusers has no class of."""
    folder = Path(architectures.__file__).parent
    own = {path.parent.name for path in folder.glob("*/model.py")}
    assert own == {name.split()[0] for name in DENOISERS} | {"moss_image"}
    assert {path.parent.name for path in folder.glob("*/reference.py")} == own - {"moss_image"}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_with_other_outputs_is_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In diffusers' class, one matrix of the last block is a tenth larger."""

    def with_another_weight(model: Any, state: Mapping[str, Tensor]) -> Any:
        last = [key for key, tensor in state.items() if re.search(r"(blocks|layers)\.\d", key) and tensor.ndim == 2][-1]
        return with_weights(model, {**state, last: 1.1 * state[last]})

    model = DENOISERS[name]()
    module = importlib.import_module(f"{package_of(model)}.reference")
    for place in (module, reference):
        monkeypatch.setattr(place, "with_weights", with_another_weight, raising=False)
    assert difference(model) > 100 * EXACT


def test_a_class_that_the_installed_diffusers_lacks_is_reported_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    model = DENOISERS["lumina"]()
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
    assert other.is_wrong and other.found.startswith("1 of 2 tensors differ, by 2.8e-02 of their size; they must be")
    assert fewer.is_wrong


def test_a_resumed_run_is_judged_by_the_spread_of_two(tmp_path: Path) -> None:
    """Kernels that add in any order change every run; a lost optimizer state changes more than that."""
    generator = torch.Generator().manual_seed(1)
    adapter = {"x": torch.randn(64, 8, generator=generator), "y": torch.randn(8, generator=generator)}

    def write(name: str, deviation: float) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file({key: t + deviation * torch.randn(t.shape, generator=generator) for key, t in adapter.items()}, path)
        return path

    whole, resumed, again, other = write("a", 1e-5), write("b", 1e-5), write("c", 1e-5), write("d", 1e-3)
    rounded, wrong = compare_files(whole, resumed, again), compare_files(other, resumed, again)
    assert not rounded.is_wrong and "rounding of GPU kernels that add in any order" in rounded.found
    assert wrong.is_wrong and re.search(r"two resumed runs by 1\.\de-05: more than rounding explains", wrong.found)
    assert compare_files(whole, resumed, resumed).is_wrong, "equal resumed runs show that nothing is rounded"
    assert compare_files(whole, resumed).is_wrong


def step(seconds: float, peak: int | None) -> dict[str, Any]:
    memory = None if peak is None else {"card_peak": peak, "card_reserved_peak": peak + GIB // 2}
    return {"timing": {"seconds": seconds}, "memory": memory}


GIB = 2**30


@pytest.mark.parametrize(
    ("seconds", "peak", "verdicts"),
    [
        (0.5, 4 * GIB, (False, False)),
        (0.74, int(4.39 * GIB), (False, False)),
        (0.76, int(4.41 * GIB), (True, True)),
        (0.32, int(3.5 * GIB), (True, True)),
    ],
)
def test_time_and_memory_are_judged_by_the_plan(seconds: float, peak: int, verdicts: tuple[bool, bool]) -> None:
    steps = [step(9.0, None)] * 5 + [step(seconds, 3 * GIB), step(9.0, None), step(0.01, peak)]
    results = list(compare_with_plan(steps, PlannedStep(4 * GIB, 0.5), True))
    assert tuple(result.is_wrong for result in results) == verdicts
    assert results[0].found == f"{seconds:.2f} s (median of 3), 0.50 s planned"
    expected = f"{(peak + GIB // 2) / GIB:.1f}"
    assert (
        results[1].found
        == f"{peak / GIB:.1f} GiB in tensors at the peak, 4.0 GiB planned; torch took {expected} GiB from the GPU"
    )


def test_there_is_no_verdict_on_time_and_memory_without_a_gpu() -> None:
    results = list(compare_with_plan([step(0.72, None)] * 9, PlannedStep(GIB, 0.07), False))
    assert [str(result).split()[0] for result in results] == ["-", "-"]
    assert results[1].found.startswith("not measured without a GPU: 1.0 GiB")


def read(script: str, *arguments: str) -> tuple[Any, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("library.training.command_line.cli.start_logging", lambda parser, args: None)
        spec, options = read_training_options(script, arguments)
    return spec, options


TRAINED = ["--text_encoder_lr", "5e-5", "1e-5", "--network_args", "conv_dim=4", "--lr_warmup_steps", "0.1"]
OF_THE_USER = [
    "--resume", "state", "--dry_run", "--debug_dataset", "--initial_epoch", "3", "--skip_until_initial_step",
    "--output_dir", "mine", "--console_log_file", "mine.log", "--validate_every_n_steps", "1", "--profile", "3",
    "--max_train_epochs", "99", "--save_precision", "fp16", "--audit_only",
]  # fmt: skip


def test_the_trial_takes_the_options_of_the_run_but_not_where_and_how_it_starts(tmp_path: Path) -> None:
    spec, options = read("train_network.py", *TRAINED, *OF_THE_USER, "--lr_decay_steps", "300", "--seed", "0")
    prepare_trial(spec, options, tmp_path / "trial", {"selftest": True})
    _, trial = read("train_network.py", "--config_file", str(tmp_path / "trial" / "options.toml"))
    _, plain = read("train_network.py", *TRAINED)
    own = {
        "selftest": True, "seed": 0, "max_train_steps": 20, "save_every_n_steps": 10, "save_state": True,
        "no_report": True, "output_name": "verify", "save_precision": "float", "lr_decay_steps": 5,
        "output_dir": str(tmp_path / "trial"), "log_events": str(tmp_path / "trial" / "events.jsonl"),
        "config_file": str(tmp_path / "trial" / "options.toml"),
    }  # fmt: skip
    assert trial.flat() == plain.flat() | own
    assert trial.network.text_encoder_lr == [5e-5, 1e-5]


def test_a_recipe_does_not_override_the_command_line_again(tmp_path: Path) -> None:
    """An option of the command line whose value is the default is not in the file."""
    name, option = "sd15_character", "network_alpha"
    spec, recipe = read("train_network.py", "--recipe", name)
    default = recipe.defaults()[option]
    assert recipe.flat()[option] != default
    spec, options = read("train_network.py", "--recipe", name, f"--{option}", str(default))
    prepare_trial(spec, options, tmp_path / "trial", {})
    _, trial = read("train_network.py", "--config_file", str(tmp_path / "trial" / "options.toml"))
    assert trial.flat()[option] == default and trial.config_file.recipe is None
    assert trial.optimizer == options.optimizer and trial.dataset == options.dataset


def test_folders_are_deleted_at_the_end_and_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    abandoned = tmp_path / f"verify-{ended.stdout.strip()}-abcdefgh"
    abandoned.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("library.training.command_line.cli.start_logging", lambda parser, args: None)
    seen: list[Path] = []

    def interrupted(spec: Any, options: Any, training: Any, folder: Path) -> Iterator[Any]:
        (folder / "whole").mkdir()
        seen.extend(tmp_path.iterdir())
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(verify, "run_checks", interrupted)
    assert verify.main(["--script", "train_network.py"]) == 130
    assert len(seen) == 1 and seen[0] != abandoned and not any(tmp_path.iterdir())


def test_no_password_is_written(tmp_path: Path) -> None:
    spec, options = read("train_network.py", *(word for name in SECRETS for word in (f"--{name}", "hunter2")))
    prepare_trial(spec, options, tmp_path / "trial", {})
    assert len(SECRETS) == 2 and "hunter2" not in (tmp_path / "trial" / "options.toml").read_text()


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

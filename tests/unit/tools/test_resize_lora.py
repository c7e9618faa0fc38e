"""tools/resize_lora.py, run as a command."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.headers import read_metadata
from library.checkpoints.saving import save_safetensors
from networks.core.files.adapter_file import parse_adapter, read_adapter_file
from tests.device_standin import device_without_float64
from tests.unit.tools.adapter_files import CLIP, CONV, LINEAR, write
from tools.resize_lora import Measure, main, resize_file, resize_module

CPU = torch.device("cpu")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_the_full_rank_changes_nothing(tmp_path: Path) -> None:
    model = write(tmp_path / "a.safetensors", 60)
    assert main(["--model", str(model), "--save_to", str(tmp_path / "b.safetensors"), "--new_rank", "4"]) == 0
    old, new = read_adapter_file(model).modules, read_adapter_file(tmp_path / "b.safetensors").modules
    assert old.keys() == new.keys()
    for name in old:
        assert (new[name].rank, new[name].alpha) == (4, 2.0)
        assert relative(new[name].weight(), old[name].weight()) < 1e-5


@pytest.mark.parametrize(("rank", "conv_rank"), [(1, 3), (3, 1)])
def test_a_lower_rank_is_the_truncated_decomposition_of_the_full_matrix(
    tmp_path: Path, rank: int, conv_rank: int
) -> None:
    model = write(tmp_path / "a.safetensors", 61)
    arguments = ["--new_rank", str(rank), "--new_conv_rank", str(conv_rank)]
    assert main(["--model", str(model), "--save_to", str(tmp_path / "b.safetensors"), *arguments]) == 0
    old, new = read_adapter_file(model).modules, read_adapter_file(tmp_path / "b.safetensors").modules
    for name, module_rank in ((LINEAR, rank), (CLIP, rank), (CONV, conv_rank)):
        u, s, v = torch.linalg.svd(old[name].weight(torch.float64).flatten(1), full_matrices=False)
        expected = (u[:, :module_rank] * s[:module_rank] @ v[:module_rank]).reshape(old[name].shape)
        assert relative(new[name].weight(), expected) < 1e-5
        assert (new[name].rank, new[name].scale) == (module_rank, 0.5)


@pytest.mark.parametrize("method", ["sv_ratio", "sv_cumulative", "sv_fro"])
def test_a_device_without_float64_works(tmp_path: Path, method: str) -> None:
    modules = read_adapter_file(write(tmp_path / "a.safetensors", 62)).modules
    measure = Measure(3, 3, method, 0.8 if method != "sv_ratio" else 4.0)
    for module in modules.values():
        expected = resize_module(module, measure, CPU)
        with device_without_float64() as device:
            resized = resize_module(module, measure, device)
        assert torch.equal(resized.module.weight(), expected.module.change().weight())
        assert resized.kept_norm == expected.kept_norm


def dense_rank(s: Tensor, method: str, param: float, most: int) -> int:
    """Return the rank by the definition of each method, from the singular values of the full matrix."""
    if method == "sv_ratio":
        rank = sum(value > s[0] / param for value in s.tolist())
    else:
        values = (s if method == "sv_cumulative" else s**2).tolist()
        threshold = (param if method == "sv_cumulative" else param**2) * sum(values)
        rank = next(k for k in range(1, len(values) + 1) if sum(values[:k]) >= threshold)
    return min(max(rank, 1), most)


@settings(max_examples=20, deadline=None)
@given(
    method=st.sampled_from(["sv_ratio", "sv_fro", "sv_cumulative"]),
    share=st.floats(0.2, 0.97),
    most=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_methods_choose_the_rank_that_the_full_matrix_needs(method: str, share: float, most: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, kernel in (("lora_unet_a", ()), ("lora_unet_b", (3, 3))):
        tensors[f"{name}.lora_down.weight"] = torch.randn(6, 7, *kernel, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(9, 6, *(1,) * len(kernel), generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    file = parse_adapter(tensors, {}, "")
    param = 1 / share**3 if method == "sv_ratio" else share
    resized = resize_file(file, Measure(most, most, method, param), CPU)
    for name, module in file.modules.items():
        s = torch.linalg.svdvals(module.weight(torch.float64).flatten(1))[:6] / module.scale
        assert resized.modules[name].rank == dense_rank(s, method, param, most)
    assert resized.metadata["ss_network_dim"] == resized.metadata["ss_network_alpha"] == "Dynamic"


def test_metadata_records_the_resize_and_hashes_match_the_new_file(tmp_path: Path) -> None:
    model, out = write(tmp_path / "a.safetensors", 62), tmp_path / "b.safetensors"
    arguments = ["--new_rank", "2", "--save_precision", "fp16"]
    assert main(["--model", str(model), "--save_to", str(out), *arguments]) == 0
    metadata, tensors = read_metadata(out), load_state_dict(out)
    assert tensors[f"{LINEAR}.lora_up.weight"].dtype == torch.float16
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "1.0")
    assert metadata["ss_training_comment"] == "resized from rank 4 to 2"
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == sshs_hashes(tensors, metadata)
    assert metadata["modelspec.title"] == "my cat"
    write(model, 62, {f"{CLIP}.alpha": torch.tensor(1.0)})
    assert main(["--model", str(model), "--save_to", str(out), *arguments]) == 0
    assert (read_metadata(out)["ss_network_dim"], read_metadata(out)["ss_network_alpha"]) == ("2", "Dynamic")


def test_tucker_cores_become_plain_kernels_and_dora_and_norms_are_kept(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(63)
    tensors = {
        "lora_unet_t.lora_down.weight": torch.randn(3, 5, 1, 1, generator=generator),
        "lora_unet_t.lora_mid.weight": torch.randn(3, 3, 3, 3, generator=generator),
        "lora_unet_t.lora_up.weight": torch.randn(6, 3, 1, 1, generator=generator),
        "lora_unet_n.w_norm": torch.randn(4, generator=generator),
        "lora_unet_d.lora_A.weight": torch.randn(3, 5, generator=generator),
        "lora_unet_d.lora_B.weight": torch.randn(6, 3, generator=generator),
        "lora_unet_d.dora_scale": torch.randn(1, 5, generator=generator),
    }
    save_safetensors(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "b.safetensors"
    assert main(["--model", str(tmp_path / "a.safetensors"), "--save_to", str(out), "--new_rank", "3"]) == 0
    old, new = read_adapter_file(tmp_path / "a.safetensors").modules, read_adapter_file(out).modules
    assert new["lora_unet_t"].form == "conv"
    assert relative(new["lora_unet_t"].weight(), old["lora_unet_t"].weight()) < 1e-5
    resized = load_state_dict(out)
    for key in ("lora_unet_n.w_norm", "lora_unet_d.dora_scale"):
        assert torch.equal(resized[key], tensors[key])
    assert "lora_unet_d.lora_A.weight" in resized
    assert not any(key.endswith("alpha") for key in resized)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new_rank", "0"], "--new_rank is 0"),
        (["--dynamic_method", "sv_fro"], "--dynamic_param belong together"),
        (["--dynamic_method", "sv_fro", "--dynamic_param", "1.5"], "--dynamic_param is 1.5"),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "0.5"], "--dynamic_param is 0.5"),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "nan"], "--dynamic_param is nan"),
        (["--device", "no_such"], "--device no_such"),
    ],
)
def test_invalid_values_are_refused(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write(tmp_path / "a.safetensors", 64)
    assert main(["--model", str(model), "--save_to", str(tmp_path / "b.safetensors"), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_other_kinds_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "a.safetensors", 65, {"lora_unet_k.bias": torch.ones(2)})
    assert main(["--model", str(model), "--save_to", str(tmp_path / "b.safetensors")]) == 1
    assert "lora_unet_k (another kind of adapter: bias)" in capsys.readouterr().err


def test_unknown_extension_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "a.safetensors", 66)
    assert main(["--model", str(model), "--save_to", str(tmp_path / "b.bin")]) == 1
    assert "must end in one of .safetensors, .ckpt, .pt" in capsys.readouterr().err


def large_file(tmp_path: Path, fall: float) -> Path:
    """Write one module of rank 40 whose singular values fall by a constant factor."""
    generator = torch.Generator().manual_seed(71)
    up, _ = torch.linalg.qr(torch.randn(60, 40, generator=generator))
    down, _ = torch.linalg.qr(torch.randn(50, 40, generator=generator))
    tensors = {
        "lora_unet_a.lora_up.weight": up * fall ** torch.arange(40),
        "lora_unet_a.lora_down.weight": down.T.contiguous(),
        "lora_unet_a.alpha": torch.tensor(40.0),
    }
    save_safetensors(tmp_path / "large.safetensors", tensors, {})
    return tmp_path / "large.safetensors"


def resized_weight(model: Path, *words: str) -> Tensor:
    target = model.with_name("resized.safetensors")
    assert main(["--model", str(model), "--save_to", str(target), "--new_rank", "6", *words]) == 0
    (module,) = read_adapter_file(target).modules.values()
    assert module.rank == 6
    return module.weight(torch.float64)


def test_power_iterations_approach_the_best_approximation_of_large_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = large_file(tmp_path, fall=0.9)
    best = resized_weight(model)
    assert torch.equal(resized_weight(model, "--svd_lowrank_niter", "2"), best)  # not large, so exact
    monkeypatch.setattr("tools.resize_lora.MANY_SINGULAR_VALUES", 39)
    errors = [relative(resized_weight(model, "--svd_lowrank_niter", niter), best) for niter in "128"]
    assert errors[0] > 1e-3 > 1e-5 > errors[-1]  # the option is used, and more iterations come closer
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(resized_weight(model, "--svd_lowrank_niter", "0"), best)
    assert torch.equal(*[resized_weight(model, "--svd_lowrank_niter", "1") for _ in range(2)])


def test_the_share_kept_by_power_iterations_is_reported_without_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.resize_lora.MANY_SINGULAR_VALUES", 39)
    resized_weight(large_file(tmp_path, fall=0.5), "--svd_lowrank_niter", "2", "--verbose")
    shown = "".join(capsys.readouterr())
    kept_share = (1 - 0.25**6) ** 0.5  # of a geometric series
    assert f"rank 40 to 6, keeps {kept_share:.1%} of the norm, largest / smallest 32.0" in shown


def test_power_iterations_have_no_effect_with_a_method(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["--dynamic_method", "sv_fro", "--dynamic_param", "0.9999"]
    model = large_file(tmp_path, fall=0.9)
    exact = resized_weight(model, *words)
    assert "--svd_lowrank_niter" not in caplog.text
    assert torch.equal(resized_weight(model, *words, "--svd_lowrank_niter", "3"), exact)
    assert "--svd_lowrank_niter has no effect with --dynamic_method" in caplog.text
    assert main(["--model", str(model), "--save_to", str(tmp_path / "b.pt"), "--svd_lowrank_niter", "-1"]) == 1

"""LoHa and LoKr files through every tool: checked, converted, resized, merged, for every base model."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.architectures.specs import list_specs
from library.checkpoints.adapter_names import BaseNames
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.checkpoints.saving import save_safetensors
from networks.core.files.adapter_file import read_adapter_file
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.renaming import rename
from tests.tolerances import FLOAT32_SAME_MATH
from tools import check_lora_weights, convert_lora, merge_lora, resize_lora

TABLES = [spec.names for spec in list_specs() if spec.names.modules]  # a measured pipeline has none
WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048, "flux": 3072, "hunyuan_image": 3584}  # distinguishes the models
CONV = "lora_unet_up_blocks_2_resnets_1_conv1"
RANK, ALPHA = 2, 3.0
FORMS = ("w2 of factors", "both of factors", "w1 of factors", "whole")


def is_read(table: BaseNames, naming: str) -> bool:
    """Return True if a program reads adapters of the base model in a naming."""
    (spec,) = (spec for spec in list_specs() if spec.names is table)
    return any(naming in reader.denoiser for reader in spec.readers.values())


def loha_of(names: list[str], seed: int, num_inputs: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name in names:
        for leaf, shape in (("w1_a", (9, RANK)), ("w1_b", (RANK, num_inputs)), ("w2_a", (9, RANK)),
                            ("w2_b", (RANK, num_inputs))):  # fmt: skip
            tensors[f"{name}.hada_{leaf}"] = torch.randn(shape, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def lokr_of(names: list[str], seed: int, num_inputs: int) -> dict[str, Tensor]:
    """Return a module of each form in turn, with 9 outputs: L is 3, M 4, K 3, and N the rest."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        form = FORMS[i % len(FORMS)]
        leaves = {"w1_a": (3, RANK), "w1_b": (RANK, 4)} if form in FORMS[1:3] else {"w1": (3, 4)}
        num_n = num_inputs // 4
        leaves |= {"w2_a": (3, RANK), "w2_b": (RANK, num_n)} if form in FORMS[:2] else {"w2": (3, num_n)}
        for leaf, shape in leaves.items():
            tensors[f"{name}.lokr_{leaf}"] = torch.randn(shape, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def changes(path: Path) -> dict[str, Tensor]:
    return {name: module.weight(torch.float64) for name, module in read_adapter_file(path).modules.items()}


def formula(tensors: dict[str, Tensor], name: str) -> Tensor:
    if f"{name}.hada_w1_a" in tensors:
        a1, b1, a2, b2 = (tensors[f"{name}.hada_{leaf}"].double() for leaf in ("w1_a", "w1_b", "w2_a", "w2_b"))
        return (a1 @ b1) * (a2 @ b2) * ALPHA / RANK
    parts = {key.rpartition("lokr_")[2]: t.double() for key, t in tensors.items() if key.startswith(f"{name}.lokr")}
    w1 = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    w2 = parts["w2"] if "w2" in parts else parts["w2_a"] @ parts["w2_b"]
    return torch.kron(w1, w2) * (1 if parts.keys() == {"w1", "w2"} else ALPHA / RANK)


@pytest.fixture(params=TABLES, ids=lambda table: table.base)
def table(request: pytest.FixtureRequest) -> BaseNames:
    names: BaseNames = request.param
    return names


@pytest.fixture(params=["loha", "lokr"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(table: BaseNames, kind: str, tmp_path: Path) -> Path:
    """Write a file of four denoiser modules, starting with those that reveal the width."""
    names = [m.kohya for m in table.modules if re.search("^lora_unet_.*(blocks|layers)_[0-9]", m.kohya)]
    names = [name for name in names if "resnets" not in name and "layers_2" not in name]
    names.sort(key=lambda name: "attn2_to_k" not in name)
    tensors = (loha_of if kind == "loha" else lokr_of)(names[:4], 3001, WIDTHS.get(table.base, 64))
    metadata = {"ss_network_module": f"networks.{kind}", "ss_base_model_version": table.base}
    save_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    return tmp_path / "a.safetensors"


def test_the_file_is_checked_and_its_base_model_recognised(
    table: BaseNames, kind: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_lora_weights.main(["--model", str(model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["base"] == table.base and report["is_usable"]
    tensors = load_state_dict(model)
    for module in report["modules"]:
        is_whole = f"{module['name']}.lokr_w1" in tensors and f"{module['name']}.lokr_w2" in tensors
        sizes = (1, 1.0) if is_whole else (RANK, ALPHA)
        assert (module["kind"], module["rank"], module["alpha"]) == (kind, *sizes)
        assert module["update_norm"] == pytest.approx(float(formula(tensors, module["name"]).norm()), rel=1e-6)


def test_the_file_is_converted_to_the_generic_naming_and_back(table: BaseNames, model: Path, tmp_path: Path) -> None:
    generic, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert convert_lora.main(["--model", str(model), "--save_to", str(generic), "--to", "generic"]) == 0
    assert all(not key.endswith("alpha") and "lora_unet" not in key for key in load_state_dict(generic))
    status = convert_lora.main(["--model", str(generic), "--save_to", str(back), "--to", "kohya"])
    assert status == (0 if is_read(table, "kohya") else 1)
    if status:
        return
    before, after = changes(model), changes(back)
    assert before.keys() == after.keys()
    for name, change in before.items():
        torch.testing.assert_close(after[name], change, rtol=1e-6, atol=1e-6)


def test_converting_to_diffusers_is_refused(
    table: BaseNames, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exception: ComfyUI reads the diffusers names of Qwen-Image 2.1, so those files are converted."""
    out = tmp_path / "out.safetensors"
    if table.base == "qwen_image_21":
        assert convert_lora.main(["--model", str(model), "--save_to", str(out), "--to", "diffusers"]) == 0
        assert all(key.startswith("transformer.") for key in load_state_dict(out))
        return
    assert convert_lora.main(["--model", str(model), "--save_to", str(out), "--to", "diffusers"]) == 1
    error = capsys.readouterr().err
    assert ("the diffusers naming has no place for" if is_read(table, "diffusers") else "no program reads") in error
    assert not out.exists()


@pytest.mark.parametrize("new_rank", [2, 9])
def test_resizing_gives_the_best_lora_approximation(model: Path, tmp_path: Path, new_rank: int) -> None:
    out = tmp_path / "out.safetensors"
    assert resize_lora.main(["--model", str(model), "--save_to", str(out), "--new_rank", str(new_rank)]) == 0
    tensors, resized = load_state_dict(model), read_adapter_file(out).modules
    assert read_metadata(out)["ss_network_module"] == "networks.lora"
    for name, module in resized.items():
        assert module.form == "low_rank" and module.rank <= new_rank
        # Compare residuals: if the singular values at the cut are nearly equal, there are many best approximations.
        target = formula(tensors, name)
        least = torch.linalg.svdvals(target)[new_rank:].norm()
        residual = (module.weight(torch.float64) - target).norm()
        assert residual <= least * (1 + 1e-6) + 1e-5 * target.norm()


def test_concat_merges_two_files_into_one_lora_exactly(table: BaseNames, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ["--models", str(model), str(model), "--ratios", "0.5", "0.25", "--save_to", str(out)]
    assert merge_lora.main([*arguments, "--concat"]) == 0
    tensors = load_state_dict(model)
    for name, module in rename(read_adapter_file(out), table, "kohya").file.modules.items():
        assert module.form == "low_rank"
        torch.testing.assert_close(module.weight(), 0.75 * formula(tensors, name).float(), **FLOAT32_SAME_MATH)


def test_merging_to_a_smaller_rank_logs_the_error(
    table: BaseNames, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out.safetensors"
    with caplog.at_level("INFO"):
        assert merge_lora.main(["--models", str(model), "--new_rank", "3", "--save_to", str(out)]) == 0
    tensors, modules = load_state_dict(model), rename(read_adapter_file(out), table, "kohya").file.modules
    merged = {name: module.weight(torch.float64) for name, module in modules.items()}
    missed = sum(float((formula(tensors, name) - change).square().sum()) for name, change in merged.items())
    total = sum(float(formula(tensors, name).square().sum()) for name in merged)
    assert f"the LoRA misses {100 * (missed / total) ** 0.5:.1f}% of the sum of the changes (norm)" in caplog.text
    assert 0.005 < missed / total < 0.6


def test_a_convolution_without_a_core_is_recognised_by_its_name() -> None:
    tensors = {key.partition(".")[2]: tensor for key, tensor in loha_of([CONV], 3011, 45).items()}
    module = ModuleWeights(CONV, tensors, {})
    assert module.shape == (9, 5, 3, 3) and module.is_larger_kernel
    base = torch.randn(9, 5, 3, 3)
    expected = base + 0.5 * formula({f"x.{leaf}": t for leaf, t in tensors.items()}, "x").float().view_as(base)
    torch.testing.assert_close(module.merged(base, 0.5), expected, **FLOAT32_SAME_MATH)
    with pytest.raises(ValueError, match="changes a weight of the shape"):
        module.merged(torch.randn(9, 4, 3, 3), 1.0)


@pytest.mark.parametrize("form", range(4))
def test_a_3x3_convolution_is_merged(form: int) -> None:
    names = [f"x{i}" for i in range(form)] + [CONV]
    tensors = {key.partition(".")[2]: t for key, t in lokr_of(names, 6011, 180).items() if key.startswith(CONV)}
    wanted_change = formula({f"x.{leaf}": t for leaf, t in tensors.items()}, "x").float().view(9, 20, 3, 3)
    if "lokr_w2" in tensors:
        tensors["lokr_w2"] = tensors["lokr_w2"].view(
            3, 5, 3, 3
        )  # kohya and LyCORIS keep the kernel dimensions of a full matrix
    module = ModuleWeights(CONV, tensors, {})
    assert module.shape == (9, 20, 3, 3) and module.is_larger_kernel
    base = torch.randn(9, 20, 3, 3)
    torch.testing.assert_close(module.merged(base, 0.5), base + 0.5 * wanted_change, **FLOAT32_SAME_MATH)
    with pytest.raises(ValueError, match="changes a weight of the shape"):
        module.merged(torch.randn(9, 4, 3, 3), 1.0)

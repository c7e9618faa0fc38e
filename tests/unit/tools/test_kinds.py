"""Files of every kind through every tool: merged into a checkpoint or into one LoRA, resized, converted, checked."""

import copy
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from library.architectures.sd.layers import view
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.checkpoints.saving import save_safetensors
from networks.core.files.adapter_file import read_adapter_file
from tests.parity.test_lora_merge import tiny_clip
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.networks.test_forms import perturb
from tools import check_lora_weights, convert_lora, merge_lora, resize_lora, show_metadata

pytestmark = pytest.mark.slow

KINDS: dict[str, tuple[str, int, dict[str, str]]] = {
    "lora": ("lora", 3, {}),
    "dora": ("lora", 3, {"dora_wd": "True"}),
    "dora per output": ("lora", 3, {"dora_wd": "True", "wd_on_output": "True", "conv_dim": "2"}),
    "tucker": ("lora", 3, {"conv_dim": "2", "use_tucker": "True"}),
    "loha": ("loha", 3, {"conv_dim": "2"}),
    "lokr": ("lokr", 2, {"factor": "2", "conv_dim": "2"}),
    "whole lokr": ("lokr", 2, {"factor": "2", "full_matrix": "True"}),
    "oft_v2": ("oft_v2", 4, {"enable_conv": "True"}),
    "shared oft_v2": ("oft_v2", 4, {"block_share": "True"}),
    "boft": ("boft", 4, {"boft_n_butterfly_factor": "2"}),
    "oft": ("oft", 0, {}),
}
DEPENDS = {
    "dora": "DoRA",
    "dora per output": "DoRA",
    "oft_v2": "OFT",
    "shared oft_v2": "OFT",
    "boft": "BOFT",
    "oft": "OFT of outputs",
}
CONV_RANK = 40  # above the number of rows of every layer of the tiny U-Net
MergeCase = tuple[Path, dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def unet_of(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def weights_of(view_of_models: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return the weights of modules by their names in files."""
    flat = {f"lora_unet_{path.replace('.', '_')}": module for path, module in view_of_models.named_modules()}
    return {name: flat[name].weight.detach().clone() for name in names}  # type: ignore[union-attr, operator]


@pytest.fixture(scope="module")
def merge_case(kind: str, tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MergeCase:
    """Return (adapter file for the U-Net, the weights it changes, those weights with the change at strength 0.7)."""
    module_name, rank, arguments = KINDS[kind]
    unet = unet_of(tiny_sd_folder)
    text, view_of_models = view([tiny_clip(9001, torch.float32)], unet)
    path = tmp_path_factory.mktemp("made") / "a.safetensors"
    if module_name == "oft":
        generator = torch.Generator().manual_seed(9002)
        tensors = {}
        for name in ("down_blocks_0_attentions_0_proj_in", "mid_block_attentions_0_proj_out"):
            tensors[f"oft_unet_{name}.oft_blocks"] = torch.randn(4, 4, 4, generator=generator) * 0.2
            tensors[f"oft_unet_{name}.alpha"] = torch.tensor(0.5)
        width = unet.mid_block.attentions[0].proj_out.out_channels
        tensors["oft_unet_mid_block_attentions_0_proj_out.oft_blocks"] = torch.randn(4, width // 4, width // 4) * 0.2
        save_safetensors(path, tensors, {"ss_base_model_version": "sd_v1"})
    else:
        module: Any = import_module(f"networks.{module_name}")
        network = module.create_network(1.0, rank, 2.0, None, None, view_of_models, **arguments)
        perturb(network, 9003)
        network.save_weights(str(path), None, {"ss_network_module": f"networks.{module_name}"})
    names = [name.replace("oft_unet", "lora_unet") for name in read_adapter_file(path).modules]
    before = weights_of(view_of_models, names)
    module = import_module(f"networks.{module_name}")
    merging, weights = module.create_network_from_weights(
        0.7, str(path), None, text, view_of_models, for_inference=True
    )
    merging.merge_to(text, view_of_models, weights, torch.float32, "cpu")
    after = weights_of(view_of_models, names)
    assert all((after[name] - before[name]).norm() > 0.01 for name in names)
    return path, before, after


def test_merging_into_a_checkpoint_equals_merging_the_network(
    merge_case: MergeCase, tiny_sd_folder: Path, tmp_path: Path
) -> None:
    path, _, after = merge_case
    words = ["--sd_model", str(tiny_sd_folder), "--models", str(path), "--ratios", "0.7", "--save_to"]
    assert merge_lora.main([*words, str(tmp_path / "merged")]) == 0
    _, view_of_models = view([tiny_clip(9001, torch.float32)], unet_of(tmp_path / "merged"))
    for name, weight in weights_of(view_of_models, list(after)).items():
        torch.testing.assert_close(weight, after[name], **FLOAT32_SAME_MATH)


@pytest.mark.parametrize("rank", [2, CONV_RANK])
def test_a_merged_lora_is_the_best_of_its_rank_and_its_error_is_logged(
    kind: str, merge_case: MergeCase, tiny_sd_folder: Path, tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path, before, after = merge_case
    out = str(tmp_path / "b.safetensors")
    words = ["--models", str(path), "--ratios", "0.7", "--new_rank", str(rank), "--save_to", out]
    assert merge_lora.main([*words, *(["--base_model", str(tiny_sd_folder)] if kind in DEPENDS else [])]) == 0
    modules = read_adapter_file(tmp_path / "b.safetensors").modules
    assert modules.keys() == before.keys() and {module.layout.name for module in modules.values()} == {"low_rank"}
    missed = total = 0.0
    for name, module in modules.items():
        change = (after[name] - before[name]).double().flatten(1)
        tail = torch.linalg.svdvals(change)[rank:].square().sum().item()
        residual = (change - module.weight(torch.float64).flatten(1)).square().sum().item()
        assert residual <= tail * 1.0001 + 1e-9 * change.square().sum().item()
        missed, total = missed + tail, total + change.square().sum().item()
    reported = re.findall(r"the LoRA misses ([\d.]+)% of the sum", caplog.text)
    share = (missed / total) ** 0.5
    if share > 1e-4:
        assert [float(number) for number in reported] == [pytest.approx(100 * share, abs=0.06)]
    assert read_metadata(tmp_path / "b.safetensors")["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize("kind", DEPENDS, indirect=True)
def test_kinds_that_depend_on_the_base_weight_require_the_base_model(
    kind: str, merge_case: MergeCase, tiny_sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--models", str(merge_case[0]), "--save_to", str(tmp_path / "b.safetensors")]
    for more, message in (
        (["--new_rank", "4"], rf"is {DEPENDS[kind]}, whose change depends on the base weight; .*--base_model"),
        (["--concat", "--base_model", str(tiny_sd_folder)], rf"is {DEPENDS[kind]}, not exactly a LoRA; use --new_rank"),
    ):
        assert merge_lora.main([*words, *more]) == 1
        assert re.search(message, capsys.readouterr().err)
    if not kind.startswith("dora"):
        assert merge_lora.main([*words, "--base_model", str(tiny_sd_folder)]) == 1
        assert "--new_rank is required: --models have no rank" in capsys.readouterr().err
        assert resize_lora.main(["--model", str(merge_case[0]), "--save_to", str(tmp_path / "c.safetensors")]) == 1
        assert f"is {DEPENDS[kind]}, which has no rank to reduce; convert it to a LoRA with" in capsys.readouterr().err


def test_two_kinds_are_merged_into_one_lora(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """LoRA and OFT on the same layers: the sum of their changes of the base weight."""
    _, view_of_models = view([tiny_clip(9001, torch.float32)], unet_of(tiny_sd_folder))
    files, changes = [], []
    for number, module_name in enumerate(("lora", "oft_v2")):
        module: Any = import_module(f"networks.{module_name}")
        network = module.create_network(1.0, 4, 2.0, None, None, view_of_models)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9010 + number)) * 0.2
                )
        files.append(str(tmp_path / f"{module_name}.safetensors"))
        network.save_weights(files[-1], None, {})
        merged = {name: adapter.merged()["weight"].detach() for name, adapter in network.adapters.items()}
        changes.append(
            {name: merged[name] - weight for name, weight in weights_of(view_of_models, list(merged)).items()}
        )
    out = tmp_path / "both.safetensors"
    words = ["--models", *files, "--ratios", "0.5", "1.5", "--new_rank", str(CONV_RANK), "--save_to", str(out)]
    assert merge_lora.main([*words, "--base_model", str(tiny_sd_folder)]) == 0
    for name, module in read_adapter_file(out).modules.items():
        expected = 0.5 * changes[0][name] + 1.5 * changes[1][name]
        torch.testing.assert_close(module.weight(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "whole lokr"], indirect=True)
def test_the_rank_of_the_merged_lora_defaults_to_that_of_the_files(
    kind: str, merge_case: MergeCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LoKr with two full matrices has no rank, so the rank of the other file is used or an error asks for one."""
    out = tmp_path / "b.safetensors"
    words = ["--models", str(merge_case[0]), "--save_to", str(out)]
    if kind == "whole lokr":
        assert merge_lora.main(words) == 1
        assert "--new_rank is required: --models have no rank" in capsys.readouterr().err
        name = next(iter(merge_case[1]))
        num_rows, num_columns = merge_case[1][name].flatten(1).shape
        other = {
            f"{name}.lora_up.weight": torch.ones(num_rows, 5),
            f"{name}.lora_down.weight": torch.ones(5, num_columns),
        }
        save_safetensors(tmp_path / "o.safetensors", other, {})
        words = ["--models", str(merge_case[0]), str(tmp_path / "o.safetensors"), "--save_to", str(out)]
    assert merge_lora.main(words) == 0
    ranks = {module.rank for module in read_adapter_file(out).modules.values()}
    assert ranks == {5 if kind == "whole lokr" else 3}


def test_an_unneeded_base_model_is_warned_about(
    tiny_sd_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    save_safetensors(
        tmp_path / "a.safetensors",
        {f"{name}.lora_up.weight": torch.ones(9, 2, 1, 1), f"{name}.lora_down.weight": torch.ones(2, 9, 1, 1)},
        {},
    )
    words = ["--models", str(tmp_path / "a.safetensors"), "--base_model", str(tiny_sd_folder), "--save_to"]
    assert merge_lora.main([*words, str(tmp_path / "b.safetensors")]) == 0
    assert "--base_model has no effect: the changes of --models do not depend on it" in caplog.text
    assert merge_lora.main([*words, str(tmp_path / "c"), "--sd_model", str(tiny_sd_folder)]) == 1
    assert (
        "--base_model is only for merging into one LoRA and cannot be used with --sd_model" in capsys.readouterr().err
    )


def test_files_of_every_kind_are_checked_shown_and_converted(
    kind: str, merge_case: MergeCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = merge_case[0]
    assert check_lora_weights.main(["--model", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_usable"] and report["base"] == "sd1" and not report["problems"]
    for module in report["modules"]:
        assert module["update_norm"] > 0 and module["rank"] >= 1
        assert (module["alpha"] is None) == ("oft" in kind)
    assert check_lora_weights.main(["--model", str(path)]) == 0
    assert show_metadata.main([str(path)]) == 0
    capsys.readouterr()
    out = tmp_path / "there.safetensors"
    done = convert_lora.main(["--model", str(path), "--save_to", str(out), "--to", "generic"])
    if "oft" in kind:
        assert done == 1 and "the generic naming has no place for" in capsys.readouterr().err
    elif kind in ("lora", "loha", "lokr", "whole lokr"):
        assert done == 0
        back = tmp_path / "back.safetensors"
        assert convert_lora.main(["--model", str(out), "--save_to", str(back), "--to", "kohya"]) == 0
        original, converted = read_adapter_file(path).modules, read_adapter_file(back).modules
        for name, module in original.items():
            torch.testing.assert_close(converted[name].weight(), module.weight(), rtol=1e-5, atol=1e-6)


def test_names_of_networks_oft_are_converted_to_the_usual_ones(tmp_path: Path) -> None:
    name = "unet_mid_block_attentions_0_proj_in"
    blocks = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(9021))
    tensors = {f"oft_{name}.oft_blocks": blocks, f"oft_{name}.alpha": torch.tensor(0.001)}
    save_safetensors(tmp_path / "a.safetensors", copy.copy(tensors), {"ss_base_model_version": "sd_v1"})
    words = ["--model", str(tmp_path / "a.safetensors"), "--save_to", str(tmp_path / "b.safetensors"), "--to", "kohya"]
    assert convert_lora.main(words) == 0
    saved = load_state_dict(tmp_path / "b.safetensors")
    assert saved.keys() == {f"lora_{name}.oft_blocks", f"lora_{name}.alpha"}
    assert torch.equal(saved[f"lora_{name}.oft_blocks"], blocks)

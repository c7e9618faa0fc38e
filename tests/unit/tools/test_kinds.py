"""Files of every kind through every tool: merged into a checkpoint or into one LoRA, resized, converted, checked."""

import copy
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd.layers import view
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.checkpoints.saving import save_safetensors
from library.commands.base_models import find_adapter_targets, open_base_model
from networks import sdxl_merge_lora, svd_merge_lora
from networks.core.files.adapter_file import read_adapter_file
from tests.hiding import lazily
from tests.parity.test_dit_lora import tiny_clip
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.networks.test_forms import perturb
from tests.unit.tools.adapter_files import write as write_small_adapter
from tools import check_lora_weights, convert_lora, merge_flux_lora, merge_lora, resize_lora, show_metadata

diffusers = lazily("diffusers")

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


def unet_of(folder: Path) -> Any:
    return diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


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


# --lbws of the merge commands, checked against a float64 computation from key names alone.

ORDER = ["BASE", *(f"IN{n:02d}" for n in range(12)), "MID", *(f"OUT{n:02d}" for n in range(12))]
NAMED = {  # the blocks that lists of each length name, as in sd-scripts' documentation
    17: ["BASE", *(f"IN{n:02d}" for n in (1, 2, 4, 5, 7, 8)), "MID", *(f"OUT{n:02d}" for n in range(3, 12))],
    26: ORDER,
    12: ["BASE", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{n:02d}" for n in range(6))],
    20: [name for name in ORDER if not re.fullmatch(r"(IN|OUT)(09|10|11)", name)],
}
LEVEL = re.compile(r"_(down|up)_blocks_(\d)_(resnets|attentions|downsamplers|upsamplers)_(\d)")
NUMBERED = re.compile(r"lora_unet_(input|output)_blocks_(\d+)_")


def block_of(name: str) -> str:
    """Return the block of a key in kohya's format, numbered as in diffusers or as in the single-file layout."""
    if name.startswith("lora_te"):
        return "BASE"
    if match := NUMBERED.match(name):
        return f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02d}"
    if match := LEVEL.search(name):
        level, part, index = int(match[2]), match[3], int(match[4])
        position = 2 if part.endswith("samplers") else index
        return f"IN{3 * level + position + 1:02d}" if match[1] == "down" else f"OUT{3 * level + position:02d}"
    return "MID" if "_mid" in name else ""


def random_strengths(length: int, seed: int) -> list[float]:
    """Return random strengths, one of which is 0 and one negative."""
    drawn = torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).round(decimals=3)
    drawn[3], drawn[5] = 0.0, -0.5
    return [float(value) for value in drawn]


def write_adapter(path: Path, base: Path, seed: int, version: str) -> Path:
    """A LoRA of rank 2 on every layer that conv_dim adapts."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for site in (
        site
        for target_modules in find_adapter_targets(open_base_model("--sd_model", base), True)
        for site in target_modules
    ):
        outputs, inputs, *kernel = site.module.weight.shape  # type: ignore[union-attr, misc]
        tensors[f"{site.name}.lora_down.weight"] = torch.randn(2, inputs, *kernel, generator=generator)
        tensors[f"{site.name}.lora_up.weight"] = torch.randn(outputs, 2, *(1,) * len(kernel), generator=generator)
        tensors[f"{site.name}.alpha"] = torch.tensor(3.0)
    save_safetensors(path, tensors, {"ss_base_model_version": version})
    return path


def changes(path: Path) -> dict[str, Tensor]:
    """Return the change of each module of a LoRA as a float64 matrix."""
    tensors = {key: tensor.double() for key, tensor in load_state_dict(path).items()}
    change_by_module = {}
    for name in dict.fromkeys(key.partition(".")[0] for key in tensors):
        up, down = (tensors[f"{name}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        change_by_module[name] = up @ down * float(tensors[f"{name}.alpha"]) / down.shape[0]
    return change_by_module


def weighted_changes(path: Path, ratio: float, weights: list[float]) -> dict[str, Tensor]:
    by_block = dict(zip(NAMED[len(weights)], weights, strict=True))
    return {name: ratio * by_block.get(block_of(name), 1.0) * change for name, change in changes(path).items()}


def as_json(values: list[float]) -> str:
    return json.dumps(values)


@pytest.mark.parametrize("length", [17, 26])
def test_merging_two_sd_loras_applies_the_strength_of_each_block(
    tmp_path: Path, tiny_sd_file: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = (write_adapter(tmp_path / f"{seed}.safetensors", tiny_sd_file, seed, "sd_v1") for seed in (91, 92))
    lists, out = [random_strengths(length, 93), random_strengths(length, 94)], tmp_path / "m.safetensors"
    lists[1][3] = 0.25  # the block that the first file does not contribute to
    arguments = ["--models", str(a), str(b), "--ratios", "0.5", "-2", "--lbws", *map(as_json, lists)]
    assert svd_merge_lora.main([*arguments, "--new_rank", "4", "--save_to", str(out)]) == 0
    first, second, merged = weighted_changes(a, 0.5, lists[0]), weighted_changes(b, -2.0, lists[1]), changes(out)
    assert merged.keys() == first.keys() == second.keys()
    for name, change in merged.items():
        torch.testing.assert_close(change, first[name] + second[name], rtol=1e-4, atol=2e-5)  # float32, by SVD
    assert ("are in no block of a list of 17 (IN03" in caplog.text) == (length == 17)


@pytest.mark.parametrize("length", [12, 20, 26])
def test_merging_into_an_sdxl_checkpoint_applies_the_strength_of_each_block(
    tmp_path: Path, tiny_sdxl_file: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = write_adapter(tmp_path / "a.safetensors", tiny_sdxl_file, 95, "sdxl_base_v1-0")
    weights, out = random_strengths(length, 96), tmp_path / "m.safetensors"
    arguments = ["--sd_model", str(tiny_sdxl_file), "--models", str(adapter), "--ratios", "0.8", "--lbws"]
    assert sdxl_merge_lora.main([*arguments, as_json(weights), "--save_to", str(out)]) == 0
    before, after = load_state_dict(tiny_sdxl_file), load_state_dict(out)
    expected = weighted_changes(adapter, 0.8, weights)
    num_checked = 0
    for key, old in before.items():
        if not key.startswith("model.diffusion_model.") or not key.endswith(".weight"):
            continue
        name = "lora_unet_" + key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        change = expected.get(name)
        if change is None:
            assert torch.equal(after[key], old)
            continue
        num_checked += 1
        torch.testing.assert_close(after[key], (old.double() + change.reshape(old.shape)).float(), **FLOAT32_SAME_MATH)
    assert num_checked == sum(name.startswith("lora_unet_") for name in expected) > 50
    assert ("IN09" in caplog.text) == (length == 26)  # blocks that SDXL lacks


def test_a_strength_of_zero_excludes_the_block(tmp_path: Path, tiny_sd_file: Path) -> None:
    adapter, out = write_adapter(tmp_path / "a.safetensors", tiny_sd_file, 97, "sd_v1"), tmp_path / "m.safetensors"
    only_text = ",".join(["1"] + ["0"] * 25)
    assert merge_lora.main(["--models", str(adapter), "--lbws", only_text, "--save_to", str(out)]) == 0
    assert {key[:8] for key in load_state_dict(out)} == {"lora_te_"}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (["[1,2]"], "--lbws has a list of 2 numbers,"),
        (["[" + "1," * 11 + "1]"], "is for Stable Diffusion 1.x, which needs 17 or 26"),
        (["[1,two]"], 'has "[1,two]", which is not a list of numbers'),
        (["1", "1"], "--lbws has 2 lists, but --models 1"),
        (["0," * 25 + "0"], "--lbws gives every module of"),
    ],
)
def test_invalid_lists_are_refused(
    tmp_path: Path, lists: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_small_adapter(tmp_path / "a.safetensors", 98, {})
    tensors = load_state_dict(adapter)
    save_safetensors(adapter, tensors, {"ss_base_model_version": "sd_v1"})
    out = tmp_path / "m.safetensors"
    assert merge_lora.main(["--models", str(adapter), "--save_to", str(out), "--lbws", *lists]) == 1
    assert message in capsys.readouterr().err and not out.exists()


def test_lbws_is_refused_for_a_model_without_a_unet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(48, 2)}
    save_safetensors(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "flux1"})
    arguments = ["--models", str(tmp_path / "a.safetensors"), "--lbws", "1,1", "--save_to", str(tmp_path / "m.sft")]
    assert merge_lora.main(arguments) == 1
    assert "is for FLUX.1, which has none" in capsys.readouterr().err
    assert merge_flux_lora.main(arguments) == 1
    assert "FLUX.1" in capsys.readouterr().err

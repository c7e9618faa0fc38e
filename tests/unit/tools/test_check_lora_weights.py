"""Tools that choose adapter files and show what they hold, also of damaged ones, run as commands."""

import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.sd.load import open_loader
from library.base.errors import UserError
from library.checkpoints.files import display_path
from library.checkpoints.relative_change import format_change
from library.checkpoints.saving import save_safetensors
from library.options.model import ModelOptions
from library.options.output.saving import SavingOptions
from library.options.train import TrainOptions
from library.training.saving.saved_files import drop_copies
from networks import lora_interrogator
from tests.tiny.sd import CLIP
from tests.tiny.sdxl import WIDTH2
from tests.unit.tools import adapter_files
from tests.unit.tools.adapter_files import CONV, LINEAR, METADATA, tensors, write
from tools import check_lora_weights, convert_lora, interrogate_lora, merge_lora, resize_lora, show_metadata
from tools.check_lora_weights import format_text, judge, main
from tools.contact_sheet import choose_files, label_rows
from tools.show_metadata import main as run_show_metadata

ROOT = Path(__file__).parents[3]
TOY = ROOT / "configs" / "quickstart" / "toy_base"
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def test_an_intact_file_exits_with_0_and_lists_its_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.safetensors", 950)
    assert main(["--model", str(path)]) == 0
    output = capsys.readouterr().out
    assert "9 keys (9 float32), 3 modules, Stable Diffusion 1.x" in output
    assert "all used by ComfyUI, Forge, A1111-style, diffusers, stable-diffusion.cpp" in output
    rows = {line.split()[0]: line.split()[1:4] for line in output.splitlines() if line.startswith("  ")}
    assert rows["down_blocks_0"] == rows["up_blocks_2"] == rows["encoder_layers_3"] == ["1", "4", "2"]


def test_json_has_the_norms_of_the_full_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.safetensors", 951)
    assert main(["--model", str(path), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    content = tensors(951)
    up, down = content[f"{CONV}.lora_up.weight"].flatten(1), content[f"{CONV}.lora_down.weight"].flatten(1)
    (block,) = [b for b in report["blocks"] if b["block"] == "up_blocks_2"]
    assert block["update_norm"] == pytest.approx(float((0.5 * up.double() @ down.double()).norm()), rel=1e-10)
    assert report["is_usable"] and report["base"] == "sd1" and report["dtypes"] == {"float32": 9}
    assert [p["amount"] for p in report["programs"]] == ["all"] * 5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_exit_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float) -> None:
    broken = tensors(952)[f"{LINEAR}.lora_up.weight"]
    broken[1, 2] = value
    path = write(tmp_path / "a.safetensors", 952, {f"{LINEAR}.lora_up.weight": broken})
    assert main([str(path)]) == 1
    assert f"problem: {LINEAR}.lora_up.weight has 1 of 28 values that are not finite" in capsys.readouterr().out
    assert main([str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["is_usable"] is False


def test_alphas_without_factors_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tensors(954)
    del content[f"{CONV}.lora_down.weight"], content[f"{CONV}.lora_up.weight"]
    save_safetensors(tmp_path / "a.safetensors", content)
    assert main(["--model", str(tmp_path / "a.safetensors")]) == 0
    assert f"warning: alphas without weights, which have no effect: {CONV}.alpha" in capsys.readouterr().out


def test_a_factor_without_its_partner_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tensors(953)
    del content[f"{CONV}.lora_down.weight"]
    save_safetensors(tmp_path / "a.safetensors", content)
    assert main(["--model", str(tmp_path / "a.safetensors")]) == 1
    assert f"{CONV}.lora_up.weight without its down factor" in capsys.readouterr().out


def test_a_file_without_an_adapter_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_safetensors(tmp_path / "a.safetensors", {"something": torch.ones(2)})
    assert main(["--model", str(tmp_path / "a.safetensors")]) == 1
    assert "no adapter weights (first keys: something)" in capsys.readouterr().out


def test_a_truncated_file_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.safetensors", 954)
    path.write_bytes(path.read_bytes()[:-8])
    assert main(["--model", str(path)]) == 1
    assert "it is truncated" in capsys.readouterr().err


def test_unusual_but_usable_content_is_a_warning() -> None:
    content = tensors(955) | {
        "bundle_emb.x": torch.ones(1),
        "lora_unet_down_blocks_7_conv.lora_down.weight": torch.ones(1, 2),
        "lora_unet_down_blocks_7_conv.lora_up.weight": torch.zeros(2, 1),
    }
    report = judge(content, {}, "x")
    assert report.problems == []
    assert report.warnings == [
        "keys that belong to no adapter: bundle_emb.x",
        "Stable Diffusion 1.x has no modules of these names: lora_unet_down_blocks_7_conv",
        "all zeros, without effect: lora_unet_down_blocks_7_conv",
    ]


def test_show_all_keys_lists_every_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path / "a.safetensors", 956)), "--show_all_keys"]) == 0
    output = capsys.readouterr().out
    assert all(f"{key} float32 {list(t.shape)} norm {float(t.norm()):.4g}" in output for key, t in tensors(956).items())


@pytest.mark.slow
def test_the_old_path_is_the_same_command(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", 957)
    done = subprocess.run(
        [sys.executable, "networks/check_lora_weights.py", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "3 modules, Stable Diffusion 1.x" in done.stdout


def test_the_size_is_said_beside_the_base_models_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One layer of the toy base model changed by a hundredth of its weight."""
    weight = load_file(TOY / "unet" / "diffusion_pytorch_model.safetensors")[LAYER]
    path = tmp_path / "a.safetensors"
    name = f"lora_unet_{LAYER.removesuffix('.weight').replace('.', '_')}"
    save_safetensors(path, {f"{name}.diff": weight * 0.01})
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"|change| is {float(weight.norm()) / 100:.4g}; --base")
    assert main([str(path), "--base_model", str(TOY)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"compared with the base model (1 of 1 modules), {format_change(0.01)}" and "1.00%" in last
    assert main([str(write(tmp_path / "b.safetensors", 958)), "--base_model", str(TOY)]) == 1


@pytest.mark.parametrize(
    ("name", "endings"),
    [
        ("lora_unet_double_blocks_{i}_img_attn_qkv", ["mora_a", "mora_b"]),  # a kind that nobody knows
        ("diffusion_model.x.{i}.attn", ["lora_up.weight"]),  # every down factor is missing
        ("transformer_blocks.{i}.attn.to_q", ["weight", "bias"]),  # no adapter
        ("lora_unet_double_blocks_{i}_img_mlp_0", [f"kind_{n}" for n in range(60)]),
    ],
)
def test_many_modules_of_an_unknown_kind_take_few_lines(name: str, endings: list[str]) -> None:
    file = {f"{name.format(i=i)}.{ending}": torch.ones(2, 2) for i in range(100) for ending in endings}
    report = judge(file, {}, "a.safetensors")
    assert 4 < len(list(format_text(report))) <= 40


# tools/show_metadata.py, run as a command.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a.safetensors", 960)


def test_sections_json_dates_and_tags_are_formatted(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_show_metadata(["--model", str(path)]) == 0
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if not line.startswith(" ")] == [
        "model:",
        "training:",
        "hashes:",
        "other:",
    ]
    assert "  modelspec.title: my cat\n" in output
    assert '  ss_network_args:\n    {\n      "conv_dim": "2"\n    }\n' in output
    assert "ss_training_started_at: 1700000000.5 (2023-11-14 22:13:20 UTC)" in output
    tags = output.partition("ss_tag_frequency:\n")[2].splitlines()[:4]
    assert [line.split() for line in tags[:4]] == [["10", "sitting"], ["9", "cat"], ["7", "dog"], tags[3].split()]


def test_only_the_most_common_tags_are_listed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_show_metadata([str(path), "--num_tags", "1"]) == 0
    output = capsys.readouterr().out
    assert "10 sitting" in output and "9 cat" not in output and "and 2 more; --num_tags 3 shows all" in output


def test_one_key_is_printed_as_it_is(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_show_metadata(["--model", str(path), "--key", "ss_network_args"]) == 0
    assert capsys.readouterr().out == METADATA["ss_network_args"] + "\n"


def test_an_unknown_key_is_an_error_that_lists_the_known_keys(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_show_metadata(["--model", str(path), "--key", "ss_dim"]) == 1
    assert "--key ss_dim" in (error := capsys.readouterr().err) and "ss_network_dim" in error


def test_json_output_parses_nested_json_and_keeps_other_texts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_show_metadata(["--model", str(path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content.keys() == METADATA.keys()
    assert content["ss_network_args"] == {"conv_dim": "2"} and content["ss_network_dim"] == "4"


def test_metadata_is_never_executed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_show_metadata(["--model", str(path)]) == 0
    assert f"note: {METADATA['note']}" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


def test_control_characters_are_escaped_and_long_texts_shortened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_safetensors(tmp_path / "b.safetensors", {"x": torch.ones(1)}, {"a": "\x1b[2J", "b": "p" * 5000, "c": "[oops"})
    assert run_show_metadata(["--model", str(tmp_path / "b.safetensors")]) == 0
    output = capsys.readouterr().out
    assert "a: \\x1b[2J\n" in output and f"b: {'p' * 80}... (5000 characters)" in output and "c: [oops" in output


def test_a_file_without_metadata_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_safetensors(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    assert run_show_metadata(["--model", str(tmp_path / "b.safetensors")]) == 0
    assert capsys.readouterr().out == "the file has no metadata\n"


@pytest.mark.parametrize(("name", "message"), [("x.ckpt", "only safetensors"), ("y.safetensors", "does not exist")])
def test_files_without_a_header_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "x.ckpt")
    assert run_show_metadata(["--model", str(tmp_path / name)]) == 1
    assert message in capsys.readouterr().err


# tools/interrogate_lora.py: tokens are sorted by how much a LoRA changes their encoding.

LINE = re.compile(r"\[ *\d+\]: *(\d+) .*: (\d+\.\d+)")


def read_scores(capsys: pytest.CaptureFixture[str]) -> dict[int, float]:
    """Return the printed score by token, in the order of the lines."""
    matches = [LINE.fullmatch(line) for line in capsys.readouterr().out.splitlines()]
    return {int(match[1]): float(match[2]) for match in matches if match is not None}


def test_scores_match_the_installed_network(
    tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recompute one score in float64 from the factors."""
    generator = torch.Generator().manual_seed(5)
    options = TrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(tiny_sd_folder)))
    (encoder,) = open_loader(options).text_encoders()
    layer = dict(encoder.double().named_modules())
    path = next(name for name in layer if name.endswith("encoder.layers.1.mlp.fc1"))
    outputs, inputs = layer[path].weight.shape  # type: ignore[union-attr, misc]
    down, up = torch.randn(2, inputs, generator=generator), torch.randn(outputs, 2, generator=generator)
    name = "lora_te_text_model_encoder_layers_1_mlp_fc1"
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)},
        tmp_path / "a.safetensors",
    )
    words = ["--sd_model", str(tiny_sd_folder), "--model", str(tmp_path / "a.safetensors"), "--batch_size", "7"]
    assert interrogate_lora.main([*words, "--top", "5"]) == 0
    score_by_token = read_scores(capsys)
    assert len(score_by_token) == 5
    scores = list(score_by_token.values())
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0
    num_words = encoder.config.vocab_size
    ids = torch.tensor([[num_words - 2, next(iter(score_by_token)), num_words - 1]])
    with torch.no_grad():
        before = encoder(ids).last_hidden_state
        layer[path].weight += 0.5 * up.double() @ down.double()  # type: ignore[operator]
        after = encoder(ids).last_hidden_state
    assert scores[0] == pytest.approx(float((after - before).abs().mean()), abs=1e-5)  # five digits are shown


def test_both_text_encoders_of_sdxl_are_scored(
    tmp_path: Path, tiny_sdxl_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, generator = {}, torch.Generator().manual_seed(6)
    for prefix, width in (("lora_te1", CLIP["hidden_size"]), ("lora_te2", WIDTH2)):
        name = f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj"
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(width, 2, generator=generator)
    scores = []
    for prefix_kept in ("lora_te1", "lora_te2", "lora_te"):
        save_file({k: v for k, v in tensors.items() if k.startswith(prefix_kept)}, tmp_path / "a.safetensors")
        words = ["--sd_model", str(tiny_sdxl_folder), "--model", str(tmp_path / "a.safetensors"), "--top", "100000"]
        assert lora_interrogator.main([*words, "--clip_skip", "2"]) == 0
        scores.append(read_scores(capsys))
    assert len(scores[2]) > 10
    for token, score in scores[2].items():
        assert score == pytest.approx((scores[0][token] + scores[1][token]) / 2, abs=2e-5)  # five digits are shown


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unet", "changes no text encoder of Stable Diffusion 1.x"),
        ("skip", "--clip_skip is 99, but the text encoder has"),
        ("flux", "is a FLUX model; supported:"),
    ],
)
def test_unusable_inputs_are_refused_with_the_reason(
    tmp_path: Path, tiny_sd_folder: Path, case: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = adapter_files.tensors(7)
    if case == "unet":
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith("lora_unet")}
    save_file(tensors, tmp_path / "a.safetensors")
    base = tiny_sd_folder
    if case == "flux":
        from tests.tiny.flux import build_tiny_flux

        base = Path(build_tiny_flux(tmp_path / "flux", 8)[1])
    words = ["--sd_model", str(base), "--model", str(tmp_path / "a.safetensors")]
    assert interrogate_lora.main([*words, "--clip_skip", "99"] if case == "skip" else words) == 1
    assert message in capsys.readouterr().err


# Tools given an adapter file whose header the safetensors library rejects.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return an adapter file with half of a surrogate pair in its metadata."""
    name = "lora_unet_mid_block.lora_down.weight"
    header = {name: {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}, "__metadata__": {"ss_tag": "\ud800"}}
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    return path


COMMANDS = {
    "check": (check_lora_weights.main, ["{file}"]),
    "show": (show_metadata.main, ["--model", "{file}"]),
    "resize": (resize_lora.main, ["--model", "{file}", "--save_to", "{out}", "--new_rank", "1"]),
    "convert": (convert_lora.main, ["--model", "{file}", "--save_to", "{out}", "--to", "diffusers"]),
    "merge": (merge_lora.main, ["--models", "{file}", "--ratios", "1", "--save_to", "{out}"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_half_a_surrogate_pair_in_the_metadata_is_named(
    name: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, words = COMMANDS[name]
    status = main([word.format(file=file, out=tmp_path / "out.safetensors") for word in words])
    assert status == 1 and "half of a surrogate pair" in capsys.readouterr().err


@pytest.mark.parametrize("metadata", [[], 0, "", False, [1], "x", 1.5, {"a": 1}], ids=str)
@pytest.mark.parametrize("command", COMMANDS)
def test_metadata_of_another_type_are_named(
    command: str, metadata: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    name = "lora_unet_mid_block.lora_down.weight"
    header = {name: {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}, "__metadata__": metadata}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    main, words = COMMANDS[command]
    assert main([word.format(file=path, out=tmp_path / "out.safetensors") for word in words]) == 1
    assert (
        f"{path} is not a complete safetensors file: its metadata does not map names to strings"
        in capsys.readouterr().err
    )


# The adapter files that contact_sheet.py and choose_checkpoint.py use.


def test_a_folder_saved_by_peft_resolves_to_the_file_in_it(tmp_path: Path) -> None:
    inside, file = tmp_path / "saved" / "adapter_model.safetensors", tmp_path / "a.safetensors"
    inside.parent.mkdir()
    inside.touch()
    file.touch()
    assert choose_files([inside.parent, file], SavingOptions()) == [inside, file]
    with pytest.raises(UserError, match=r"--files .* is a folder without adapter_model\.safetensors"):
        choose_files([tmp_path], SavingOptions())
    with pytest.raises(UserError, match=r"--files .*none\.pt does not exist"):
        choose_files([tmp_path / "none.pt"], SavingOptions())


def test_peft_files_are_labelled_by_their_folders() -> None:
    files = [Path("out/cat.v2/adapter_model.safetensors"), Path("out/dog/adapter_model.bin"), Path("out/a.safetensors")]
    assert label_rows(files) == ["without an adapter", "cat.v2", "dog", "a"]
    assert [display_path(path).name for path in files] == ["cat.v2", "dog", "a.safetensors"]
    assert display_path(Path("adapter_model.safetensors")) == Path("adapter_model.safetensors")


def test_copies_of_an_adapter_are_used_once(tmp_path: Path) -> None:
    """Even with other training metadata; another alpha, shape or PEFT setting makes another adapter."""
    weights = {"a.lora_down.weight": torch.arange(6.0).reshape(2, 3), "a.alpha": torch.tensor(1.0)}
    original, step, other, alpha = (tmp_path / f"{name}.safetensors" for name in ("one", "step", "other", "alpha"))
    save_file(weights, original, {"ss_steps": "4"})
    save_file(weights, step, {"ss_steps": "4", "modelspec.date": "today"})
    save_file({**weights, "a.lora_down.weight": torch.arange(6.0).reshape(3, 2)}, other, {"ss_steps": "4"})
    save_file({**weights, "a.alpha": torch.tensor(2.0)}, alpha, {"ss_steps": "4"})
    pickled = [tmp_path / "one.pt", tmp_path / "two.pt"]
    torch.save(weights, pickled[0])
    pickled[1].write_bytes(pickled[0].read_bytes())
    peft = [tmp_path / name / "adapter_model.safetensors" for name in ("p1", "p2", "p3")]
    for path, text in zip(peft, ("1", "2", "1"), strict=True):
        path.parent.mkdir()
        save_file(weights, path)
        (path.parent / "adapter_config.json").write_text(f'{{"lora_alpha": {text}}}')
    unique = drop_copies([original, step, other, alpha, *pickled, *peft])
    assert unique == [original, other, alpha, pickled[0], peft[0], peft[1]]

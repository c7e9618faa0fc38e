"""tools/interrogate_lora.py: tokens are sorted by how much a LoRA changes their encoding."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.architectures.sd.load import open_loader
from library.options.model import ModelOptions
from library.options.train import TrainOptions
from networks import lora_interrogator
from tests.tiny.sd import CLIP
from tests.tiny.sdxl import WIDTH2
from tests.unit.tools import adapter_files
from tools import interrogate_lora

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

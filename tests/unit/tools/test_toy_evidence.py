"""Toy experiments: tables with standard errors, guidance as an input, and the image generator."""

import copy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.results_page import put_into
from benchmarks.toys import evidence, experiments
from benchmarks.toys.check_adapter import read_shares
from benchmarks.toys.make_distilled_toy import GuidanceInput, Noisy
from library.base.errors import UserError
from library.environment.running import child_environment
from tests.parity.test_dit_lora import tiny_clip, tiny_unet
from tests.tiny.init import fixed_init
from tests.tolerances import FLOAT32_SAME_MATH
from tools.quickstart.sampling import merge_lora

PAGE = "# Results\n\n## First\n\ntext\n\n## Not measured yet\n\nmuch\n"


class Made:
    """An experiment whose figures are known."""

    __doc__ = "Two rows."
    COLUMNS = ("shape", "colour")

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def run(self, seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
        self.seeds.append(seed)
        (folder / "drawn.txt").write_text(str(seed))
        return {"before": (0.0, 0.5), "after": (seed * seed / 10, 1 / seed)}


def test_each_cell_is_the_mean_of_the_seeds_with_its_standard_error(tmp_path: Path) -> None:
    experiment = Made()
    figures = [evidence.measure(experiment, seed, tmp_path) for seed in (3, 1, 2)]
    lines = list(evidence.describe("made", experiment, figures))
    assert lines[-2:] == ["| before | 0.0 % | 50.0 % |", "| after | 46.7 ± 23.3 % | 61.1 ± 20.0 % |"]
    assert "Two rows." in lines and lines[-4:-2] == ["| | shape | colour |", "|---|---|---|"]
    assert (tmp_path / "seed_2" / "drawn.txt").read_text() == "2"


def test_a_seed_with_figures_is_not_run_again(tmp_path: Path) -> None:
    experiment = Made()
    first, again = (evidence.measure(experiment, 2, tmp_path) for _ in range(2))
    assert experiment.seeds == [2]
    assert [tuple(row) for row in again.rows.values()] == [tuple(row) for row in first.rows.values()]


@pytest.mark.parametrize(
    "content",
    [
        "not JSON",
        "[1]",
        "{}",
        '{"rows": {"a": [0.5]}, "cpu_seconds": 1}',
        '{"rows": {"a": ["b", 1]}, "cpu_seconds": 1}',
    ],
)
def test_figures_of_another_program_are_named_and_kept_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    experiment = Made()
    monkeypatch.setattr(evidence, "load_experiment", lambda name: experiment)
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "page.md")
    foreign = tmp_path / "merging" / "seed_3.json"
    foreign.parent.mkdir()
    foreign.write_text(content)
    assert evidence.main(["quickstart", "merging", "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert f"{foreign} does not have the figures" in message and "--output" in message
    assert foreign.read_text() == content and experiment.seeds == []


def test_seeds_with_different_rows_give_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "load_experiment", lambda name: Made())
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "page.md")
    older = tmp_path / "merging" / "seed_1.json"
    older.parent.mkdir()
    older.write_text('{"rows": {"before": [0.0, 0.5]}, "cpu_seconds": 1}')
    assert evidence.main(["merging", "--output", str(tmp_path)]) == 1
    assert "have different rows" in capsys.readouterr().err and not (tmp_path / "page.md").exists()


def test_a_new_table_becomes_a_section_and_is_replaced_afterwards() -> None:
    page = put_into(PAGE, "made", ["| old |"], "Made on the toy world")
    assert page.startswith(
        "# Results\n\n## First\n\ntext\n\n## Made on the toy world\n\n<!-- made: begin -->\n| old |\n"
    )
    assert page.endswith("<!-- made: end -->\n\n## Not measured yet\n\nmuch\n")
    assert put_into(page, "made", ["| new |"]) == page.replace("old", "new")


@pytest.mark.parametrize("name", evidence.list_experiments())
def test_every_experiment_says_what_it_compares(name: str) -> None:
    experiment = evidence.load_experiment(name)
    assert experiment.__doc__ and experiment.COLUMNS and callable(experiment.run)
    assert f"<!-- {name}: begin -->" in evidence.PAGE.read_text(encoding="utf-8")


def test_the_shares_that_check_adapter_prints_are_read_back() -> None:
    printed = """a red star
  strength    0: shape 12.5%, colour 100.0%, radius 9.1 px, as asked 0.0%
  strength   -1: shape 50.0%, colour 25.0%, radius unknown, as asked 3.1%, differs by 4.0 of 255
  rank correlation of strength and radius: 0.94, 64 images
a blue star
  strength    1: shape 0.0%, colour 0.0%, radius unknown, as asked 0.0%
"""
    assert read_shares(printed) == {
        "a red star": {0.0: (0.125, 1.0, 0.0), -1.0: (0.5, 0.25, pytest.approx(0.031))},
        "a blue star": {1.0: (0.0, 0.0, 0.0)},
    }


# Copies of the toy base model with guidance as an input, and the training that an experiment starts.


def test_a_fixed_guidance_input_is_that_of_the_trained_copy() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=4,
        norm_num_groups=8,
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    student = GuidanceInput(unet.eval())
    student.load_state_dict(fixed_init(student, 1))
    generator = torch.Generator().manual_seed(2)
    latents, texts = (torch.randn(2, *shape, generator=generator) for shape in ((4, 4, 4), (3, 8)))
    noisy = Noisy(latents, torch.tensor([10, 900]), texts, torch.tensor([False, False]), torch.tensor([3.0, 3.0]))
    with torch.no_grad():
        plain, guided = student(noisy, None), student(noisy, noisy.scales_B)
        for scale, expected in ((1.0, plain), (3.0, guided)):
            found = student.fix_input(scale)(noisy.latents_BCHW, noisy.timesteps_B, noisy.texts_BTC).sample
            assert torch.allclose(found, expected, atol=1e-5)
    assert (guided - plain).abs().mean() > 1e-3


def test_an_experiment_starts_a_script_in_the_environment_of_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(subprocess, "run", lambda command, **settings: started.append((command[1:], settings)))
    experiments.call("train_network.py", "--seed", "1")
    ((words, settings),) = started
    assert words == ["train_network.py", "--seed", "1"] and settings["env"] == child_environment()


# The quickstart's image generator accepts adapters in any naming and rejects those for another model.

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_an_adapter_is_merged_at_its_strength() -> None:
    pipeline = SimpleNamespace(unet=tiny_unet(5002, torch.float32), text_encoder=tiny_clip(5001, torch.float32))
    before = copy.deepcopy(pipeline.unet.state_dict())
    width = before[f"{LAYER}.weight"].shape[0]
    generator = torch.Generator().manual_seed(5003)
    down, up = torch.randn(3, width, generator=generator), torch.randn(width, 3, generator=generator)
    name = f"lora_unet_{LAYER.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}
    merge_lora(pipeline, tensors, 0.4)
    after = pipeline.unet.state_dict()
    expected = before[f"{LAYER}.weight"] + 0.4 * 1.5 / 3 * up @ down
    torch.testing.assert_close(after[f"{LAYER}.weight"], expected, **FLOAT32_SAME_MATH)
    assert [key for key, tensor in after.items() if not torch.equal(tensor, before[key])] == [f"{LAYER}.weight"]


def test_a_file_for_another_model_is_refused() -> None:
    pipeline = SimpleNamespace(unet=tiny_unet(5012, torch.float32), text_encoder=tiny_clip(5011, torch.float32))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(6, 2)}
    with pytest.raises(UserError, match="--lora: none of its 1 modules is in this base model"):
        merge_lora(pipeline, tensors)

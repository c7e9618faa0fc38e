"""--cuda_graphs without a card: what is refused, and runs whose steps are repeated where a card would record them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.checkpoints.files import load_state_dict
from library.errors import UserError
from library.options.train import TrainOptions
from library.processes import ALONE, Processes
from library.training.models import graphs
from library.training.models.graphs import check_graphs, check_optimizer
from library.training.optimization.optimizers import build_optimizer
from library.training.run import prepare, runs
from library.training.step.fixed_step import FixedSteps, Repeat
from tests.running import Finished
from tests.runs.bases import BASES

Train = Callable[..., Finished]
CUDA = torch.device("cuda")
MODEL: Any = SimpleNamespace(name="sd", asks_host=None, inpaints=False)


def test_without_a_card_it_is_refused(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    done = train([*base_arguments, "--cuda_graphs", "--network_train_unet_only"])
    assert done.status == 1 and "Traceback" not in done.stderr
    assert "--cuda_graphs needs a CUDA card, but this run computes on cpu; leave it out" in done.stderr


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"mixed_precision": "fp16"}, "loss scale of fp16"),
        ({"blocks_to_swap": 2}, "--blocks_to_swap"),
        ({"gradient_checkpointing": True}, "--gradient_checkpointing"),
        ({"compile": True}, "--compile"),
        ({"network_train_unet_only": False}, "--network_train_unet_only"),
        ({"stochastic_rounding": True, "full_bf16": True}, "--stochastic_rounding"),
        ({"network_module": "lycoris.kohya"}, "lycoris.kohya"),
        ({"network_module": "networks.dylora"}, "networks.dylora"),
        ({"network_dropout": 0.1}, "--network_dropout"),
        ({"network_args": ["rank_dropout=0.1"]}, "rank_dropout=0.1"),
        ({"network_args": ["module_dropout=0.1"]}, "module_dropout=0.1"),
        ({"network_args": ["ggpo_sigma=0.03", "ggpo_beta=0.01"]}, "ggpo_sigma=0.03"),
    ],
)
def test_what_cannot_be_recorded_is_refused_with_the_reason(values: dict[str, Any], reason: str) -> None:
    plain = {"cuda_graphs": True, "network_train_unet_only": True, "network_module": "networks.lora"}
    check_graphs(TrainOptions().with_values({**plain, "network_args": ["rank_dropout=0"]}), MODEL, CUDA, ALONE)
    with pytest.raises(UserError, match="--cuda_graphs cannot record this run: ") as refused:
        check_graphs(TrainOptions().with_values({**plain, **values}), MODEL, CUDA, ALONE)
    assert reason in str(refused.value)


def test_models_and_processes_that_need_the_host_are_refused() -> None:
    options = TrainOptions().with_values({"cuda_graphs": True, "network_train_unet_only": True})
    asking = SimpleNamespace(name="lumina", asks_host="is told the lengths", inpaints=False)
    with pytest.raises(UserError, match="lumina is told the lengths on the host in each step"):
        check_graphs(options, asking, CUDA, ALONE)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="2 processes exchange gradients"):
        check_graphs(options, MODEL, CUDA, Processes(count=2))


@pytest.mark.parametrize(
    ("kind", "arguments"), [("AdamW8bit", []), ("Lion", []), ("SGDNesterov", []), ("AdamW", ["foreach=True"])]
)
def test_optimizers_that_ask_the_host_are_refused(kind: str, arguments: list[str]) -> None:
    options = TrainOptions().with_values({"optimizer_type": kind, "optimizer_args": arguments})
    weights = [{"params": [torch.nn.Parameter(torch.ones(4, 4))], "lr": 1e-3}]
    with pytest.raises(UserError, match="use --optimizer_type AdamW"):
        check_optimizer(build_optimizer(options.optimizer, weights))
    check_optimizer(build_optimizer(TrainOptions().optimizer, weights))


def repeat_in_place_of_recording(monkeypatch: pytest.MonkeyPatch) -> list[FixedSteps]:
    """Let --cuda_graphs pass without a card; gives where the steps of a run will be found."""
    made: list[FixedSteps] = []
    honest = graphs.fixed_steps
    monkeypatch.setattr(graphs, "CudaGraphs", Repeat)
    monkeypatch.setattr(prepare, "check_graphs", lambda *_: None)
    monkeypatch.setattr(runs, "fixed_steps", lambda *given: made.append(honest(*given)) or made[-1])
    return made


SLOW = [pytest.param(name, (), marks=pytest.mark.slow) for name in ("sdxl", "chroma", "sd3", "hunyuan_image")]


IN_8_BITS = pytest.param("sd", ("--base_format", "int8_rotated", "--base_arithmetic", "8bit"), id="8bit")


@pytest.mark.parametrize(("name", "more"), [("flux", ()), ("anima", ()), IN_8_BITS, *SLOW])
def test_other_models_train_the_same_in_that_form(
    name: str,
    more: tuple[str, ...],
    train: Train,
    base_arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, made = BASES[name], repeat_in_place_of_recording(monkeypatch)
    arguments = [
        *base_arguments, *base.build(tmp_path / "model"), "--network_module", base.module, "--network_train_unet_only",
        "--cache_latents", "--max_train_steps", "5", *more, *(["--cache_text_encoder_outputs"] if name != "sd" else []),
    ]  # fmt: skip
    plain = train([*arguments, "--output_name", "plain"], script=base.script)
    fixed = train([*arguments, "--output_name", "fixed", "--cuda_graphs"], script=base.script)
    assert plain.status == fixed.status == 0, plain.stderr + fixed.stderr
    assert made[-1].num_recorded >= 1 and plain.losses == fixed.losses
    one, other = (load_state_dict(tmp_path / "out" / f"{output}.safetensors") for output in ("plain", "fixed"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_in_the_form_that_is_recorded_trains_what_the_plain_one_trains(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state in the middle too, from which the plain run goes on."""
    arguments = [
        *base_arguments, "--network_train_unet_only", "--cache_latents", "--gradient_accumulation_steps", "2",
        "--lr_scheduler", "cosine", "--ema_decay", "0.9", "--noise_offset", "0.05", "--min_snr_gamma", "5",
        "--max_train_steps", "6",
    ]  # fmt: skip
    plain = train([*arguments, "--output_name", "plain"])
    assert plain.status == 0, plain.stderr
    made = repeat_in_place_of_recording(monkeypatch)
    saving = ["--save_every_n_steps", "3", "--save_state"]
    fixed = train([*arguments, "--output_name", "fixed", "--cuda_graphs", *saving])
    assert fixed.status == 0, fixed.stderr
    assert made[-1].num_recorded == 1 and plain.losses == fixed.losses
    state = tmp_path / "out" / "fixed-step00000003-state"
    done = train([*arguments, "--output_name", "resumed", "--resume", str(state)])
    assert done.status == 0, done.stderr
    weights = [load_state_dict(tmp_path / "out" / f"{name}.safetensors") for name in ("plain", "fixed", "resumed")]
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in weights[0])

"""Nine configurations of other trainers, trained on tiny models by --config_file FILE --yes.

What a run resolved is compared with what the other trainer computes, written here as its formulas.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from library.data.description.dataset_file import load_dataset_config
from library.diffusion.timesteps import LevelDraws, build_level_sampler
from library.training.command_line.cli import read_command_line
from tests.contracts.other_trainers import Example, find_example
from tests.running import STARTED, Finished, fresh_process, make_images, train  # noqa: F401
from tests.tiny.bases import BASES

STEPS = 3
U = (torch.arange(64) + 0.5) / 64  # quantiles of noise levels


def constant(step: int) -> float:
    return 1.0


def warmed(num_steps: int) -> Callable[[int], float]:
    """OneTrainer's lr_lambda_warmup, and diffusers' constant schedule with warmup: the share of step 0 is 0."""
    return lambda step: min(1.0, step / num_steps)


def logit_normal(shift: float = 1.0) -> Tensor:
    """The sigmoid of a normal value, shifted: ai-toolkit's sigmoid, OneTrainer's LOGIT_NORMAL, SimpleTuner's."""
    levels = torch.sigmoid(torch.special.ndtri(U))
    return shift * levels / (1 + (shift - 1) * levels)


def uniform_table(shift: float = 1.0) -> Tensor:
    """Entry int(1000 u) of the descending table of FlowMatchEulerDiscreteScheduler, as diffusers' scripts take it."""
    levels = (1000 - (U * 1000).long()) / 1000
    return shift * levels / (1 + (shift - 1) * levels)


@dataclass(frozen=True)
class Run:
    """A configuration with what its trainer computes."""

    repository: str
    path: str
    base: str  # of tests/tiny
    rate: float
    share: Callable[[int], float]  # of the rate, by step
    rank: int
    alpha: float
    dropout: float | None = None
    caption_dropout: float | None = None
    buckets: int | None = None  # side of their steps
    levels: Tensor | None = None  # quantiles
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the file's own names, for a tiny model


AI, ONE, SIMPLE = "ostris/ai-toolkit", "Nerogar/OneTrainer", "bghira/SimpleTuner"
ON_CPU = {"model.quantize": False, "train.dtype": "fp32", "train.optimizer": "adamw"}
RUNS = (
    Run(AI, "lora_flux_24gb", "flux", 1e-4, constant, 16, 16, caption_dropout=0.05, buckets=64,
        levels=logit_normal(), changes=ON_CPU),
    Run(AI, "lora_sd35_large", "sd3", 1e-4, constant, 16, 16, caption_dropout=0.05, buckets=64, changes=ON_CPU),
    Run(ONE, "sdxl 1.0 LoRA", "sdxl", 3e-4, warmed(200), 16, 1.0),
    Run(ONE, "z-image LoRA 8GB", "zimage", 3e-4, warmed(200), 16, 1.0, levels=logit_normal(1.0),
        changes={"transformer": {"weight_dtype": "BFLOAT_16"}, "train_dtype": "FLOAT_32", "compile": False}),
    Run(SIMPLE, "sd1x-dreamshaper", "sd", 1e-4, constant, 16, 16, dropout=0.1, caption_dropout=0.1,
        changes={"mixed_precision": "no"}),
    Run(SIMPLE, "krea2.peft-lora", "krea2", 1e-4, warmed(100), 64, 64, dropout=0.1, caption_dropout=0.0,
        levels=logit_normal(3.0), changes={"base_model_precision": "no_change", "mixed_precision": "no",
        "sdnq_use_quantized_matmul": False, "dynamo_backend": None, "dynamo_mode": None, "optimizer": "adamw_bf16"}),
    Run("huggingface/diffusers", "README.md", "sd", 1e-4, constant, 4, 4,
        changes={"report_to": "none", "push_to_hub": False, "validation_prompt": ""}),
    Run("huggingface/diffusers", "README_flux.md", "flux", 1e-4, constant, 4, 4, levels=uniform_table(),
        changes={"report_to": "none", "push_to_hub": False, "validation_prompt": "", "optimizer": "AdamW",
        "learning_rate": 1e-4, "mixed_precision": "no"}),
    Run("cocktailpeanut/fluxgym", "20G", "flux", 8e-4, constant, 4, 1, levels=logit_normal(3.1582),
        changes={"mixed_precision": "no", "optimizer_type": "AdamW", "fp8_base": False}),
)  # fmt: skip


def change(example: Example, changes: Mapping[str, Any], images: Path, tmp_path: Path) -> Example:
    """Return the example for tiny models and these images; all else stays."""
    content = json.loads(json.dumps(example.content))
    options, beside = dict(example.options), dict(example.beside)
    if example.repository == AI:
        process = content["config"]["process"][0]
        for name, value in changes.items():
            table, key = name.split(".")
            process[table][key] = value
        process["datasets"][0] |= {"folder_path": str(images), "resolution": [64]}
        process["sample"] = {}
    elif example.form == "json":
        content |= changes
        content["resolution"] = "64" if example.repository == ONE else 64
        for name in ("validation_prompt", "validation_steps"):
            content.pop(name, None)
        if example.repository == ONE:
            content["concepts"] = [{"path": str(images)}]
        beside = {name: [{"id": "a", "type": "local", "instance_data_dir": str(images)}] for name in beside}
    else:
        options |= changes | {"resolution": 64}
        options |= {"instance_data_dir": str(images)} if "instance_data_dir" in options else {}
        if "dataset_config" in options:
            dataset = tmp_path / "dataset.toml"
            dataset.write_text(f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{images}"\n')
            options["dataset_config"] = str(dataset)
        options = {name: value for name, value in options.items() if value is not False and value != ""}
    fields = {**vars(example), "content": content, "options": options, "beside": beside}
    return Example(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.repository}-{run.base}")
def test_a_run_resolves_to_what_the_other_trainer_computes(
    run: Run,
    train: Callable[..., Finished],  # noqa: F811
    tmp_path: Path,
) -> None:
    images = make_images(tmp_path / "images", 6)
    example = change(find_example(run.repository, run.path), run.changes, images, tmp_path)
    (tmp_path / "theirs").mkdir()
    file, base, out = example.write(tmp_path / "theirs"), BASES[run.base], tmp_path / "out"
    words = [
        "--config_file", str(file), "--yes", *base.build(tmp_path / "model"), "--output_dir", str(out), "--output_name",
        "mine", "--max_train_steps", str(STEPS), "--max_train_epochs", "0", "--max_data_loader_n_workers", "0",
        "--log_events", str(out / "events.jsonl"), "--no_report", "--train_batch_size", "1",
        *(["--mixed_precision", "no"] if run.repository in (ONE, "cocktailpeanut/fluxgym") else []),
    ]  # fmt: skip
    finished = train(words, script=base.script)
    assert finished.status == 0, finished.stderr[-3000:]
    with safe_open(out / "mine.safetensors", "pt") as saved:
        metadata = saved.metadata()
    assert float(metadata["ss_network_alpha"]) == run.alpha and int(metadata["ss_network_dim"]) == run.rank
    assert metadata["ss_network_dropout"] in ({"None", "0.0"} if run.dropout is None else {str(run.dropout)})
    events = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [next(iter(event["learning_rates"].values())) for event in events if event["event"] == "step"]
    assert rates == pytest.approx([run.rate * run.share(step) for step in range(STEPS)], abs=1e-12)
    options = read_options(base.script, words)
    if run.caption_dropout is not None:
        subsets = [subset for dataset in load_dataset_config(options).datasets for subset in dataset.subsets]
        assert {subset.captions.caption_dropout_rate for subset in subsets} == {run.caption_dropout}
    if run.buckets is not None:
        [dataset] = json.loads(metadata["ss_datasets"])
        assert dataset["enable_bucket"] and dataset["max_bucket_reso"] >= 2 * 64
    if run.levels is not None:
        draw = build_level_sampler(options.flow_sampling, options.flow_weighting)
        levels = draw(LevelDraws(len(U), 8, 8, torch.Generator().manual_seed(0), uniforms_B=U))
        assert torch.allclose(levels, run.levels, atol=2e-3)


def read_options(script: str, words: list[str]) -> Any:
    """Return the options as the script reads them."""
    return STARTED[script].options.from_args(read_command_line(import_module(script).setup_parser(), words).args)

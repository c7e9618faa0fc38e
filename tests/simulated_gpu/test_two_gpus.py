"""Two processes with one GPU each, whose collectives run on streams like NCCL's."""

from pathlib import Path

import pytest
import torch

from library.checkpoints.files import load_state_dict
from tests.ranks import Job
from tests.running import make_images
from tests.simulated_gpu.ranks import run_ranks
from tests.tiny.bases import BASES
from tests.tolerances import SUMS_OF_A_RUN

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("simulated_gpu")]


def test_two_gpus_train_like_one_that_accumulates(tmp_path: Path) -> None:
    """Sharding the base model between them gives the same result."""
    make_images(tmp_path / "data" / "1_thing", 8, seed=91)
    arguments = [
        *BASES["flux"].build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--caption_extension",
        ".txt", "--resolution", "64", "--network_module", "networks.lora_flux", "--network_dim", "4",
        "--learning_rate", "1e-2", "--optimizer_type", "SGD", "--seed", "5", "--max_data_loader_n_workers", "0",
        "--max_train_steps", "3", "--output_name", "mine", "--no_report", "--cache_latents",
        "--cache_text_encoder_outputs", "--network_train_unet_only", "--save_precision", "float",
    ]  # fmt: skip
    runs = {"two": (2, []), "shared": (2, ["--shard_base"]), "one": (1, ["--gradient_accumulation_steps", "2"])}
    jobs = []
    for name, (count, more) in runs.items():
        (tmp_path / name).mkdir()
        words = [*arguments, "--output_dir", str(tmp_path / name), *more]
        jobs.append(Job(words, count, str(tmp_path / name), script="flux_train_network"))
    for ranks in run_ranks(jobs, tmp_path):
        for rank in ranks:
            assert rank.status == 0, rank.said
            assert rank.gave["faults"] == []
    files = {name: load_state_dict(tmp_path / name / "mine.safetensors") for name in runs}
    assert all(torch.equal(files["shared"][key], tensor) for key, tensor in files["two"].items())
    for key, tensor in files["one"].items():
        off = (files["two"][key] - tensor).norm() / tensor.norm().clamp(min=1e-30)
        assert off < SUMS_OF_A_RUN, (key, float(off))
    assert any(tensor.any() for key, tensor in files["one"].items() if "lora_up" in key)

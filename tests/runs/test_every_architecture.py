"""Features common to all scripts: resuming, validation, previews, and files that the tools read."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.architectures.specs import list_specs
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.checkpoints.recognition import recognise_adapter
from networks.core.files.adapter_file import read_adapter_file
from tests.running import ROOT, Finished, make_images
from tests.tiny.base import Base
from tests.tiny.bases import BASES

Train = Callable[..., Finished]

DOWNS, UPS = ("lora_down.weight", "lora_A.weight"), ("lora_up.weight", "lora_B.weight")
EVERYTHING = [
    "--shuffle_caption", "--caption_dropout_rate", "0.2", "--caption_tag_dropout_rate", "0.2", "--random_crop",
    "--flip_aug", "--network_dropout", "0.1", "--gradient_accumulation_steps", "2", "--validation_split", "0.3",
    "--lr_scheduler", "cosine", "--lr_warmup_steps", "1", "--sample_every_n_steps", "3", "--save_state",
]  # fmt: skip


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest) -> Base:
    return BASES[request.param]


@pytest.fixture(scope="module")
def model(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return base.build(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(train: Train, base: Base, model: list[str], tmp_path: Path) -> Callable[..., Finished]:
    """Return `run(folder, ...)`, which trains into a folder of `tmp_path`."""
    make_images(tmp_path / "data" / "1_thing", 7, seed=61)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    arguments = [
        *model, "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64",
        "--train_batch_size", "2", "--output_name", "mine", "--network_dim", "4", "--network_alpha", "2",
        "--learning_rate", "1e-3", "--seed", "5", "--max_data_loader_n_workers", "0", "--sample_prompts",
        str(tmp_path / "prompts.txt"),
    ]  # fmt: skip

    def start(folder: str, *more: str) -> Finished:
        words = [*arguments, "--network_module", base.module, "--output_dir", str(tmp_path / folder), *more]
        done = train(words, script=base.script).ok()
        return done

    return start


@pytest.mark.nightly
def test_with_every_feature_on_a_resumed_run_equals_the_uninterrupted_one(
    run: Callable[..., Finished], tmp_path: Path
) -> None:
    steps = [*EVERYTHING, "--max_train_steps", "5"]
    uninterrupted = run("whole", *steps, "--save_every_n_steps", "2")
    rest = run("rest", *steps, "--resume", str(tmp_path / "whole" / "mine-step00000002-state"))
    assert "uninterrupted" not in rest.stderr
    assert rest.losses == uninterrupted.losses[2:]
    expected, other = (load_state_dict(tmp_path / name / "mine.safetensors") for name in ("whole", "rest"))
    assert expected.keys() == other.keys()
    assert all(torch.equal(expected[key], other[key]) for key in expected)
    assert any(float(tensor.abs().max()) > 0 for key, tensor in expected.items() if key.endswith(UPS))
    lines = [
        [line.split("validation after")[1] for line in done.stderr.splitlines() if "validation after" in line]
        for done in (uninterrupted, rest)
    ]
    assert len(lines[0]) > 1 and lines[1] == lines[0][-len(lines[1]) :]
    images = [
        sorted(Image.open(path).tobytes() for path in (tmp_path / name / "sample").glob("*.png"))
        for name in ("whole", "rest")
    ]
    assert images[0] == images[1] and len(images[0]) == 1


def tool(name: str, *words: str) -> str:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *words]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def modules_of(path: str) -> set[str]:
    """Return the Kohya names of the modules in a file, whatever its naming scheme."""
    file = read_adapter_file(path)
    shapes = {key: tensor.shape for key, tensor in load_state_dict(path).items()}
    spec = recognise_adapter(list_specs(), shapes, file.metadata)
    assert spec is not None
    return {module.kohya if (module := spec.names.find(name)) else name for name in file.modules}


@pytest.mark.nightly
def test_the_tools_work_on_its_files(run: Callable[..., Finished], tmp_path: Path) -> None:
    run("one", "--max_train_steps", "2")
    run("two", "--max_train_steps", "2", "--seed", "6")
    one, two = (str(tmp_path / name / "mine.safetensors") for name in ("one", "two"))
    assert "ss_network_module" in tool("show_metadata", one)
    assert tool("check_lora_weights", one)
    small, merged = str(tmp_path / "small.safetensors"), str(tmp_path / "merged.safetensors")
    tool("resize_lora", "--model", one, "--save_to", small, "--new_rank", "2", "--save_precision", "float")
    tool("merge_lora", "--models", one, two, "--ratios", "0.5", "0.5", "--save_to", merged, "--save_precision", "float")
    ranks = {t.shape[0] for key, t in load_state_dict(small).items() if key.endswith(DOWNS)}
    assert ranks - {1} == {2}  # a layer with one output has at most rank 1
    assert modules_of(merged) == modules_of(one)
    assert read_metadata(small)["sshs_model_hash"] != read_metadata(one)["sshs_model_hash"]


@pytest.mark.nightly
def test_a_rank_extracted_from_a_dylora_file_is_a_lora_file(run: Callable[..., Finished], tmp_path: Path) -> None:
    run("one", "--max_train_steps", "2", "--network_module", "networks.dylora", "--network_args", "unit=2")
    path = tmp_path / "one" / "mine.safetensors"
    tool(
        "extract_lora_from_dylora", "--model", str(path), "--save_to", str(tmp_path / "cut.safetensors"), "--unit", "2"
    )
    nested = load_state_dict(path)
    cut = load_state_dict(tmp_path / "cut-0002.safetensors")
    assert nested.keys() == cut.keys()
    for key, tensor in cut.items():
        if key.endswith(DOWNS):
            assert torch.equal(tensor, nested[key][:2])


@pytest.mark.nightly
def test_memory_modes_barely_change_the_loss(run: Callable[..., Finished]) -> None:
    """Gradient checkpointing changes nothing; 8-bit weights (3 mantissa bits) change the loss by a few percent."""
    one_step = ["--max_train_steps", "1", "--network_train_unet_only", "--mixed_precision", "bf16"]
    plain = run("plain", *one_step).losses
    assert run("again", *one_step, "--gradient_checkpointing").losses == plain
    assert run("small", *one_step, "--fp8_base").losses == pytest.approx(plain, rel=0.1)


KINDS = {
    "dora": ["networks.lora", "dora_wd=True", "use_scalar=True", "rank_dropout=0.1", "module_dropout=0.1",
             "loraplus_lr_ratio=4"],
    "dora_per_output": ["networks.lora", "dora_wd=True", "wd_on_output=True", "module_dropout=0.1"],
    "lora_fa": ["networks.lora_fa", "rank_dropout=0.1"],
    "dylora": ["networks.dylora", "unit=2"],
    "tlora": ["networks.tlora", "rank_dropout=0.1"],
    "pissa": ["networks.lora", "init=pissa", "rslora=True", "module_dropout=0.1"],
    "loha": ["networks.loha", "dora_wd=True", "rank_dropout=0.1", "loraplus_lr_ratio=4"],
    "lokr": ["networks.lokr", "factor=2", "dora_wd=True", "use_scalar=True", "rank_dropout=0.1", "loraplus_lr_ratio=4"],
    "boft": ["networks.boft", "use_scalar=True", "boft_dropout=0.1"],
    "oft_v2": ["networks.oft_v2", "use_scalar=True", "module_dropout=0.1", "train_norm=True"],
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_kind_trains_and_continues_from_its_file(
    run: Callable[..., Finished], base: Base, tmp_path: Path, kind: str
) -> None:
    module, *arguments = KINDS[kind]
    words = ["--network_module", module, "--network_args", *arguments]
    run("one", *words, "--max_train_steps", "2")
    first = load_state_dict(tmp_path / "one" / "mine.safetensors")
    from_zero = (
        *UPS,
        "hada_w2_a",
        "lokr_w1",
        "oft_R.weight",
        "boft_R",
    )  # the last two contain a factor that starts at 0
    moved = [key for key, tensor in first.items() if key.endswith(from_zero) and float(tensor.abs().max()) > 0]
    assert any(key.startswith(("lora_unet", "diffusion_model.", "transformer.")) for key in moved)
    assert any(key.startswith("lora_te") for key in moved) == base.adapts_text_encoders
    path = str(tmp_path / "one" / "mine.safetensors")
    run("two", *words, "--max_train_steps", "1", "--network_weights", path, "--dim_from_weights")
    second = load_state_dict(tmp_path / "two" / "mine.safetensors")
    assert {key: tensor.shape for key, tensor in first.items()} == {key: t.shape for key, t in second.items()}
    assert any(not torch.equal(first[key], second[key]) for key in moved)

"""Training from shards with cached latents and text features, on machines without VAE and text encoders."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.running import Finished, make_images
from tests.runs.test_resume import load_saved
from tests.tiny.base import Base
from tests.tiny.bases import BASES
from tools import make_shards

Train = Callable[..., Finished]
Cached = Callable[[str], tuple[Base, list[str], Path]]

BASE_FLAG = "--pretrained_model_name_or_path"
MODELS = ("--vae", "--ae", "--clip_l", "--clip_g", "--t5xxl", "--gemma2", "--qwen3", "--text_encoder", "--byt5")
CACHES = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
FAST = ("sdxl", "flux", "sd3")


def delete_encoders(words: list[str], keeps_text: bool) -> None:
    """Delete VAE and text encoders: their files, their folders, or their part of the one file."""
    for flag in MODELS:
        if flag in words:
            Path(words[words.index(flag) + 1]).unlink()
    path = Path(words[words.index(BASE_FLAG) + 1])
    if path.is_dir():
        for folder in ("vae", *(() if keeps_text else ("text_encoder", "text_encoder_2"))):
            shutil.rmtree(path / folder, ignore_errors=True)
        return
    tensors = load_file(path)
    prefixes = ("first_stage_model.", "vae.", *(() if keeps_text else ("text_encoders.", "conditioner.")))
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}, path)
    for beside in ("clip_l", "clip_g", "t5xxl", "vae"):
        (path.parent / f"{beside}.safetensors").unlink(missing_ok=True)


@pytest.fixture
def cached(tmp_path: Path, fresh_process: None) -> Cached:
    """Return `cached(base)`, which gives the base model, arguments for a run from shards, and their folder."""

    def make(name: str) -> tuple[Base, list[str], Path]:
        base = BASES[name]
        make_images(tmp_path / "images", 4, seed=8)
        text = "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\ncaption_extension = '.txt'\n"
        text += f'image_dir = "{(tmp_path / "images").as_posix()}"\n'
        (tmp_path / "data.toml").write_text(text)
        (tmp_path / "model").mkdir()
        words = [
            *base.build(tmp_path / "model"), "--network_train_unet_only", "--seed", "6", "--network_dim", "2",
            "--network_module", base.module, "--learning_rate", "1e-3", "--max_train_steps", "3", "--no_report",
            "--max_data_loader_n_workers", "0", "--output_name", "mine",
            *(CACHES if base.caches_text else CACHES[:1]),
        ]  # fmt: skip
        out = tmp_path / "shards"
        packing_arguments = [*words, "--dataset_config", str(tmp_path / "data.toml"), "--out", str(out)]
        assert make_shards.main(["--script", f"{base.script}.py", *packing_arguments]) == 0
        return base, [*words, "--dataset_config", str(out / "dataset.toml")], out

    return make


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.nightly) for n in BASES])
def test_a_run_with_cached_features_is_the_same_without_the_encoders(
    name: str, cached: Cached, train: Train, tmp_path: Path
) -> None:
    base, words, _ = cached(name)
    with_models = train([*words, "--output_dir", str(tmp_path / "with")], script=base.script)
    assert with_models.status == 0 and "which is missing" not in with_models.stderr, with_models.stderr
    delete_encoders(words, not BASES[name].caches_text)
    if name == "sd3":  # nothing else shows that T5 encoded captions too
        words += ["--t5xxl", str(tmp_path / "t5xxl.safetensors")]
    without = train([*words, "--output_dir", str(tmp_path / "without")], script=base.script)
    assert without.status == 0, without.stderr
    assert without.losses == with_models.losses and len(without.losses) == 3
    assert without.stderr.count("latents are not verified against their VAE, which is missing") == 1
    assert without.stderr.count("text features are not verified against their encoders") == BASES[name].caches_text
    expected, other = load_saved(tmp_path / "with"), load_saved(tmp_path / "without")
    assert expected.keys() == other.keys() and all(bool((expected[key] == other[key]).all()) for key in expected)


def test_options_that_need_a_missing_model_are_named_before_any_work(
    cached: Cached, train: Train, tmp_path: Path
) -> None:
    base, words, shards = cached("flux")
    delete_encoders(words, keeps_text=False)
    words += ["--output_dir", str(tmp_path / "out")]
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\n")
    cat, ae, t5 = (words[words.index(flag) + 1] for flag in ("--dataset_config", "--ae", "--t5xxl"))

    def refusal(*more: str, but: tuple[str, ...] = ()) -> str:
        done = train([word for word in words if word not in but] + list(more), script=base.script)
        assert done.status == 1 and "loading" not in done.stderr.partition("Error")[0], done.stderr
        return done.stderr

    message = refusal("--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "1")
    assert f"--sample_prompts draws images; give the VAE, or leave it out: --ae {ae} does not exist" in message
    assert f"--ae {ae} does not exist" in refusal(but=("--cache_latents_to_disk",))
    assert "--clip_l" in refusal(but=("--cache_text_encoder_outputs_to_disk",))
    message = refusal(but=("--network_train_unet_only",))
    assert (
        "text encoders get an adapter without --network_train_unet_only; give them, or that option: --clip_l" in message
    )
    message = refusal("--t5xxl_max_token_length", "16")
    assert (
        "made with other settings" in message and f"--t5xxl {t5} does not exist" not in message.partition("captions")[0]
    )
    assert "must be encoded" in message and "does not exist" in message
    cache_file = next(shards.rglob("*_flux.npz"))
    cache_file.rename(cache_file.with_suffix(".gone"))
    message = refusal()
    assert "1 image must be encoded" in message and f"--ae {ae} does not exist" in message and cat


def test_cache_entries_of_two_models_are_never_mixed(cached: Cached, train: Train, tmp_path: Path) -> None:
    """Without the model it is unknown which are valid; with it the others are encoded again."""
    base, words, shards = cached("sdxl")
    words += ["--output_dir", str(tmp_path / "out")]
    path = Path(words[words.index(BASE_FLAG) + 1])
    before = {file: file.read_bytes() for file in sorted(shards.rglob("*.npz"))}
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        file = path / f"{part}.safetensors"
        save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
    assert train(words, script=base.script).status == 0  # encodes everything again
    after = {file: file.read_bytes() for file in before}
    delete_encoders(words, keeps_text=False)
    for kind, message in (("_sdxl.npz", "made with another VAE"), ("_te_outputs.npz", "made with other text encoders")):
        mixed = sorted(file for file in before if file.name.endswith(kind) and not file.name.startswith("."))[-1]
        assert after[mixed] != before[mixed]
        mixed.write_bytes(before[mixed])
        done = train(words, script=base.script)
        assert done.status == 1 and message in done.stderr and "must be encoded" in done.stderr, done.stderr
        mixed.write_bytes(after[mixed])
    assert train(words, script=base.script).status == 0

"""Training scripts of Krea 2, Lumina, Z-Image, Qwen-Image 2.1 and MOSS-Image on tiny models."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.headers import read_metadata
from tests.running import Finished, load_saved, make_images, small_run, tiny_model
from tests.runs.musubi_tuner import paths_of, run_command
from tests.tiny.krea2 import CONFIG, build_tiny_krea2
from tests.tiny.moss_image import CONFIG as MOSS_CONFIG
from tests.tiny.zimage import CONFIG as ZIMAGE_CONFIG
from tools import choose_checkpoint, draw

# krea2_train_network.py on a tiny Krea 2 model: musubi-tuner's commands, previews, resuming, and third-party
# files.

Train = Callable[..., Finished]


tiny_arguments = tiny_model("krea2", 31)


@pytest.fixture
def train_krea2(train: Train) -> Train:
    return partial(train, script="krea2_train_network")


@pytest.fixture
def arguments(tiny_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for two training steps."""
    return [*tiny_arguments, *small_run(images, tmp_path, "networks.lora_krea2", "2")]


@pytest.mark.nightly
def test_caption_features_are_cached_without_padding(tiny_arguments: list[str], tmp_path: Path) -> None:
    """Features are stored unpadded in 16 bits, and their size is reported before encoding."""
    texts = "--dataset_config {data} --text_encoder {text} --batch_size 2"
    log = run_command("krea2_cache_text_encoder_outputs", texts, paths_of(tiny_arguments, tmp_path))
    num_tokens = []
    for file in (tmp_path / "cache").rglob("*_krea2_te.npz"):
        with np.load(file) as archive:
            states, mask = archive["hidden_state"], archive["attention_mask"]
        assert states.dtype == np.uint16 and states.shape == (len(mask), 12 * CONFIG.fusion.width) and mask.all()
        num_tokens.append(len(mask))
    assert len(num_tokens) == 4 and len(set(num_tokens)) > 1
    size = 2 * 12 * CONFIG.fusion.width * sum(num_tokens) / 1e6
    assert f"caching text encoder outputs of 4 captions on disk, about {size:.1f} MB" in log


def test_commands_for_editing_cache_what_training_reuses(
    train_krea2: Train, tiny_arguments: list[str], tmp_path: Path
) -> None:
    """A data set without references is refused with --edit, by every command."""
    paths = paths_of(tiny_arguments, tmp_path)
    words = "--dit {dit} --dataset_config {data} --output_dir {out} --network_module networks.lora_krea2 --edit"
    train = [*words.format(**paths).split(), "--mixed_precision", "bf16", "--max_train_steps", "1"]
    done = train_krea2(train)
    assert done.status == 1 and "--edit trains on reference images, but no subset of the data set" in done.stderr
    make_images(tmp_path / "before", 3, side=96, seed=1)
    with (tmp_path / "data.toml").open("a") as file:
        file.write(f'control_directory = "{(tmp_path / "before").as_posix()}"\n')
    run_command("krea2_cache_latents", "--dataset_config {data} --vae {vae} --edit", paths)
    texts = "--dataset_config {data} --text_encoder {text} --batch_size 1 --edit"
    run_command("krea2_cache_text_encoder_outputs", texts, paths)
    done = train_krea2(train).ok()
    assert "latent cache: 3 entries reused, 0 to encode" in done.stderr
    assert re.search(r"text cache: \d files reused, 0 to encode", done.stderr)


def test_previews_use_turbo_and_do_not_change_training(
    train_krea2: Train, arguments: list[str], tmp_path: Path
) -> None:
    """The adapter starts at 0, so the first image is Turbo's; losses equal those without previews, bit for bit."""
    turbo = build_tiny_krea2(tmp_path / "other", seed=77, name="turbo")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --d 1\n")
    shown = ["--sample_prompts", str(prompts), "--sample_at_first", "--sample_every_n_steps", "1"]
    plain = train_krea2(arguments)
    for more in ([], ["--base_format", "int8"]):
        out = tmp_path / f"out{len(more)}"
        done = train_krea2([*arguments, *shown, *more, "--turbo_dit", turbo[1], "--output_dir", str(out)]).ok()
        images = [path.read_bytes() for path in sorted((out / "sample").glob("*.png"))]
        assert len(images) == 3 and len(set(images)) == 3
        if not more:
            assert done.losses == plain.losses and len(done.losses) == 2
    turbo_arguments = ["--output_dir", str(tmp_path / "turbo"), "--max_train_steps", "1"]
    other = train_krea2([arguments[0], turbo[1], *arguments[2:], *shown, *turbo_arguments])
    assert other.status == 0 and "is Krea 2 Turbo, which is distilled" in other.stderr
    before = [next((tmp_path / name / "sample").glob("*_e000000_*.png")).read_bytes() for name in ("out0", "turbo")]
    assert before[0] == before[1]
    first, two = (load_file(tmp_path / name / "mine.safetensors") for name in ("out", "out0"))
    assert all(torch.equal(first[key], two[key]) for key in first)


# lumina_train_network.py on a tiny Lumina Image 2.0 model: every adapter kind trains, saves and resumes.

SYSTEM = "be a good red dog"


tiny_lumina_arguments = tiny_model("lumina", 31)


@pytest.fixture
def lumina_arguments(tiny_lumina_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for three training steps."""
    words = ["--gemma2_max_token_length", "60", "--system_prompt", SYSTEM]
    return [*tiny_lumina_arguments, *small_run(images, tmp_path, "networks.lora_lumina", "3"), *words]


@pytest.fixture
def train_lumina(train: Train) -> Train:
    return partial(train, script="lumina_train_network")


@pytest.mark.nightly
def test_captions_cached_with_another_system_prompt_are_encoded_again(
    train_lumina: Train, lumina_arguments: list[str]
) -> None:
    words = [*lumina_arguments, "--network_train_unet_only", "--cache_text_encoder_outputs_to_disk"]
    for more, message in (
        ([], "to encode, 0 stale"),
        ([], " 0 to encode, 0 stale"),
        (["--system_prompt", "be bad"], "7 stale"),
    ):
        done = train_lumina([*words, *more])
        assert done.status == 0 and message in done.stderr, done.stderr


# zimage_train_network.py on a tiny Z-Image model: a training adapter, and noise levels that resume.


tiny_zimage_arguments = tiny_model("zimage", 31)


@pytest.fixture
def train_zimage(train: Train) -> Train:
    return partial(train, script="zimage_train_network")


@pytest.fixture
def zimage_arguments(tiny_zimage_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for two training steps."""
    return [*tiny_zimage_arguments, *small_run(images, tmp_path, "networks.lora_zimage", "2")]


@pytest.fixture
def training_adapter(tmp_path: Path) -> str:
    """Write a file in the layout of the published training adapters."""
    generator = torch.Generator().manual_seed(1)
    adapter = {}
    for number in range(ZIMAGE_CONFIG.num_layers):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            stem = f"diffusion_model.layers.{number}.attention.{part}"
            adapter[f"{stem}.lora_A.weight"] = torch.randn(2, ZIMAGE_CONFIG.width, generator=generator)
            adapter[f"{stem}.lora_B.weight"] = torch.randn(ZIMAGE_CONFIG.width, 2, generator=generator)
    save_file(adapter, tmp_path / "zimage_turbo_training_adapter.safetensors")
    return str(tmp_path / "zimage_turbo_training_adapter.safetensors")


def test_a_training_adapter_is_left_out_of_the_file_and_of_previews(
    train_zimage: Train,
    tiny_zimage_arguments: list[str],
    zimage_arguments: list[str],
    training_adapter: str,
    tmp_path: Path,
) -> None:
    prompt = "a red cat --w 64 --h 64 --s 2 --d 3"
    (tmp_path / "prompts.txt").write_text(prompt)
    words = [*zimage_arguments, "--model_version", "turbo", "--mixed_precision", "no"]
    drawing = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2"]
    plain = train_zimage(words)
    merged = train_zimage([*words, "--output_name", "merged", "--base_weights", training_adapter])
    done = train_zimage([*words, *drawing, "--training_adapter", training_adapter])
    kept = train_zimage(
        [*words, *drawing, "--output_name", "kept", "--training_adapter", f"{training_adapter}:1.0",
         "--sample_with_training_adapter"]
    )  # fmt: skip
    assert done.status == kept.status == merged.status == 0, done.stderr
    assert "which is distilled" in plain.stderr
    assert all("which is distilled" not in run.stderr for run in (merged, done, kept))
    assert plain.losses != done.losses == merged.losses == kept.losses
    out = tmp_path / "out"
    beside, expected = (load_file(out / f"{name}.safetensors") for name in ("mine", "merged"))
    assert beside.keys() == expected.keys()
    assert beside["diffusion_model.layers.0.attention.to_q.lora_A.weight"].shape == (4, ZIMAGE_CONFIG.width)
    at = tiny_zimage_arguments.index("--pretrained_model_name_or_path")
    base = [
        tiny_zimage_arguments[at + 1],
        *tiny_zimage_arguments[:at],
        *tiny_zimage_arguments[at + 2 :],
        "--model_version",
        "turbo",
    ]
    drawn = tmp_path / "drawn"
    assert (
        draw.main([*base, "--adapter", str(out / "mine.safetensors"), "--prompt", prompt, "--output", str(drawn)]) == 0
    )
    ((preview,), (other,)) = ((out / "sample").glob(f"{name}_000002_00_*.png") for name in ("mine", "kept"))
    assert pixels(preview) == pixels(drawn / "01_3.png") != pixels(other)


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def test_a_training_adapter_of_another_base_model_is_refused_by_name(
    train_zimage: Train, zimage_arguments: list[str], tmp_path: Path
) -> None:
    stem, file = "diffusion_model.blocks.0.attn.wq", tmp_path / "krea2_turbo_training_adapter.safetensors"
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(8, 2)}, file)
    done = train_zimage([*zimage_arguments, "--training_adapter", str(file)])
    assert done.status == 1
    assert f"--training_adapter {file} is an adapter for Krea 2, and the base model is Z-Image" in done.stderr


def test_stratified_levels_of_a_cut_off_distribution_with_rex_resume_exactly(
    train_zimage: Train, zimage_arguments: list[str], tmp_path: Path
) -> None:
    words = [
        *zimage_arguments, "--num_timestep_buckets", "7", "--min_timestep", "150", "--max_timestep", "850",
        "--preserve_distribution_shape", "--lr_scheduler", "rex", "--lr_warmup_steps", "1",
        "--metadata_arch", "mine", "--metadata_reso", "512,768", "--save_precision", "fp32",
    ]  # fmt: skip
    plain = train_zimage([word for word in words if word not in ("--num_timestep_buckets", "7")])
    whole = train_zimage([*words, "--save_state", "--save_every_n_steps", "1"])
    assert whole.status == plain.status == 0, whole.stderr
    assert "has no effect" not in whole.stderr
    assert whole.losses != plain.losses
    file = tmp_path / "out" / "mine.safetensors"
    expected = load_file(file)
    train_zimage([*words, "--resume", str(tmp_path / "out" / "mine-step00000001-state")]).ok()
    actual = load_file(file)
    assert all(torch.equal(actual[key], weight) for key, weight in expected.items())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["modelspec.architecture"], metadata["modelspec.resolution"]) == ("mine/lora", "512x768")


# qwen_image_21_train_network.py on a tiny model: musubi-tuner's commands, pairs, and alpha channels.


tiny_qwen_arguments = tiny_model("qwen_image_21", 31)


@pytest.fixture
def train_qwen(train: Train) -> Train:
    return partial(train, script="qwen_image_21_train_network")


def settings(config: Path, tmp_path: Path) -> list[str]:
    """Return arguments for four training steps, without those of the base model."""
    return [
        "--dataset_config", str(config), "--output_dir", str(tmp_path / "out"), "--output_name", "mine",
        "--network_module", "networks.lora_qwen_image_21", "--network_dim", "4", "--learning_rate", "1e-3",
        "--max_train_steps", "4", "--seed", "5", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(weight, b[key]) for key, weight in a.items())


def pairs(tmp_path: Path) -> Path:
    """Write four images with two references each; one image and one reference are partly transparent."""
    make_images(tmp_path / "after", 4)
    for number, side in enumerate((96, 64)):
        make_images(tmp_path / f"before{number}", 4, side=side, seed=1 + number)
    for path in (tmp_path / "after" / "00.png", tmp_path / "before1" / "01.png"):
        make_half_transparent(path)
    config = tmp_path / "data.toml"
    config.write_text(
        f"""
[[datasets]]
resolution = 64
batch_size = 2
caption_extension = ".txt"

[[datasets.subsets]]
image_dir = "{(tmp_path / "after").as_posix()}"
control_dirs = ["{(tmp_path / "before0").as_posix()}", "{(tmp_path / "before1").as_posix()}"]
control_no_resize = true
flip_aug = true
caption_dropout_rate = 0.3
"""
    )
    return config


def make_half_transparent(path: Path) -> None:
    """Make the left half of an image transparent."""
    with Image.open(path) as image:
        alpha = np.full((image.height, image.width), 255, dtype=np.uint8)
        alpha[:, : image.width // 2] = 0
        image.putalpha(Image.fromarray(alpha))
        image.save(path)


def test_training_on_pairs_resumes_exactly_and_previews_show_the_references(
    train_qwen: Train, tiny_qwen_arguments: list[str], tmp_path: Path
) -> None:
    shown = " ".join(f"--ci {(tmp_path / f'before{number}' / '01.png').as_posix()}" for number in (0, 1))
    (tmp_path / "prompts.txt").write_text(f"make it red --w 64 --h 64 --s 2 --d 3 {shown}\nred --w 64 --h 64 --s 2\n")
    config = pairs(tmp_path)
    caches = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"]
    uninterrupted = [
        *tiny_qwen_arguments, *settings(config, tmp_path), *caches, "--save_every_n_steps", "2", "--save_state",
        "--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "4", "--guidance_loss", "2",
    ]  # fmt: skip
    done = train_qwen(uninterrupted).ok()
    assert "2 reference images for each image" in done.stderr and "failed" not in done.stderr
    assert "alpha channel" not in done.stderr  # the alpha channel is not dropped
    state = str(tmp_path / "out" / "mine-step00000002-state")
    done = train_qwen([*uninterrupted, "--output_name", "resumed", "--resume", state]).ok()
    assert are_equal(load_saved(tmp_path), load_saved(tmp_path, "resumed"))
    sizes = []
    for path in sorted((tmp_path / "out" / "sample").glob("mine*.png")):
        with Image.open(path) as image:
            sizes.append((image.mode, image.width > 3 * 64))
    assert sizes == [("RGBA", True), ("RGBA", False)]

    # Its caption must be encoded again: plain, mirrored and empty.
    make_half_transparent(tmp_path / "before0" / "02.png")
    done = train_qwen([*uninterrupted, "--output_name", "changed"]).ok()
    assert "text cache: 4 files reused, 0 to encode, 1 stale (1 made for other captions" in done.stderr
    assert "latent cache: 3 entries reused, 0 to encode, 1 stale" in done.stderr
    assert not are_equal(load_saved(tmp_path), load_saved(tmp_path, "changed"))


def test_files_are_compared_on_trained_pairs_and_their_mirror_images(
    train_qwen: Train, tiny_qwen_arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The text encoder sees the mirrored references too."""
    config = pairs(tmp_path)
    config.write_text(config.read_text().replace("flip_aug = true", ""))
    words = [
        *tiny_qwen_arguments,
        *settings(config, tmp_path),
        "--cache_text_encoder_outputs",
        "--network_train_unet_only",
    ]
    train_qwen([*words, "--max_train_steps", "1"]).ok()
    assert choose_checkpoint.main(["--script", "qwen_image_21_train_network.py", *words]) == 0
    assert "memorization gap" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("extra", "keys", "message"),
    [
        ([], "", "its outputs must be cached; add --cache_text_encoder_outputs"),
        (["--cache_text_encoder_outputs"], "color_aug = true", "color_aug changes reference images in every draw"),
    ],
    ids=["not cached", "changed in every draw"],
)
def test_pairs_with_uncacheable_features_are_rejected(
    train_qwen: Train, tiny_qwen_arguments: list[str], tmp_path: Path, extra: list[str], keys: str, message: str
) -> None:
    config = pairs(tmp_path)
    config.write_text(config.read_text().replace("flip_aug = true", keys))
    done = train_qwen([*tiny_qwen_arguments, *settings(config, tmp_path), "--network_train_unet_only", *extra])
    assert done.status == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / "out" / "mine.safetensors").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("cache", [[], ["--cache_latents_to_disk"]], ids=["encoded in the step", "cached"])
def test_the_alpha_channel_is_trained_unless_it_is_used_as_a_mask(
    train_qwen: Train, tiny_qwen_arguments: list[str], tmp_path: Path, cache: list[str]
) -> None:
    """The disk cache distinguishes the latents of both cases."""
    weights = {}
    for folder in ("clear", "opaque"):
        for path in make_images(tmp_path / folder, 2).glob("*.png"):
            if folder == "clear":
                make_half_transparent(path)
    for name, folder, keys in (
        ("image", "clear", ""),
        ("mask", "clear", "alpha_mask = true"),
        ("opaque", "opaque", ""),
    ):
        config = tmp_path / "data.toml"
        config.write_text(
            f'[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nclass_tokens = "cat"\n{keys}\n'
            f'image_dir = "{(tmp_path / folder).as_posix()}"\n'
        )
        train_qwen(
            [
                *tiny_qwen_arguments,
                *settings(config, tmp_path),
                *cache,
                "--output_name",
                name,
                "--network_train_unet_only",
            ]
        ).ok()
        weights[name] = load_saved(tmp_path, name)
    assert not are_equal(weights["image"], weights["opaque"])
    assert not are_equal(weights["image"], weights["mask"]) and not are_equal(weights["mask"], weights["opaque"])


# moss_image_train_network.py on a tiny model: a settings file for sd-scripts, and caching commands.

SETTINGS = """
pretrained_model_name_or_path = "{base}"
text_encoder = "{text}"
vae = "{vae}"
disable_mmap_load_safetensors = true
network_module = "networks.lora_generic"
network_dim = 32
network_alpha = 16
network_train_unet_only = true
timestep_sampling = "sigma"
weighting_scheme = "logit_normal"
logit_mean = -1.09
logit_std = 0.95
discrete_flow_shift = 1.0
gradient_checkpointing = true
unsloth_offload_checkpointing = true
sdpa = true
mixed_precision = "bf16"
cache_latents = true
cache_latents_to_disk = true
cache_text_encoder_outputs = true
cache_text_encoder_outputs_to_disk = true
loss_type = "l2"
optimizer_type = "AdamW"
learning_rate = 7.5e-5
resize_interpolation = "lanczos"
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
keep_tokens = 1
caption_extension = ".txt"
train_data_dir = "{images}"
resolution = "64"
output_dir = "{out}"
output_name = "mine"
max_train_steps = 2
max_data_loader_n_workers = 0
"""


tiny_moss_arguments = tiny_model("moss_image", 31)


@pytest.fixture
def train_moss(train: Train) -> Train:
    return partial(train, script="moss_image_train_network")


def test_a_settings_file_for_sd_scripts_trains_and_saves_names_that_comfyui_finds(
    train_moss: Train, tiny_moss_arguments: list[str], images: Path, tmp_path: Path
) -> None:
    base, vae, text = tiny_moss_arguments[1::2]
    values = {"base": base, "vae": vae, "text": text, "images": images.as_posix(), "out": (tmp_path / "out").as_posix()}
    (tmp_path / "settings.toml").write_text(SETTINGS.format(**values))
    train_moss(["--config_file", str(tmp_path / "settings.toml")]).ok()
    tensors = load_file(tmp_path / "out" / "mine.safetensors")
    layers = [f"proj.{name}" for name in ("q", "k", "v", "o", "ffn_up_gate", "ffn_down")]
    assert tensors.keys() == {
        f"diffusion_model.layers.{n}.{layer}.lora_{part}.weight"
        for n in range(MOSS_CONFIG.num_layers)
        for layer in layers
        for part in "AB"
    }
    metadata = read_metadata(tmp_path / "out" / "mine.safetensors")
    assert metadata["ss_network_module"] == "networks.lora_generic"
    assert metadata["ss_base_model_version"] == "moss_image"


def test_caching_commands_fill_the_caches_that_training_reuses(
    train_moss: Train, tiny_moss_arguments: list[str], tmp_path: Path
) -> None:
    paths = paths_of(tiny_moss_arguments, tmp_path)
    run_command("moss_image_cache_latents", "--dataset_config {data} --vae {vae}", paths)
    run_command("moss_image_cache_text_encoder_outputs", "--dataset_config {data} --text_encoder {text}", paths)
    assert len(list(tmp_path.rglob("*_moss_latents.npz"))) == 3
    for file in tmp_path.rglob("*_moss_text.npz"):
        with np.load(file) as archive:
            states, mask = archive["hidden_state"], archive["attention_mask"]
        assert states.shape == (len(mask), MOSS_CONFIG.text_width) and mask.all()
    words = "--dit {dit} --dataset_config {data} --output_dir {out} --network_module networks.lora --max_train_steps 1"
    done = train_moss([*words.format(**paths).split(), "--mixed_precision", "bf16"]).ok()
    assert "latent cache: 3 entries reused, 0 to encode" in done.stderr
    assert re.search(r"text cache: \d files reused, 0 to encode", done.stderr)

"""Train the quickstart's base model: a very small Stable Diffusion 1.x, on images of the toy world.

The result is a diffusers folder (tokenizer, text encoder, VAE, U-Net, scheduler) with weights in fp16. Everything is
drawn and trained from fixed seeds, in under two hours on two CPU cores.

Letters of shapes: B images, T the 77 positions of a caption, H and W pixels or latent cells, C channels.
"""

import argparse
import copy
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

from benchmarks.toys.toy_files import check_model_folder, new_model
from library.base.command_parser import make_parser
from library.commands.command import command
from tools.quickstart.toy_world import (
    CAPTION_TEMPLATES,
    IMAGE_SIZE,
    QUICKSTART,
    ImageArray,
    Scene,
    draw_doodle,
    draw_scene,
    list_scenes,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)

WRITER = "benchmarks/toys/make_toy_base.py"
SCALING_FACTOR = 0.18215  # trainers of SD 1.x hardcode this factor
NUM_TIMESTEPS = 1000
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # how CLIP splits text before BPE
NUM_POSITIONS = 77
TEXT_WIDTH = 128

VAE_BATCH_SIZE = 8
NUM_DOODLES = 3  # per batch
VAE_LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-3  # weight of the mean over latents, relative to the mean over pixels
UNET_BATCH_SIZE = 32
IMAGES_PER_CAPTION = 2  # per batch; they share one pass of the text encoder
UNET_LEARNING_RATE = 1e-3
EMPTY_CAPTION_SHARE = 0.1  # trains the unconditional prediction
WARMUP_STEPS = 200
EMA_DECAY = 0.999


# --- tokenizer ---


def byte_letters() -> list[str]:
    """Return the character that represents each byte in CLIP's vocabulary, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def learn_merges(captions: Sequence[str]) -> list[tuple[str, str]]:
    """Learn byte pair merges from captions, most frequent first, until each of their words is one token."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    # tokenizers gives access to the merges through its JSON only.
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def make_tokenizer(captions: Sequence[str], folder: Path) -> "CLIPTokenizer":
    """Train a BPE tokenizer on captions, write it to `folder` in CLIP's file format, and load it from there.

    All 256 bytes are in its vocabulary, so an unknown word becomes several tokens instead of an error.
    """
    from transformers import CLIPTokenizer

    merges = learn_merges(captions)
    letters = byte_letters()
    # In the order of CLIP's vocabulary: bytes, bytes that end a word, merges, special tokens.
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges), BEGIN, END]
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": NUM_POSITIONS,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    merge_lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(merge_lines) + "\n", encoding="utf-8")
    for name, content in (
        ("vocab.json", vocabulary),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", settings),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder))


def tokenize(tokenizer: "CLIPTokenizer", captions: Sequence[str]) -> Tensor:
    """Return token ids (B, 77)."""
    return torch.tensor(
        tokenizer(list(captions), padding="max_length", truncation=True, max_length=NUM_POSITIONS)["input_ids"]
    )


# --- models ---


def make_text_encoder(tokenizer: "CLIPTokenizer") -> "CLIPTextModel":
    """Return CLIP's text encoder with two narrow layers and random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=NUM_POSITIONS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae() -> "AutoencoderKL":
    """Return SD 1.x's VAE, four levels deep, with few channels and random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=SCALING_FACTOR,
    )


def make_unet() -> "UNet2DConditionModel":
    """Return SD 1.x's U-Net with three levels, few channels and random weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=(64, 96, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )


def make_scheduler() -> Any:
    """Return SD 1.x's noise schedule with DDIM sampling."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


# --- training ---


def to_tensor(images: Sequence[ImageArray]) -> Tensor:
    """Return images as (B, 3, H, W) in [-1, 1], channels last in memory."""
    pixels_BHWC = torch.from_numpy(np.stack(images)).float() / 127.5 - 1
    return pixels_BHWC.permute(0, 3, 1, 2)


class Trainer:
    """AdamW with warm-up, cosine decay to zero, and an exponential moving average of the weights, with a shorter
    average at the start of training."""

    def __init__(self, modules: Sequence[nn.Module], learning_rate: float, weight_decay: float, num_steps: int) -> None:
        self.parameters: list[Tensor] = [parameter for module in modules for parameter in module.parameters()]
        self.averages: list[Any] = [copy.deepcopy(module).eval().requires_grad_(False) for module in modules]
        self.num_updates = 0
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
        warmup = min(WARMUP_STEPS, num_steps // 10 + 1)

        def factor(step: int) -> float:
            return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(step / num_steps, 1.0)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, loss: Tensor) -> None:
        """Take one optimizer step and update the moving average."""
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.num_updates += 1
        decay = min(EMA_DECAY, self.num_updates / (self.num_updates + 10))
        averaged: list[Tensor] = [parameter for module in self.averages for parameter in module.parameters()]
        with torch.no_grad():
            torch._foreach_lerp_(averaged, self.parameters, 1 - decay)


def draw_batch(scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    """Draw one batch (B, 3, H, W) for the VAE: scenes and doodles."""
    images = [draw_scene(scenes[int(rng.integers(len(scenes)))], rng) for _ in range(VAE_BATCH_SIZE - NUM_DOODLES)]
    return to_tensor(images + [draw_doodle(rng) for _ in range(NUM_DOODLES)])


def train_vae(num_steps: int, seed: int) -> "AutoencoderKL":
    """Train the VAE to reconstruct scenes and doodles from 8 x 8 latent cells, and rescale its latents."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    scenes = list_scenes()
    vae = make_vae().to(memory_format=torch.channels_last)
    trainer = Trainer([vae], VAE_LEARNING_RATE, 0.0, num_steps)
    progress = tqdm(range(num_steps), desc="train the VAE", mininterval=5)
    for _ in progress:
        pixels_BCHW = draw_batch(scenes, rng)
        posterior = vae.encode(pixels_BCHW).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels_BCHW
        reconstruction = error.abs().mean() + error.square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        trainer.step(reconstruction + KL_WEIGHT * kl)
        progress.set_postfix(error=f"{error.abs().mean().item():.4f}", kl=f"{kl.item():.2f}", refresh=False)
    averaged: AutoencoderKL = trainer.averages[0]
    rescale_latents(averaged, to_tensor([draw_scene(scene, rng) for scene in scenes]))
    return averaged.half().float()  # the U-Net trains on latents of the weights as saved


@torch.no_grad()
def rescale_latents(vae: "AutoencoderKL", pixels_BCHW: Tensor) -> None:
    """Fold a scale and a shift into the VAE, so that latents times 0.18215 have mean 0 and deviation 1 per channel."""
    # The 1 x 1 convolutions around the latents absorb both, so the VAE's reconstruction does not change.
    latents_BCHW = vae.encode(pixels_BCHW).latent_dist.mean
    mean_C = latents_BCHW.mean(dim=(0, 2, 3))
    scale_C = 1 / (SCALING_FACTOR * latents_BCHW.std(dim=(0, 2, 3)))
    before, after = vae.quant_conv, vae.post_quant_conv  # the first outputs means and log variances
    # The bias comes first, because it needs the weight before scaling.
    after.bias += after.weight[:, :, 0, 0] @ mean_C
    after.weight /= scale_C.view(1, -1, 1, 1)
    num_channels = len(scale_C)
    before.weight[:num_channels] *= scale_C.view(-1, 1, 1, 1)
    before.bias[:num_channels] = (before.bias[:num_channels] - mean_C) * scale_C
    # A scale s adds 2 log s to a log variance.
    before.bias[num_channels:] += 2 * scale_C.log()


@torch.no_grad()
def draw_latents(vae: "AutoencoderKL", scenes: Sequence[Scene], num_each: int, rng: np.random.Generator) -> Tensor:
    """Draw `num_each` images of every scene and return their scaled latents (scene, image, C, H, W)."""
    return torch.stack(
        [
            vae.encode(to_tensor([draw_scene(scene, rng) for _ in range(num_each)])).latent_dist.mean * SCALING_FACTOR
            for scene in tqdm(scenes, desc="encode images", mininterval=5)
        ]
    )


def batches(
    latents_SPCHW: Tensor, ids_SKT: Tensor, empty_T: Tensor, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield latents (B, C, H, W) and token ids (B / 2, T) endlessly; one row of ids serves two consecutive images."""
    num_scenes, num_images = latents_SPCHW.shape[:2]
    num_captions = UNET_BATCH_SIZE // IMAGES_PER_CAPTION
    while True:
        s_N = torch.randint(num_scenes, (num_captions,), generator=generator)
        k_N = torch.randint(ids_SKT.shape[1], (num_captions,), generator=generator)
        p_B = torch.randint(num_images, (UNET_BATCH_SIZE,), generator=generator)
        is_empty_N = torch.rand(num_captions, generator=generator) < EMPTY_CAPTION_SHARE
        ids_NT = torch.where(is_empty_N[:, None], empty_T, ids_SKT[s_N, k_N])
        yield latents_SPCHW[s_N.repeat_interleave(IMAGES_PER_CAPTION), p_B], ids_NT


def train_unet(
    latents_SPCHW: Tensor, ids_SKT: Tensor, empty_T: Tensor, tokenizer: "CLIPTokenizer", num_steps: int, seed: int
) -> tuple["UNet2DConditionModel", "CLIPTextModel"]:
    """Train the U-Net and the text encoder together to predict the noise in latents, given the caption."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    scheduler = make_scheduler()
    trainer = Trainer([unet, text_encoder], UNET_LEARNING_RATE, 0.01, num_steps)
    progress = tqdm(range(num_steps), desc="train the U-Net and the text encoder", mininterval=5)
    mean_loss = 1.0
    for (latents_BCHW, ids_NT), _ in zip(batches(latents_SPCHW, ids_SKT, empty_T, generator), progress, strict=False):
        noise_BCHW = torch.randn(latents_BCHW.shape, generator=generator)
        timesteps_B = torch.randint(NUM_TIMESTEPS, (len(latents_BCHW),), generator=generator)
        noisy_BCHW = scheduler.add_noise(latents_BCHW, noise_BCHW, timesteps_B)
        hidden_BTC = text_encoder(ids_NT).last_hidden_state.repeat_interleave(IMAGES_PER_CAPTION, dim=0)
        loss = mse_loss(unet(noisy_BCHW, timesteps_B, hidden_BTC).sample, noise_BCHW)
        trainer.step(loss)
        mean_loss += 0.01 * (loss.item() - mean_loss)
        progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
    averaged_unet, averaged_text_encoder = trainer.averages
    return averaged_unet, averaged_text_encoder


# --- the command ---


def save_base(
    out: Path,
    vae: nn.Module,
    unet: nn.Module,
    text_encoder: nn.Module,
    tokenizer: "CLIPTokenizer",
    tokenizer_files: Path,
) -> None:
    """Write the diffusers folder, weights in fp16."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae.half(),
        text_encoder.half(),
        tokenizer,
        unet.half(),
        make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(out))
    for path in (out / "tokenizer").iterdir():
        path.unlink()
    for path in tokenizer_files.iterdir():  # CLIP's four files; what save_pretrained writes depends on its version
        (out / "tokenizer" / path.name).write_bytes(path.read_bytes())


def make_toy_base(args: argparse.Namespace) -> None:
    """Train every part and write the folder."""
    from diffusers import AutoencoderKL

    check_model_folder("--out", args.out, WRITER)
    scenes = list_scenes()
    captions_SK = [[scene.caption(template) for template in CAPTION_TEMPLATES] for scene in scenes]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer([caption for captions in captions_SK for caption in captions], Path(folder))
        if args.vae is None:
            vae = train_vae(args.vae_steps, args.seed)
        else:
            vae = AutoencoderKL.from_pretrained(str(args.vae)).float().eval()
        rng = np.random.default_rng([args.seed, 1])
        latents_SPCHW = draw_latents(vae, scenes, args.images_per_scene, rng)
        logger.info("scaled latents: mean %.3f, deviation %.3f", latents_SPCHW.mean(), latents_SPCHW.std())
        ids_SKT = torch.stack([tokenize(tokenizer, captions) for captions in captions_SK])
        empty_T = tokenize(tokenizer, [""])[0]
        unet, text_encoder = train_unet(latents_SPCHW, ids_SKT, empty_T, tokenizer, args.unet_steps, args.seed)
        with new_model(args.out, WRITER) as out:
            save_base(out, vae, unet, text_encoder, tokenizer, Path(folder))
    weights = list(args.out.rglob("*.safetensors"))
    logger.info("%s: %.1f MB of weights", args.out, sum(path.stat().st_size for path in weights) / 1e6)


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "  python3 -m benchmarks.toys make_toy_base --out configs/quickstart/toy_base")
    parser.add_argument("--out", type=Path, default=QUICKSTART / "toy_base", help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of images, weights and training")
    parser.add_argument("--vae_steps", type=int, default=3000, help="training steps of the VAE")
    parser.add_argument("--unet_steps", type=int, default=5000, help="training steps of U-Net and text encoder")
    parser.add_argument("--images_per_scene", type=int, default=96, help="training images of every scene for the U-Net")
    parser.add_argument("--vae", type=Path, help="folder of a VAE to use instead of training one, e.g. OUT/vae")
    return parser


main = command(setup_parser, make_toy_base)

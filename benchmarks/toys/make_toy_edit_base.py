"""Train the toy edit model: a very small FLUX.1 Kontext, on edits of the toy world.

The result is a diffusers folder. Its transformer learns to keep an image and to paint its background white, gray or
black. It never sees a shape change, so a LoRA has something to teach it. The VAE is that of the quickstart's base model
with each of its four latent channels repeated four times. The text encoders have random weights, which suffice to tell
words apart. Everything follows from the seed and takes 20 minutes on one CPU core.

Letters of shapes: B images, C channels, H and W latent cells.
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

from benchmarks.toys.make_toy_base import SCALING_FACTOR, Trainer, to_tensor
from benchmarks.toys.toy_files import check_model_folder, new_model
from library.architectures.flux.model import Flux, FluxConfig
from library.architectures.flux.reference import diffusers_model, diffusers_state
from library.base.command_parser import make_parser
from library.commands.command import command
from library.diffusion.timesteps import shift_sigmas
from library.models.vae.flux import SCALE, SHIFT, map_latents
from tools.quickstart.toy_world import (
    BACKGROUNDS,
    COLOURS,
    KNOWN_SHAPES,
    QUICKSTART,
    SIZES,
    ImageArray,
    Scene,
    draw_scene,
    list_scenes,
)

logger = logging.getLogger(__name__)

WRITER = "benchmarks/toys/make_toy_edit_base.py"
TOY_BASE = QUICKSTART / "toy_base"
COPIES = 4  # of each latent channel of the quickstart's VAE
TEXT_WIDTH, POOLED_WIDTH, NUM_TEXT_TOKENS = 64, 32, 16
CONFIG = FluxConfig(
    in_features=64,
    width=96,
    head_width=32,
    mlp_width=384,
    text_width=TEXT_WIDTH,
    pooled_width=POOLED_WIDTH,
    num_double=2,
    num_single=4,
    has_guidance=True,
)
WORDS = (
    "a", "on", "background", "make", "the", "shape", "paint", "keep", "picture", ",",
    *COLOURS, *BACKGROUNDS, *SIZES, *KNOWN_SHAPES,
)  # fmt: skip
BATCH_SIZE = 16
LEARNING_RATE = 2e-3
SHIFT_OF_LEVELS = 2.0  # towards noise: the average of four channel copies is less noisy


@dataclass(frozen=True)
class Edit:
    """An instruction with the scenes before and after it; `seed` draws both in the same position and size."""

    instruction: str
    before: Scene
    after: Scene
    seed: int

    def draw(self, scene: Scene) -> ImageArray:
        return draw_scene(scene, np.random.default_rng(self.seed))


def paint_background(scene: Scene, seed: int, rng: np.random.Generator) -> Edit:
    new_colour = str(rng.choice([colour for colour in BACKGROUNDS if colour != scene.background]))
    return Edit(f"paint the background {new_colour}", scene, replace(scene, background=new_colour), seed)


def keep(scene: Scene, seed: int, rng: np.random.Generator) -> Edit:
    """Change nothing."""
    return Edit("keep the picture", scene, scene, seed)


MakeEdit = Callable[[Scene, int, np.random.Generator], Edit]
KNOWN_EDITS: tuple[MakeEdit, ...] = (paint_background, paint_background, keep)


def draw_edits(make: MakeEdit, count: int, seed: int) -> list[Edit]:
    """Draw edits of random scenes, each with its own position, size and shades."""
    rng, scenes = np.random.default_rng(seed), list_scenes()
    return [make(scenes[int(rng.integers(len(scenes)))], int(rng.integers(1 << 31)), rng) for _ in range(count)]


def make_vae() -> Any:
    """Return the quickstart's VAE with 16 latent channels in FLUX.1's scale and shift."""
    from diffusers import AutoencoderKL

    toy = AutoencoderKL.from_pretrained(str(TOY_BASE / "vae")).float()
    vae = AutoencoderKL.from_config({**toy.config, "latent_channels": 4 * COPIES, "scaling_factor": SCALE})
    state = dict(toy.state_dict())
    rows = torch.arange(8).repeat_interleave(COPIES)  # rows of the means, then of the log variances
    ratio = SCALING_FACTOR / SCALE
    state["encoder.conv_out.weight"] = state["encoder.conv_out.weight"][rows]
    state["encoder.conv_out.bias"] = state["encoder.conv_out.bias"][rows]
    before, after = state["quant_conv.weight"], state["post_quant_conv.weight"]
    state["quant_conv.weight"] = before[rows][:, rows] / COPIES
    state["quant_conv.bias"] = state["quant_conv.bias"][rows]
    half = 4 * COPIES
    state["quant_conv.weight"][:half] *= ratio
    state["quant_conv.bias"][:half] = state["quant_conv.bias"][:half] * ratio + SHIFT
    state["quant_conv.bias"][half:] += 2 * np.log(ratio)
    # The decoder averages the copies and undoes the scale.
    copies = rows[:half]
    state["post_quant_conv.bias"] = (state["post_quant_conv.bias"] - SHIFT / ratio * after[:, :, 0, 0].sum(1))[copies]
    state["post_quant_conv.weight"] = after[copies][:, copies] / (COPIES * ratio)
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"][:, copies] / COPIES
    vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)


def make_text_encoders(num_clip_words: int, num_t5_words: int) -> tuple[Any, Any]:
    """Return the text encoders of CLIP and T5, with one narrow layer each and random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    ids = {"bos_token_id": num_clip_words - 2, "eos_token_id": num_clip_words - 1, "pad_token_id": num_clip_words - 1}
    clip = CLIPTextConfig(
        vocab_size=num_clip_words, hidden_size=POOLED_WIDTH, intermediate_size=2 * POOLED_WIDTH, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=77, hidden_act="quick_gelu", **ids,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=num_t5_words, d_model=TEXT_WIDTH, d_kv=16, d_ff=2 * TEXT_WIDTH, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return CLIPTextModel(clip).eval(), T5EncoderModel(t5).eval()


def write_t5_tokenizer(folder: Path) -> Any:
    """Write a T5 tokenizer that knows the words of captions and instructions."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -3.0), *((f"▁{word}", -2.0) for word in WORDS)]
    pieces.append((",", -2.0))
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


class Text:
    """Cached text encoder outputs of captions, as the trainer computes them."""

    def __init__(self, folder: Path, encoders: tuple[Any, Any]) -> None:
        from transformers import CLIPTokenizer, T5TokenizerFast

        self.clip, self.t5 = encoders
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
        self.t5_tokenizer = T5TokenizerFast.from_pretrained(str(folder / "tokenizer_2"))
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return T5's states (B, 16, 64) and CLIP's pooled states (B, 32)."""
        for caption in captions:
            if caption not in self.known:
                ids = {
                    name: torch.tensor([tokenizer(caption, padding="max_length", max_length=length)["input_ids"]])
                    for name, tokenizer, length in (
                        ("clip", self.clip_tokenizer, 77),
                        ("t5", self.t5_tokenizer, NUM_TEXT_TOKENS),
                    )
                }
                pooled = self.clip(ids["clip"]).pooler_output[0]
                self.known[caption] = self.t5(ids["t5"]).last_hidden_state[0], pooled
        rows = [self.known[caption] for caption in captions]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


Batch = tuple[list[str], Tensor, Tensor]
"""(instructions, latents of the results BCHW, latents of the references BCHW)."""


def encode_images(vae: nn.Module, images: Sequence[ImageArray]) -> Tensor:
    """Return the latents of images as the transformer receives them."""
    parts = [to_tensor(images[n : n + BATCH_SIZE]) for n in range(0, len(images), BATCH_SIZE)]
    with torch.no_grad():
        return torch.cat([map_latents("_toy.npz").encode(vae, part, None) for part in tqdm(parts, desc="encode")])


def batches(vae: nn.Module, num_edits: int, seed: int) -> Iterator[Batch]:
    """Yield batches of known edits endlessly."""
    rng = np.random.default_rng(seed)
    share = num_edits // len(KNOWN_EDITS)
    edits = [edit for n, make in enumerate(KNOWN_EDITS) for edit in draw_edits(make, share, 10 * seed + n)]
    results = encode_images(vae, [edit.draw(edit.after) for edit in edits])
    references = encode_images(vae, [edit.draw(edit.before) for edit in edits])
    while True:
        rows = rng.choice(len(edits), BATCH_SIZE, replace=False)
        yield [edits[n].instruction for n in rows], results[rows], references[rows]


def train(text: Text, vae: nn.Module, num_edits: int, num_steps: int, seed: int) -> Flux:
    """Train the transformer to predict the velocity, noise - latents."""
    torch.manual_seed(seed)
    model = Flux(CONFIG)
    with torch.no_grad():  # start as a scaled identity: most of the velocity is the input's noise
        nn.init.orthogonal_(model.img_in.weight)
        model.final_layer.linear.weight.copy_(0.7 * model.img_in.weight.T)
    trainer = Trainer([model], LEARNING_RATE, 0.01, num_steps)
    progress = tqdm(range(num_steps), desc="train the transformer", mininterval=5)
    mean_loss = 2.0
    for (instructions, latents_BCHW, references_BCHW), _ in zip(batches(vae, num_edits, seed), progress, strict=False):
        noise_BCHW = torch.randn_like(latents_BCHW)
        sigmas_B = shift_sigmas(torch.randn(BATCH_SIZE).sigmoid(), SHIFT_OF_LEVELS)
        s = sigmas_B.view(-1, 1, 1, 1)
        states, pooled = text(instructions)
        velocity = model(
            (1 - s) * latents_BCHW + s * noise_BCHW, sigmas_B, states, pooled, torch.ones(BATCH_SIZE), None,
            [references_BCHW],
        )  # fmt: skip
        loss = mse_loss(velocity, noise_BCHW - latents_BCHW)
        trainer.step(loss)
        mean_loss += 0.02 * (loss.item() - mean_loss)
        progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
    averaged: Flux = trainer.averages[0]
    return averaged


def save_part(folder: Path, config: dict[str, Any], state: dict[str, Tensor], stem: str) -> None:
    """Write one part of a diffusers folder, weights in fp16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    halves = {name: tensor.detach().half().contiguous().clone() for name, tensor in state.items()}
    save_file(halves, folder / f"{stem}.safetensors", {"format": "pt"})


def make_toy_edit_base(args: argparse.Namespace) -> None:
    """Check the folder, train the transformer and write all files."""
    check_model_folder("--out", args.out, WRITER)
    with new_model(args.out, WRITER) as out:
        write_model(out, args.num_edits, args.steps, args.seed)
    weights = list(args.out.rglob("*.safetensors"))
    logger.info("%s: %.1f MB of weights", args.out, sum(path.stat().st_size for path in weights) / 1e6)


def write_model(out: Path, num_edits: int, num_steps: int, seed: int) -> None:
    """Train the transformer and write the folder."""
    torch.manual_seed(seed)
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    for path in (TOY_BASE / "tokenizer").iterdir():
        (out / "tokenizer" / path.name).write_bytes(path.read_bytes())
    num_clip_words = len(json.loads((out / "tokenizer" / "vocab.json").read_text(encoding="utf-8")))
    num_t5_words = len(write_t5_tokenizer(out / "tokenizer_2").get_vocab())
    # Rounded to fp16 first, so that the transformer trains on outputs of the weights as saved.
    vae, encoders = make_vae().half().float(), make_text_encoders(num_clip_words, num_t5_words)
    clip, t5 = encoders = encoders[0].half().float(), encoders[1].half().float()
    vae_config = {name: value for name, value in vae.config.items() if name != "_name_or_path"}
    save_part(out / "vae", vae_config, vae.state_dict(), "diffusion_pytorch_model")
    clip_config = {**clip.config.to_dict(), "architectures": ["CLIPTextModel"]}
    t5_config = {**t5.config.to_dict(), "architectures": ["T5EncoderModel"]}
    save_part(out / "text_encoder", clip_config, clip.state_dict(), "model")
    # It is tied to shared.weight, which the file has.
    t5_state = {name: tensor for name, tensor in t5.state_dict().items() if name != "encoder.embed_tokens.weight"}
    save_part(out / "text_encoder_2", t5_config, t5_state, "model")
    (out / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"}) + "\n", encoding="utf-8")
    model = train(Text(out, encoders), vae, num_edits, num_steps, seed)
    diffusers_transformer = diffusers_model(model)
    state = diffusers_state(model.state_dict(), CONFIG.width)
    save_part(out / "transformer", json.loads(diffusers_transformer.to_json_string()), state, "diffusion_pytorch_model")


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "  python3 -m benchmarks.toys make_toy_edit_base --out output/toy_edit_base")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--num_edits", type=int, default=3000, help="training pairs (default: 3000)")
    parser.add_argument("--steps", type=int, default=7000, help="training steps of the transformer (default: 7000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of images, weights and training (default: 1)")
    return parser


main = command(setup_parser, make_toy_edit_base)

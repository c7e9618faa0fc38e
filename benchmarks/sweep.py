"""Measure training N adapters in one run (--sweep) as a share of N runs: forward, backward, clipping, optimizer.

First the quickstart's toy base model, with real batches of one image; then blocks of FLUX.1 and SDXL in full size with
an adapter on every Linear, without an optimizer. Both ways take turns on the same weights and one thread. The figures
are CPU times of the process and the median of the rounds' ratios, so other load on the machine matters little. Loading,
caching and validation, which N runs do N times, are not counted.

    python benchmarks/sweep.py
    python benchmarks/sweep.py --adapters 8 --rank 32 --rounds 9
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.own_overhead import prepare_runs  # noqa: E402
from benchmarks.reading_in_a_format import CONFIG as FLUX  # noqa: E402
from library.architectures.flux.model import Flux  # noqa: E402
from networks.core.changes.adapter import Adapter  # noqa: E402
from networks.core.changes.alpha import ScaledDelta  # noqa: E402
from networks.core.changes.low_rank import LowRank  # noqa: E402
from networks.core.network.multiplexer import AdapterMultiplexer  # noqa: E402
from networks.core.targets.targets import TargetModule  # noqa: E402
from tests.running import make_images  # noqa: E402

CPU = torch.device("cpu")
TOY_SIDE = 64

Work = Callable[[], None]


def cpu_seconds(work: Work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def compare(name: str, together: Work, apart: Work, rounds: int) -> None:
    """Print the times of both ways and their ratio, after one warm-up round."""
    pairs = [(cpu_seconds(together), cpu_seconds(apart)) for _ in range(rounds + 1)][1:]
    ratio = statistics.median(one / other for one, other in pairs)
    one, other = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{name:46} {one:10.1f} ms {other:10.1f} ms {ratio:8.2f}", flush=True)


def toy(args: argparse.Namespace, folder: Path, *network_args: str) -> tuple[Work, Work]:
    """Return steps of the toy base model: all adapters in one pass, and one pass per adapter."""
    from library.training.loop import loop
    from library.training.loop.stacked_step import backward_stacked
    from library.training.run_parts import Run

    words = [
        "--pretrained_model_name_or_path", str(ROOT / "configs/quickstart/toy_base"), "--train_data_dir",
        str(folder / "pictures"), "--caption_extension", ".txt", "--resolution", str(TOY_SIDE), "--train_batch_size",
        "1", "--output_dir", str(folder / "out"), "--network_module", "networks.lora", "--network_dim", str(args.rank),
        "--optimizer_type", "AdamW", "--cache_latents", "--max_data_loader_n_workers", "0",
        "--network_train_unet_only", *(["--network_args", *network_args] if network_args else []),
    ]  # fmt: skip
    prepared = prepare_runs(words, [1e-4 * (i + 1) for i in range(args.adapters)])
    runs = [one.run for one in prepared]
    for run in runs:
        run.context.network.start_epoch(*run.context.models.network_view)
    batches = list(runs[0].batches.iterate_epoch(1, range(4), lambda index: 0, 0, False))

    def update(run: Run) -> None:
        torch.nn.utils.clip_grad_norm_(run.context.network.trainable_parameters(), 1.0)
        run.optimization.optimizer.step()
        run.optimization.optimizer.zero_grad(set_to_none=True)

    def together() -> None:
        for number, batch in enumerate(batches):
            backward_stacked(runs, batch, number, 1, 0)
            for run in runs:
                update(run)

    def apart() -> None:
        for run in runs:
            for number, batch in enumerate(batches):
                loop.backward(run, batch, number, 1, 0)
                update(run)

    return together, apart


def shared(block: nn.Module, args: argparse.Namespace) -> AdapterMultiplexer:
    """Stack the adapters on every Linear of a block."""
    linears = [(path, layer) for path, layer in block.named_modules() if isinstance(layer, nn.Linear)]

    def adapters() -> Sequence[Adapter]:
        return [
            Adapter(
                TargetModule(path, path, layer, "plain"),
                ScaledDelta(layer, LowRank(layer, args.rank), args.rank),
                1.0,
            )
            for path, layer in linears
        ]

    return AdapterMultiplexer([adapters() for _ in range(args.adapters)], [False] * args.adapters)


def passes(block: nn.Module, args: argparse.Namespace, run: Callable[[int], Tensor]) -> tuple[Work, Work]:
    """Return forward and backward of `run(samples)`: with all adapters at once, and with one after another."""
    multiplexer = shared(block.requires_grad_(False).eval(), args)
    seeds = dict.fromkeys(range(args.adapters), 0)

    def together() -> None:
        with multiplexer.together(seeds, CPU):
            run(args.adapters).square().mean().backward()

    def apart() -> None:
        for place in range(args.adapters):
            with multiplexer.only(place):
                run(1).square().mean().backward()

    return together, apart


def flux_block(args: argparse.Namespace) -> tuple[Work, Work]:
    """Return passes of FLUX.1 with one double and one single block; its other layers are small."""
    from benchmarks.denoisers import ours_of, random_inputs

    side = args.flux_side // 16
    model = ours_of(Flux, FLUX, torch.float32)

    def run(count: int) -> Tensor:
        latents, text = random_inputs(
            (count, 16, 2 * side, 2 * side), (count, 128, FLUX.text_width), dtype=torch.float32
        )
        pooled, ones = torch.randn(count, FLUX.pooled_width), torch.ones(count)
        found: Tensor = model(latents, 0.5 * ones, text, pooled, ones)
        return found

    return passes(model, args, run)


def sdxl_block(args: argparse.Namespace) -> tuple[Work, Work]:
    """Return passes of one of SDXL's 60 transformer blocks of width 1280."""
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(1280, 20, 64, cross_attention_dim=2048, activation_fn="geglu")
    tokens = (args.sdxl_side // 32) ** 2

    def run(count: int) -> Tensor:
        x = torch.randn(count, tokens, 1280, requires_grad=True)
        found: Tensor = block(x, encoder_hidden_states=torch.randn(count, 77, 2048))
        return found

    return passes(block, args, run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=4, help="number of adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="rounds, after one warm-up round")
    parser.add_argument("--flux_side", type=int, default=256, help="image side for the block of FLUX.1, in pixels")
    parser.add_argument("--sdxl_side", type=int, default=512, help="image side for the block of SDXL, in pixels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    print(f"{args.adapters} adapters of rank {args.rank}, batch 1, one thread{'':12} in one      apart    ratio")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "pictures" / "1_thing", 4, TOY_SIDE)
        compare("toy base model, attention", *toy(args, folder), args.rounds)
        compare("toy base model, convolutions too", *toy(args, folder, f"conv_dim={args.rank}"), args.rounds)
    rounds = max(1, args.rounds // 2)
    compare(f"SDXL, one block, {(args.sdxl_side // 32) ** 2} tokens", *sdxl_block(args), rounds)
    compare(f"FLUX.1, two blocks, {(args.flux_side // 16) ** 2 + 128} tokens", *flux_block(args), rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Measure the peak main memory of reading a denoiser into a weight format, relative to the result plus the largest
weight.

Writes one double and one single block of FLUX.1 in full size, in bf16 with random values, and reads them in a separate
process for each format. Needs about 0.7 GB of disk.

    python benchmarks/reading_in_a_format.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from library.architectures.flux.model import Flux, FluxConfig  # noqa: E402
from library.models.loading import build_on_meta_device  # noqa: E402
from library.options.machine.base_formats import BASE_FORMATS  # noqa: E402

CONFIG = FluxConfig(
    in_features=64,
    width=3072,
    head_width=128,
    mlp_width=12288,
    text_width=4096,
    pooled_width=768,
    num_double=1,
    num_single=1,
    has_guidance=True,
)
CHILD = """
import sys
from pathlib import Path
import torch
from benchmarks.reading_in_a_format import empty
from library.checkpoints.weights import open_weights
from library.memory.codecs.weight_format import load_format
from library.models.loading import materialise

def status(word):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if word in line) / 1024

codec = None if sys.argv[2] == "none" else load_format(sys.argv[2]).codec
if codec is not None:
    codec.encode(torch.ones(64, 64))  # what is imported on first use
weights, model = open_weights(Path(sys.argv[1])), empty()
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = materialise(model, weights, torch.bfloat16, codec)
result = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print(status("VmHWM") - before, result, max(2 * torch.Size(s).numel() for s in weights.shapes.values()) / 2**20)
"""


def empty() -> nn.Module:
    return build_on_meta_device(Flux, CONFIG)


def main() -> None:
    from safetensors.torch import save_file

    print(f"{'format':14}{'peak MiB':>10}{'result':>9}{'largest weight':>16}{'peak / (result + weight)':>26}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blocks.safetensors"
        save_file({k: torch.randn(v.shape, dtype=torch.bfloat16) for k, v in empty().state_dict().items()}, path)
        for name in ("none", *BASE_FORMATS):
            command = [sys.executable, "-c", CHILD, str(path), name]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            peak, result, largest = map(float, done.stdout.split()[-3:])
            print(f"{name:14}{peak:10.0f}{result:9.0f}{largest:16.0f}{peak / (result + largest):26.2f}")


if __name__ == "__main__":
    main()

"""Measure how large an adapter's change has to be to be seen, on the quickstart's base model.

Images with adapters of several sizes are compared with those without, from the same noise.

Prints a line for each file and strength: the change relative to the base model's weights, the mean difference of the
images in values of 0 to 255, and the share of images that show their prompt. The bounds of
library/checkpoints/relative_change.py come from these tables.

    python benchmarks/visible_change.py output/quickstart/quickstart.safetensors --strengths 0.03 0.1 0.3 1
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from library.checkpoints.files import load_state_dict, read_metadata  # noqa: E402
from tools.base_models import open_base_model  # noqa: E402
from tools.check_lora_weights import judge  # noqa: E402
from tools.quickstart.sampling import Prompt, count_right, load_pipeline, merge_lora, sample  # noqa: E402
from tools.quickstart.toy_world import QUICKSTART  # noqa: E402

CAPTIONS = (
    "a small blue heart on a gray background",
    "a large red heart on a black background",
    "a large yellow heart on a white background",
    "a small green heart on a white background",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--base", type=Path, default=QUICKSTART / "toy_base")
    parser.add_argument("--strengths", nargs="+", type=float, default=[1.0])
    parser.add_argument("--count", type=int, default=8, help="images per caption")
    args = parser.parse_args()
    prompts = [Prompt(caption, seed) for caption in CAPTIONS for seed in range(args.count)]
    plain = sample(load_pipeline(args.base), prompts)
    base = open_base_model("--base", args.base)
    print(f"without: {count_right(plain, prompts) / len(prompts):.0%} show their prompt")
    for path in args.adapters:
        weights = load_state_dict(path)
        change = judge(weights, read_metadata(path), str(path), base_model=base).relative_change
        assert change is not None
        for strength in args.strengths:
            pipeline = load_pipeline(args.base)
            merge_lora(pipeline, weights, strength)
            images = sample(pipeline, prompts)
            pairs = zip(images, plain, strict=True)
            difference = np.mean([np.abs(a.astype(float) - b.astype(float)).mean() for a, b in pairs])
            shown = count_right(images, prompts) / len(prompts)
            print(f"{path.name} at {strength:g}: {change * strength:7.2%} {difference:6.1f} {shown:5.0%}", flush=True)


if __name__ == "__main__":
    main()

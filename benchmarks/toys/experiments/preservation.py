"""Hearts learned alone and with differential output preservation of circles and triangles, by the commands of
benchmarks/toys/README.md: the share of 32 images of each part that show shape, colour and background of their prompt.
Squares are neither trained nor preserved.
"""

from pathlib import Path

from benchmarks.toys.check_adapter import draw_prompts
from library.checkpoints.files import load_state_dict
from tests.contracts.test_docs_commands import TOYS
from tests.runs.docs_pages import run_commands
from tools import start
from tools.quickstart.sampling import count_right, load_pipeline, merge_lora, sample

COLUMNS = ("hearts", "squares", "circles", "triangles")


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    alone = ["--dataset_config", "configs/examples/toy_forgetting.toml", "--output_name", "alone"]
    run_commands(TOYS, "toy_shapes", folder, ["--seed", str(seed)])
    run_commands(TOYS, "toy_preservation", folder, ["--seed", str(seed), *alone])
    rows = {}
    for row, name in {"base model": "", "hearts alone": "alone", "with preservation": "preservation"}.items():
        pipeline = load_pipeline(start.ROOT / start.TOY_BASE)
        if name:
            merge_lora(pipeline, load_state_dict(folder / "output" / "toy_shapes" / f"{name}.safetensors"))
        prompts = (draw_prompts((column.removesuffix("s"),), 32) for column in COLUMNS)
        rows[row] = tuple(count_right(sample(pipeline, of_shape), of_shape) / 32 for of_shape in prompts)
    return rows

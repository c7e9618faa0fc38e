"""Hearts learned alone and with differential output preservation of circles and triangles, by the commands of
benchmarks/toys/README.md: the share of 32 images of each part that show shape, colour and background of their prompt.
Squares are neither trained nor preserved.
"""

from pathlib import Path

from benchmarks.toys.check_adapter import draw_prompts
from benchmarks.toys.experiments import count_shares
from library.checkpoints.files import load_state_dict
from tests.contracts.test_docs import TOYS
from tests.runs.docs_pages import run_commands

COLUMNS = ("hearts", "squares", "circles", "triangles")


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    alone = ["--dataset_config", "configs/examples/toy_forgetting.toml", "--output_name", "alone"]
    run_commands(TOYS, "toy_shapes", folder, ["--seed", str(seed)])
    run_commands(TOYS, "toy_preservation", folder, ["--seed", str(seed), *alone])
    rows = {"hearts alone": "alone", "with preservation": "preservation"}
    files = {row: folder / "output" / "toy_shapes" / f"{name}.safetensors" for row, name in rows.items()}
    weights = {"base model": {}, **{row: load_state_dict(file) for row, file in files.items()}}
    prompts = [draw_prompts((column.removesuffix("s"),), 32) for column in COLUMNS]
    return {row: count_shares(of_row, *prompts) for row, of_row in weights.items()}

"""The quickstart's score counts prompts that stood in the training apart from new combinations."""

import numpy as np

from tools.quickstart.draw_before_after import CAPTIONS, score
from tools.quickstart.sampling import Prompt, read_prompts
from tools.quickstart.toy_world import QUICKSTART, draw_scene, parse_caption


def test_trained_and_new_prompts_are_counted_apart() -> None:
    prompts = [Prompt(f"a large red {shape} on a white background", n) for n, shape in enumerate(["square", "circle"])]
    images = [
        draw_scene(parse_caption(prompt.caption), np.random.default_rng(n)) for n, prompt in enumerate(prompts * 2)
    ]
    result = score(images, prompts * 2, {prompts[0].caption})
    assert str(result) == "2 of 2 trained on, 2 of 2 new combinations"
    wrong = score([images[1], images[1]], prompts, {prompts[0].caption})
    assert (wrong.right, wrong.of, wrong.share) == ((0, 1), (1, 1), 0.5)


def test_ten_of_the_quickstarts_prompts_are_new() -> None:
    captions = {file.read_text().strip() for file in CAPTIONS.glob("*.txt")}
    assert [p.caption in captions for p in read_prompts(QUICKSTART / "prompts.txt")] == [False] * 10 + [True] * 14

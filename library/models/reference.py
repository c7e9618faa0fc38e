"""Comparison of a denoiser with the class of another library: what the base models' `reference.py` share.

Such a module defines `outputs(denoiser, generator)`, which returns what both compute for the same random inputs, in
float32. Of each stack of blocks two are taken, so that models of any size can be compared in main memory.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor


def first_and_last(state: Mapping[str, Tensor], stacks: Sequence[str]) -> tuple[dict[str, Tensor], list[int]]:
    """Return the weights, float32, with the first and the last block of each stack alone, renumbered; and how many each
    has now."""
    numbers = {
        stack: sorted({int(name.split(".")[1]) for name in state if name.startswith(f"{stack}.")}) for stack in stacks
    }
    kept = {stack: list(dict.fromkeys((found[0], found[-1]))) for stack, found in numbers.items()}
    taken: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stack, _, rest = name.partition(".")
        if stack in kept:
            number, _, inner = rest.partition(".")
            if int(number) not in kept[stack]:
                continue
            name = f"{stack}.{kept[stack].index(int(number))}.{inner}"
        taken[name] = tensor.float()
    return taken, [len(kept[stack]) for stack in stacks]

"""Which noise levels are trained.

Letters: B samples.
"""

import torch
from torch import Tensor

from library.errors import UserError


def draw_timesteps(
    num_samples: int, min_timestep: int, max_timestep: int, generator: torch.Generator, *, num_timesteps: int
) -> Tensor:
    """One whole timestep for each sample, uniform in [min_timestep, max_timestep); int64, shape B, on the CPU.

    Where min_timestep is max_timestep or above it, every sample gets max_timestep and nothing is drawn: that is how a
    single level is validated.
    """
    check_timestep_range(min_timestep, max_timestep, num_timesteps)
    if min_timestep >= max_timestep:
        return torch.full((num_samples,), max_timestep, dtype=torch.int64)
    return torch.randint(min_timestep, max_timestep, (num_samples,), generator=generator)


def check_timestep_range(min_timestep: int, max_timestep: int, num_timesteps: int) -> None:
    """Raise UserError for limits outside the schedule."""
    if not 0 <= min_timestep < num_timesteps:
        raise UserError(f"--min_timestep is {min_timestep}; it must lie in 0..{num_timesteps - 1}")
    highest = num_timesteps if min_timestep < max_timestep else num_timesteps - 1
    if not 0 <= max_timestep <= highest:
        raise UserError(
            f"--max_timestep is {max_timestep}; timesteps are drawn below it, so it must lie in 1..{num_timesteps}"
        )

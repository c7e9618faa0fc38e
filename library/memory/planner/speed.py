"""The time of a step from its work and a GPU's speeds. Needs no torch."""

from dataclasses import dataclass

from library.memory.planner.gpus import Gpu

# Share of time that offloading all blocks costs. 5 % are published for 47 of 48 blocks on an H100.
COST_OF_OFFLOADING = 0.05


@dataclass(frozen=True)
class Work:
    """Operations, memory traffic and kernel launches of a pass on the GPU."""

    flops: float = 0
    moved: float = 0  # bytes of the GPU's own memory
    launches: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.moved + other.moved, self.launches + other.launches)

    def seconds(self, gpu: Gpu, slowdown: float) -> float:
        """Return the sum of arithmetic, memory traffic and kernel launches.

        Large models hide part of the last two, small ones do not.
        """
        # Of three published times the longer of the GPU's work and of launching is closer to one, 3 % instead of 7 %
        # too long (RTX 3090), and farther from two: half instead of 26 % too short for a U-Net (RTX 3090 Ti), and 50 %
        # instead of 47 % for a transformer (RTX A6000, limited to 300 W).
        return slowdown * self.flops / gpu.flops + self.moved / gpu.bandwidth + self.launches * gpu.launch


NO_WORK = Work()


@dataclass(frozen=True)
class StepSpeed:
    """The work of a step."""

    forward: Work
    backward: Work
    slowdown: float = 1.0  # of arithmetic, by the weight format
    num_batches: float = 0.0  # of the passes without gradients before the step's own
    num_passes: float = 0.0
    overlaps: bool = True  # a block is copied while another one computes

    def seconds(self, gpu: Gpu, weights_s: float = 0.0, inputs_s: float = 0.0, offloaded: float = 0.0) -> float:
        """Return the seconds of a step: in each pass the longer of computing and copying, which run in parallel.

        Offloaded weights are copied to the GPU in both passes, in `weights_s`. Block inputs are copied to main memory
        in the first and back in the second pass, in `inputs_s`. They share the bus. Unless a slot is free for it
        (`overlaps`), a block is copied after the one before has computed. `offloaded` is the share of blocks.
        """

        def together(compute: float, stream: float, other: float = 0.0) -> float:
            return max(compute, stream + other) if self.overlaps else max(compute, other) + stream

        forward_s, backward_s = (work.seconds(gpu, self.slowdown) for work in (self.forward, self.backward))
        total = sum(together(seconds, weights_s, inputs_s) for seconds in (forward_s, backward_s))
        if self.num_passes:
            total += together(self.num_batches * forward_s, self.num_passes * weights_s)
        return total * (1 + COST_OF_OFFLOADING * offloaded)

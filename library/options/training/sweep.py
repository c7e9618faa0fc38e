"""A run for every combination of values."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import whole


@dataclass(frozen=True)
class SweepOptions(Options, affects_training=False):
    """A run for every combination of values."""

    sweep: list[str] | None = option(
        None,
        nargs="+",
        metavar="OPTION=A,B",
        excludes={
            "log_events=-": "the events of all runs would be mixed; name a file, each gets its own",
            "resume": "it names the state of one run; give the same command again, which continues every run that "
            "was cut off",
            "initial_step": "each run starts where it was cut off",
            "initial_epoch": "each run starts where it was cut off",
        },
    )
    """Train an adapter for every combination of these values, one run after the other, such as learning_rate=1e-4,2e-4
    network_dim=8,16. Each has its own files, <output_name>-lr1e-4-dim8. Names that are no option are keys of
    --network_args; optimizer_args.weight_decay=0,0.01 is a key of --optimizer_args."""
    sweep_stop_after: int | None = option(
        None, kind=whole(1), needs="sweep", excludes={"sweep_only": "a run alone has none to be compared with"}
    )
    """Train --sweep in rounds that end at the first validation from this step on, from twice as many, and so on. Runs
    that are significantly worse than the best one end with their round. Unset trains all to the end."""
    sweep_list: str | None = option(None, nargs="?", const="text", choices=(None, "text", "json"), needs="sweep")
    """List the runs of --sweep and end; json adds the command of each."""
    sweep_only: int | None = option(None, kind=whole(1), needs="sweep")
    """Train this run of --sweep alone, by its number in --sweep_list, so that other machines train the others."""
    launcher: str | None = option(None, needs="sweep")
    """Words before the script of each run of --sweep, such as "accelerate launch --num_processes 4"."""

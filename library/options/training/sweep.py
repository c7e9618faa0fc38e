"""Several adapters in one run."""

from dataclasses import dataclass

from library.options.base import Options, option

ONE_ADAPTER = "blocks are compiled for one adapter, and those that run change between training and validation"


@dataclass(frozen=True)
class SweepOptions(Options, own=True):
    """Several adapters in one run."""

    sweep: list[str] | None = option(
        None,
        nargs="+",
        metavar="OPTION=A,B",
        unsupported="a run trains one adapter; the next change starts a run for each combination",
        excludes={
            "compile": ONE_ADAPTER,
            "torch_compile": ONE_ADAPTER,
            "log_events=-": "the events of all adapters would be mixed; name a file, each gets its own",
            "resume_from_huggingface": "it fetches the state of one adapter; fetch all, and name one with --resume",
        },
        help="Train an adapter for every combination of these values over one loaded base model, such as "
        "learning_rate=1e-4,2e-4 network_dim=8,16. Each has its own files, <output_name>-lr1e-4-dim8. Names that "
        "are no option are keys of --network_args; optimizer_args.weight_decay=0,0.01 is a key of --optimizer_args.",
    )
    sweep_stop_after: int | None = option(
        None,
        at_least=1,
        needs="sweep",
        help="End adapters of --sweep early that are significantly worse than the best one, at every validation "
        "from this step on. Unset trains all of them to the end.",
    )

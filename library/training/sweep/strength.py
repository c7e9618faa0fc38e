"""Options that follow a rank that a sweep varies: alpha, so that adapters differ in rank and not in strength, and the
rank of convolutions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from library.base.errors import error_in
from library.options.network_args import is_switched_on, parse_network_args
from library.options.training.network import NetworkOptions

NETWORK_DIM = "network_dim"
CONV_DIM = "network_args.conv_dim"
ALPHA_NAMES: Mapping[str, str] = {NETWORK_DIM: "network_alpha", CONV_DIM: "network_args.conv_alpha"}
DEFAULT_CONV_ALPHA = "1"
# In these modules network_dim counts or sizes blocks. networks.oft uses alpha to limit angles, the others ignore it.
ROTATIONS = ("networks.oft", "networks.boft")  # prefixes of module names


@dataclass(frozen=True)
class Strength:
    """The ratio alpha / rank of the options, for a rank that varies in the sweep without its alpha."""

    rank_name: str  # a key of ALPHA_NAMES
    alpha: float
    rank: int

    def alpha_at(self, rank: str) -> float:
        """Return an adapter's alpha; the given one if the network module chooses the rank."""
        return self.alpha * int(rank) / self.rank if rank.isdecimal() else self.alpha

    def as_option(self, network_args: Sequence[str] | None, rank: str) -> dict[str, object]:
        """Return the option that sets the alpha of an adapter with these arguments and this rank."""
        alpha = self.alpha_at(rank)
        if self.rank_name == NETWORK_DIM:
            return {"network_alpha": alpha}
        other_arguments = [item for item in network_args or () if item.partition("=")[0] != "conv_alpha"]
        return {"network_args": [*other_arguments, f"conv_alpha={alpha:.9g}"]} if alpha != self.alpha else {}


def find_kept_strengths(network: NetworkOptions, words: Mapping[str, Sequence[str]]) -> list[Strength]:
    """Return the ratios to keep while `words` of the sweep vary ranks.

    A given alpha belongs to the rank given next to the sweep, else to the first rank of the sweep.
    """
    arguments = parse_network_args(network.network_args)
    ranks = given_ranks(network)
    alphas = {NETWORK_DIM: str(network.network_alpha), CONV_DIM: arguments.get("conv_alpha", DEFAULT_CONV_ALPHA)}
    strengths = []
    for name, alpha_name in ALPHA_NAMES.items():
        varies = name in words or (name == CONV_DIM and NETWORK_DIM in words)
        if varies and alpha_name not in words:
            known = positive_numbers(ranks[name], *words.get(name, ()))
            try:
                strengths += [Strength(name, float(alphas[name]), rank) for rank in known[:1]]
            except ValueError as error:
                raise error_in("--network_args conv_alpha")(
                    f"--network_args conv_alpha={alphas[name]} is not a number", "correct it"
                ) from error
    return strengths


def given_ranks(network: NetworkOptions) -> dict[str, str]:
    """Return the ranks of the options by name, "" for one that is not given."""
    conv_dim = parse_network_args(network.network_args).get("conv_dim", "")
    return {NETWORK_DIM: str(network.network_dim or ""), CONV_DIM: conv_dim}


def positive_numbers(*texts: str) -> list[int]:
    return [int(text) for text in texts if text.isdecimal() and int(text)]


def varied_ranks(
    network: NetworkOptions, words: Mapping[str, Sequence[str]], chosen: Mapping[str, str]
) -> dict[str, str]:
    """Return the ranks of one adapter of a sweep that differ from the options: those `chosen`, and a given conv_dim,
    which follows a swept network_dim unless `words` of the sweep name it too."""
    ranks = {name: chosen[name] for name in ALPHA_NAMES if name in chosen}
    given = given_ranks(network)
    conv_dims = positive_numbers(given[CONV_DIM])
    if NETWORK_DIM in words and CONV_DIM not in words and conv_dims and positive_numbers(chosen[NETWORK_DIM]):
        first_rank = positive_numbers(given[NETWORK_DIM], *words[NETWORK_DIM])[0]
        ranks[CONV_DIM] = str(max(1, round(conv_dims[0] * int(chosen[NETWORK_DIM]) / first_rank)))
    return ranks


def is_alpha_strength(module: str | None, network_args: Sequence[str] | None) -> bool:
    """Return True if the strength is alpha / rank; with rslora one alpha suits all ranks."""
    return not (module or "").startswith(ROTATIONS) and not is_switched_on(network_args, "rslora")


def describe_strengths(
    adapters: Sequence[tuple[NetworkOptions, Mapping[str, str]]],
    strengths: Sequence[Strength],
    words: Mapping[str, Sequence[str]],
) -> Iterator[str]:
    """Yield a line for each rank that varies with `words` of the sweep; `adapters` holds each adapter's options and its
    `varied_ranks`."""
    affected = [ranks for network, ranks in adapters if is_alpha_strength(network.network_module, network.network_args)]
    for strength in strengths if affected else ():
        name, alpha_name = (full.rpartition(".")[2] for full in (strength.rank_name, ALPHA_NAMES[strength.rank_name]))
        varied = dict.fromkeys(ranks[strength.rank_name] for ranks in affected if strength.rank_name in ranks)
        pairs = ", ".join(f"alpha {strength.alpha_at(rank):g} at rank {rank}" for rank in varied)
        if strength.alpha:  # 0 means the rank
            yield (
                f"--sweep {name} keeps alpha / rank at {strength.alpha / strength.rank:g}: {pairs}; add "
                f"{alpha_name}=VALUE to --sweep to set alpha yourself"
            )
    followed = {ranks[NETWORK_DIM]: ranks[CONV_DIM] for _, ranks in adapters if ranks.keys() >= {NETWORK_DIM, CONV_DIM}}
    if followed and CONV_DIM not in words:
        pairs = ", ".join(f"{conv_dim} at rank {rank}" for rank, conv_dim in followed.items())
        yield f"--sweep network_dim takes conv_dim along: {pairs}; add conv_dim=VALUE to --sweep to set it yourself"

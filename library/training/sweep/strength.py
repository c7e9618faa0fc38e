"""Alpha for adapters whose rank a sweep varies: alpha / rank is kept, so that they differ in rank and not in
strength."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from library.errors import UserError
from library.options.training.network import NetworkOptions
from networks.core.protocol import is_switched_on, parse_network_args

NETWORK_DIM = "network_dim"
CONV_DIM = "network_args.conv_dim"
ALPHA_NAMES: Mapping[str, str] = {NETWORK_DIM: "network_alpha", CONV_DIM: "network_args.conv_alpha"}
DEFAULT_CONV_ALPHA = "1"
# In these modules network_dim counts or sizes blocks. networks.oft uses alpha to limit angles, the others ignore it.
ROTATIONS = ("networks.oft", "networks.boft")  # prefixes of module names


@dataclass(frozen=True)
class Strength:
    """The ratio alpha / rank of the options, for a rank that the sweep varies without its alpha."""

    rank_name: str  # a key of ALPHA_NAMES
    alpha: float
    rank: int

    def alpha_at(self, rank: str) -> float:
        """Return an adapter's alpha; the given one if the network module chooses the rank."""
        return self.alpha * int(rank) / self.rank if rank.isdecimal() else self.alpha

    def as_option(self, network: NetworkOptions, rank: str) -> dict[str, object]:
        """Return the option that sets the alpha of an adapter with these options and this rank."""
        alpha = self.alpha_at(rank)
        if self.rank_name == NETWORK_DIM:
            return {"network_alpha": alpha}
        other_arguments = [item for item in network.network_args or () if item.partition("=")[0] != "conv_alpha"]
        return {"network_args": [*other_arguments, f"conv_alpha={alpha:.9g}"]} if alpha != self.alpha else {}


def find_kept_strengths(network: NetworkOptions, words: Mapping[str, Sequence[str]]) -> list[Strength]:
    """Return the ratios to keep while `words` of the sweep vary ranks.

    A given alpha belongs to the rank given next to the sweep, else to the first rank of the sweep.
    """
    arguments = parse_network_args(network.network_args)
    ranks = {NETWORK_DIM: str(network.network_dim or ""), CONV_DIM: arguments.get("conv_dim", "")}
    alphas = {NETWORK_DIM: str(network.network_alpha), CONV_DIM: arguments.get("conv_alpha", DEFAULT_CONV_ALPHA)}
    strengths = []
    for name, alpha_name in ALPHA_NAMES.items():
        if name in words and alpha_name not in words:
            known = [int(text) for text in (ranks[name], *words[name]) if text.isdecimal() and int(text)]
            try:
                strengths += [Strength(name, float(alphas[name]), rank) for rank in known[:1]]
            except ValueError as error:
                raise UserError(f"--network_args conv_alpha={alphas[name]} is not a number; correct it") from error
    return strengths


def is_alpha_strength(network: NetworkOptions) -> bool:
    """Return True if the strength is alpha / rank; with rslora one alpha suits all ranks."""
    is_rotation = (network.network_module or "").startswith(ROTATIONS)
    return not is_rotation and not is_switched_on(network.network_args, "rslora")


def describe_strengths(
    adapters: Sequence[tuple[NetworkOptions, Mapping[str, str]]], strengths: Sequence[Strength]
) -> Iterator[str]:
    """Yield a line for each swept rank; `adapters` holds each adapter's options and swept values."""
    affected = [(network, chosen) for network, chosen in adapters if is_alpha_strength(network)]
    for strength in strengths if affected else ():
        name, alpha_name = (full.rpartition(".")[2] for full in (strength.rank_name, ALPHA_NAMES[strength.rank_name]))
        ranks = dict.fromkeys(chosen[strength.rank_name] for _, chosen in affected)
        pairs = ", ".join(f"alpha {strength.alpha_at(rank):g} at rank {rank}" for rank in ranks)
        if strength.alpha:  # 0 means the rank
            yield (
                f"--sweep {name} keeps alpha / rank at {strength.alpha / strength.rank:g}: {pairs}; add "
                f"{alpha_name}=VALUE to --sweep to set alpha yourself"
            )
    network, chosen = adapters[0]
    conv_dim = parse_network_args(network.network_args).get("conv_dim")
    if NETWORK_DIM in chosen and CONV_DIM not in chosen and conv_dim:
        yield (
            f"--sweep network_dim leaves conv_dim at {conv_dim} for every adapter; add conv_dim to --sweep to change it"
        )

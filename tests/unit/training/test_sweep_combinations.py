"""--sweep: names, options of each run, and refused values."""

import logging

import pytest

from library.base.errors import UserError
from library.options.train import TrainOptions
from library.training.sweep.combinations import describe_sweep, expand_combinations, find_unranked, parse_word


def options_of(*sweep: str, **values: object) -> TrainOptions:
    values_given = {"output_dir": "out", "output_name": "cat", "network_module": "networks.lora", "sweep": list(sweep)}
    return TrainOptions().with_values({**values_given, **values})


def test_every_combination_has_a_name_and_its_options() -> None:
    words = ("learning_rate=5e-5,1e-4", "network_dim=8,16", "optimizer_args.betas=0.9,0.99|0.8,0.9", "conv_dim=none,4")
    combinations = expand_combinations(options_of(*words, optimizer_args=["eps=1e-6"], network_args=["verbose=True"]))
    assert len(combinations) == 16
    assert combinations[0].label == "lr5e-5-dim8-betas0.9_0.99-convdimnone"
    last = combinations[-1].options
    assert last.saving.output_name == "cat-lr1e-4-dim16-betas0.8_0.9-convdim4"
    assert (last.optimizer.learning_rate, last.network.network_dim) == (1e-4, 16)
    assert last.optimizer.optimizer_args == ["eps=1e-6", "betas=0.8,0.9"]
    assert last.network.network_args == ["verbose=True", "conv_dim=4"] and last.sweep.sweep is None
    assert combinations[0].options.network.network_args == ["verbose=True"]


def test_paths_and_dotted_names_are_shortened_in_file_names() -> None:
    words = (
        "network_module=networks.lora,networks.loha",
        "network_weights=a/one.safetensors,none",
        "lr_warmup_steps=9%,3",
    )
    assert [combination.label for combination in expand_combinations(options_of(*words))][:2] == [
        "lora-from_one-warmup9pct",
        "lora-from_one-warmup3",
    ]


def test_every_run_has_events_and_a_log_of_its_own() -> None:
    runs = expand_combinations(options_of("seed=3,4", seed=1, log_events="e/x.jsonl", console_log_file="x.log"))
    assert [run.options.run.seed for run in runs] == [3, 4]
    assert [run.options.reports.log_events for run in runs] == ["e/x-seed3.jsonl", "e/x-seed4.jsonl"]
    assert [run.options.console.console_log_file for run in runs] == ["x-seed3.log", "x-seed4.log"]


def test_switches_lists_and_values_with_spaces_are_swept() -> None:
    words = ("cache_latents=true,False", "base_weights='a b.safetensors' c.safetensors|d", "text_encoder_lr=1 2,0")
    first, *_, last = (run.options for run in expand_combinations(options_of(*words)))
    assert (first.caching.cache_latents, last.caching.cache_latents) == (True, False)
    assert first.network.base_weights == ["a b.safetensors", "c.safetensors"] and last.network.base_weights == ["d"]
    assert first.network.text_encoder_lr == [1, 2] and last.network.text_encoder_lr == [0]
    with pytest.raises(UserError, match="--sweep cache_latents: 'maybe' is no value of --cache_latents: it is true or"):
        expand_combinations(options_of("cache_latents=maybe,true"))


def test_words_that_change_what_a_loss_means_are_found() -> None:
    words = ["learning_rate=1,2", "seed=1,2", "conv_dim=1,2", "optimizer_args.eps=1,2", "blocks_to_swap=1,2"]
    assert find_unranked(options_of(*words)) == []
    changing = ["resolution", "min_snr_gamma", "noise_offset", "prior_loss_weight", "train_data_dir", "base_weights",
                "pretrained_model_name_or_path", "validation_split", "loss_type", "vae"]  # fmt: skip
    assert find_unranked(options_of(*(f"{name}=1,2" for name in changing))) == changing


@pytest.mark.parametrize("name", ["output_dir", "resume", "sweep_only", "launcher", "dry_run", "logging_dir"])
def test_what_a_run_writes_and_how_it_starts_cannot_be_swept(name: str) -> None:
    with pytest.raises(UserError, match=f"--sweep {name}: it says what a run writes, where it starts or how it is"):
        expand_combinations(options_of(f"{name}=1,2"))


def test_a_million_combinations_are_counted_and_refused() -> None:
    words = [f"{name}={','.join(str(value + 1) for value in range(100))}" for name in ("network_dim", "network_alpha")]
    words.append("seed=" + ",".join(map(str, range(100))))
    with pytest.raises(UserError, match="--sweep names 1000000 runs; at most 1000 can be trained by one command"):
        expand_combinations(options_of(*words))


def test_sweeping_a_rate_that_other_rates_replace_is_refused() -> None:
    with pytest.raises(UserError, match="learning_rate has no effect with --unet_lr"):
        expand_combinations(options_of("learning_rate=1e-4,1e-3", unet_lr=1e-4, network_train_unet_only=True))


def alphas(*words: str, **values: object) -> list[tuple[float, list[str] | None]]:
    """Return --network_alpha and --network_args of each adapter of a sweep."""
    combinations = expand_combinations(options_of(*words, **values))
    return [
        (combination.options.network.network_alpha, combination.options.network.network_args)
        for combination in combinations
    ]


def test_swept_ranks_keep_the_strength_given_by_the_options() -> None:
    """alpha / rank is that of --network_alpha and --network_dim; the first rank replaces a missing one."""
    assert alphas("network_dim=4,16", network_dim=8, network_alpha=4) == [(2, None), (8, None)]
    assert alphas("network_dim=4,16", network_alpha=4) == [(4, None), (16, None)]
    assert alphas("network_dim=4,16", network_dim=8, network_alpha=0) == [(0, None), (0, None)]  # 0 is the rank


def test_a_swept_alpha_is_unchanged() -> None:
    results = alphas("network_dim=4,16", "network_alpha=1,2", network_dim=8, network_alpha=4)
    assert [alpha for alpha, _ in results] == [1, 2, 1, 2]
    assert alphas("network_dim=4,16", "network_alpha=1") == [(1, None), (1, None)]


def test_convolutions_keep_their_strength_if_their_rank_is_swept() -> None:
    args = ["conv_dim=8", "conv_alpha=2"]
    assert alphas("conv_dim=4,16", network_alpha=4, network_args=args) == [
        (4, ["conv_dim=4", "conv_alpha=1"]),
        (4, ["conv_dim=16", "conv_alpha=4"]),
    ]
    assert alphas("conv_dim=4,16") == [(1, ["conv_dim=4"]), (1, ["conv_dim=16", "conv_alpha=4"])]
    assert alphas("conv_dim=4,16", "conv_alpha=3", network_args=args)[1] == (1, ["conv_dim=16", "conv_alpha=3"])


def test_the_rank_of_convolutions_follows_a_swept_rank_with_its_strength() -> None:
    args = ["conv_dim=8", "conv_alpha=2"]
    with_dim: dict[str, object] = {"network_dim": 16, "network_alpha": 8, "network_args": args}
    assert alphas("network_dim=4,16", **with_dim) == [(2, ["conv_dim=2", "conv_alpha=0.5"]), (8, args[1:] + args[:1])]
    assert alphas("network_dim=4,16", network_alpha=4, network_args=args[:1]) == [
        (4, ["conv_dim=8"]),
        (16, ["conv_dim=32", "conv_alpha=4"]),
    ]
    assert alphas("network_dim=4,16", "conv_dim=3", **with_dim)[0] == (2, ["conv_dim=3", "conv_alpha=0.75"])
    assert alphas("network_dim=4,16", "conv_alpha=3", **with_dim)[0] == (2, ["conv_alpha=3", "conv_dim=2"])
    unchanged = ["conv_dim=0"]
    assert alphas("network_dim=4,16", network_args=unchanged) == [(1, unchanged), (4, unchanged)]
    assert alphas("network_dim=1,16", network_dim=16, network_args=["conv_dim=4", "rslora=True"])[0][1] == [
        "rslora=True",
        "conv_dim=1",
    ]


@pytest.mark.parametrize("values", [{"network_module": "networks.oft"}, {"network_args": ["rslora=True"]}])
def test_alpha_is_unchanged_if_alpha_over_rank_is_not_the_strength(values: dict[str, object]) -> None:
    assert [alpha for alpha, _ in alphas("network_dim=4,16", network_dim=8, network_alpha=4, **values)] == [4, 4]


def test_the_alpha_of_each_rank_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        options = options_of("network_dim=4,16", "seed=1,2", network_alpha=2, network_args=["conv_dim=8"])
    swept = dict(parse_word(item, options) for item in options.sweep.sweep or ())
    described = describe_sweep(options.network, swept, expand_combinations(options))
    lines = [line for line in described if not line.startswith("--sweep:")]
    assert lines == [
        "--sweep network_dim keeps alpha / rank at 0.5: alpha 2 at rank 4, alpha 8 at rank 16; add "
        "network_alpha=VALUE to --sweep to set alpha yourself",
        "--sweep conv_dim keeps alpha / rank at 0.125: alpha 1 at rank 8, alpha 4 at rank 32; add conv_alpha=VALUE to "
        "--sweep to set alpha yourself",
        "--sweep network_dim takes conv_dim along: 8 at rank 4, 32 at rank 16; add conv_dim=VALUE to --sweep to set it "
        "yourself",
    ]


def test_an_option_that_the_sweep_replaces_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    words = ("network_dim=4,8", "network_alpha=2,3", "conv_dim=2,3", "conv_alpha=1", "max_grad_norm=1,2")
    with caplog.at_level(logging.WARNING):
        expand_combinations(options_of(*words, network_dim=16, network_args=["conv_dim=1"], max_grad_norm=0.5))
        expand_combinations(options_of("network_dim=4,8", "conv_dim=2,3", network_dim=16, network_args=["conv_dim=1"]))
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "--network_dim has no effect",
        "--network_args conv_dim has no effect",
        "--max_grad_norm has no effect",
    ]

"""Command-line options and config files."""

import logging
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toml
from hypothesis import given
from hypothesis import strategies as st

from library.base.errors import UserError
from library.base.version import NAME, VERSION
from library.options.config_file import read_toml
from library.options.train import TrainOptions
from library.training.command_line.cli import build_parser, normalize, parse
from library.training.config_file import read_config, write_config
from tests.tiers import first_is_fast

ROOT = Path(__file__).parents[3]
PARSER = build_parser(TrainOptions)
ACTIONS = {action.dest: action for action in PARSER._actions}
DEFAULTS = TrainOptions.defaults()


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def parse_file(tmp_path: Path, text: str, *words: str) -> Namespace:
    path = tmp_path / "train.toml"
    path.write_text(text, encoding="utf-8")
    return parse(PARSER, [*words, "--config_file", str(path)])


def refusal_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "train.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as refused:
        read_config(path, ACTIONS)
    return str(refused.value)


def test_sections_are_flattened_and_top_level_keys_are_read(tmp_path: Path) -> None:
    args = parse_file(tmp_path, 'output_name = "a"\n[x]\nnetwork_dim = 9\n[saving]\nseed = 3\n')
    assert (args.output_name, args.network_dim, args.seed) == ("a", 9, 3)


def test_the_extension_of_the_config_file_may_be_omitted(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("seed = 5", encoding="utf-8")
    assert parse(PARSER, ["--config_file", str(tmp_path / "a")]).seed == 5


@pytest.mark.parametrize("is_first", [True, False])
def test_the_command_line_overrides_the_file_in_any_order_even_with_a_default(tmp_path: Path, is_first: bool) -> None:
    path = tmp_path / "train.toml"
    path.write_text("network_alpha = 16\nmax_train_steps = 9\nnetwork_args = ['a=1']", encoding="utf-8")
    typed = ["--network_alpha", "1", "--network_args", "--max_train_steps=1600"]
    named = ["--config_file", str(path)]
    args = parse(PARSER, [*typed, *named] if is_first else [*named, *typed])
    assert (args.network_alpha, args.network_args, args.max_train_steps) == (1.0, None, 1600)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("text_encoder_lr = 1e-5", [1e-5]),
        ("text_encoder_lr = [1e-5, 2e-5]", [1e-5, 2e-5]),
        ("text_encoder_lr = []", None),
        ("network_args = []", None),
        ("network_args = 'conv_dim=4'", ["conv_dim=4"]),
        ("optimizer_args = ['a=1', '']", ["a=1"]),
        ("gradient_checkpointing = 1", True),
        ("gradient_checkpointing = 0", False),
        ("gradient_checkpointing = 'False'", False),
        ("gradient_checkpointing = ''", False),
        ("dim_from_weights = 'folder/a.safetensors'", True),
        ("max_token_length = 75", None),
        ("max_token_length = 150", 150),
        ("max_token_length = 255", 225),
        ("dynamo_backend = 'no'", "no"),
        ("resume = false", None),
        ("resume = ''", None),
        ("save_last_n_epochs_state = false", None),
        ("vae = ''", None),
        ("dataset_config = ''", None),
        ("dataset_config = 'a/b.toml'", Path("a/b.toml")),
        ("caption_separator = ''", ","),
        ("secondary_separator = ''", None),
        ("keep_tokens_separator = ''", ""),
        ("max_grad_norm = 0", 0.0),
        ("learning_rate = 1", 1.0),
        ("network_dim = 16.0", 16),
        ("max_train_steps = 250.0", 250),
        ("network_alpha = 16", 16),
        ("network_alpha = 16.0", 16.0),
        ("lr_warmup_steps = 100.0", 100),
        ("lr_warmup_steps = 1.0", 1),
        ("lr_warmup_steps = 0.25", 0.25),
        ("lr_warmup_steps = 0.0", 0),
        ("lr_warmup_steps = '10%'", 0.1),
        ("save_every_n_epochs = 0", None),
        ("clip_skip = 0", None),
        ("output_name = 2024", "2024"),
        ("resolution = 512", "512"),
        ("resolution = [512, 768]", "512,768"),
        ("resolution = '512,768'", "512,768"),
        ("face_crop_aug_range = [2.0, 4.0]", "2.0,4.0"),
        ("mixed_precision = 'fp8'", "fp8"),
    ],
)
def test_unambiguous_values_of_a_file_are_converted(tmp_path: Path, line: str, value: Any) -> None:
    taken = getattr(parse_file(tmp_path, line), line.split()[0])
    assert (taken, type(taken)) == (value, type(value))


@pytest.mark.parametrize(
    "line",
    [
        "network_dim = '16'",
        "network_dim = 16.5",
        "network_dim = true",
        "network_dim = [16]",
        "learning_rate = '1e-4'",
        "learning_rate = true",
        "text_encoder_lr = ['a']",
        "lr_warmup_steps = 100.5",
        "lr_warmup_steps = -1",
        "gradient_checkpointing = 'yes'",
        "gradient_checkpointing = 2",
        "output_dir = true",
        "output_dir = ['a']",
        "seed = inf",
        "max_token_length = 20",
        "output_name = 2024-01-31",
    ],
)
def test_a_value_that_an_option_does_not_accept_is_refused_naming_the_option(tmp_path: Path, line: str) -> None:
    message = refusal_of(tmp_path, line)
    assert str(tmp_path / "train.toml") in message and line.split()[0] in message


def test_an_unknown_key_warns_once_with_the_nearest_name_and_does_not_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = parse_file(tmp_path, "netwrk_dim = 4\nzzz = 1\nseed = 1\n[other]\nepoch = 3")
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "netwrk_dim (nearest: network_dim)" in warnings[0] and "zzz" in warnings[0] and "epoch" in warnings[0]
    assert args.seed == 1 and not hasattr(args, "zzz")


def test_a_duplicate_key_warns_and_the_later_value_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert parse_file(tmp_path, "seed = 1\n[a]\nseed = 2").seed == 2
    assert "seed" in caplog.text and "later" in caplog.text


def test_a_nested_table_is_an_error_that_names_it(tmp_path: Path) -> None:
    assert "[a.b]" in refusal_of(tmp_path, "[a.b]\nseed = 1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"seed = 1\nvae = a\n", "line 2, column 7"),
        (b"\xff\xfe", "UTF-8"),
        (b"[a]\nnetwork_dim = '4'", "network_dim"),
    ],
)
def test_a_bad_config_file_exits_with_status_1_and_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None, message: str
) -> None:
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        parse(PARSER, ["--config_file", str(path)])
    assert ended.value.code == 1
    assert message in caplog.text and "bad.toml" in caplog.text


def test_a_file_with_a_byte_order_mark_and_windows_line_endings_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_bytes("\ufeffseed = 4\r\noutput_name = '学習'\r\n".encode())
    args = parse(PARSER, ["--config_file", str(path)])
    assert (args.seed, args.output_name) == (4, "学習")


def test_output_config_writes_options_that_differ_from_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "made.toml"
    words = ["--seed", "4", "--network_alpha", "1", "--network_args", "a=b", "--flip_aug", "--wandb_api_key", "secret"]
    words += ["--dataset_config", "d.toml", "--vae", "C:\\x1\\new", "--learning_rate", "1e-4"]
    with pytest.raises(SystemExit) as ended:
        parse(PARSER, [*words, "--output_config", "--config_file", str(path)])
    assert ended.value.code == 0
    assert read_toml(path, "") == {
        "seed": 4,
        "network_args": ["a=b"],
        "flip_aug": True,
        "dataset_config": "d.toml",
        "vae": "C:\\x1\\new",
        "learning_rate": 1e-4,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["made.toml"]


def test_output_config_read_back_gives_the_same_options(tmp_path: Path) -> None:
    words = ["--network_alpha", "8", "--text_encoder_lr", "1e-5", "--lr_warmup_steps", "0.1", "--dataset_config", "d"]
    path = str(tmp_path / "made")
    with pytest.raises(SystemExit):
        parse(PARSER, [*words, "--output_config", "--config_file", path])
    read = vars(parse(PARSER, ["--config_file", path]))
    assert read == {**vars(parse(PARSER, words)), "config_file": path}


def test_output_config_keeps_an_existing_file_and_exits_with_status_1(tmp_path: Path) -> None:
    path = tmp_path / "made.toml"
    path.write_text("seed = 1", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        parse(PARSER, ["--seed", "2", "--output_config", "--config_file", str(path)])
    assert ended.value.code == 1
    assert path.read_text(encoding="utf-8") == "seed = 1"


def test_output_config_without_a_file_name_is_an_error() -> None:
    with pytest.raises(SystemExit) as ended:
        parse(PARSER, ["--output_config"])
    assert ended.value.code == 2


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30))
def test_any_text_survives_writing_and_reading(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("config") / "a.toml"
    write_config(path, {"output_name": text, "network_args": [text]})
    assert read_toml(path, "") == {"output_name": text, "network_args": [text]}


def test_an_unknown_option_names_the_nearest_and_exits_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(PARSER, ["--netwrk_dim=4", "--zzz", "1"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "unrecognized arguments: --netwrk_dim=4 (nearest: --network_dim) --zzz 1" in message


def test_values_lost_by_repeating_an_option_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Some programs write a list as one option per value, and argparse keeps only the last."""
    words = ["--network_args", "conv_dim=4", "--network_args=conv_alpha=1", "--seed", "3", "--seed", "3", "--lowram"]
    secrets = ["--huggingface_token", "hf_a", "--huggingface_token", "hf_b"]
    args = parse(PARSER, [*words, "--network_arg", "rank_dropout=0.1", "unit=2", "--lowram", *secrets])
    assert (args.network_args, args.seed) == (["rank_dropout=0.1", "unit=2"], 3)
    version, record = caplog.records
    assert version.getMessage() == f"{NAME} {VERSION}"
    assert record.message == (
        "--network_args is given 3 times and the last one counts: conv_dim=4 conv_alpha=1 has no effect; write all "
        "values behind one --network_args"
    )


def test_75_tokens_are_the_default_caption_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(PARSER, ["--max_token_length", "75"]).max_token_length is None
    assert parse(PARSER, ["--max_token_length", "150"]).max_token_length == 150
    with pytest.raises(SystemExit):
        parse(PARSER, ["--max_token_length", "76"])
    # Python 3.14 quotes the value.
    assert "invalid choice: 76" in capsys.readouterr().err.replace("'", "")


def test_an_empty_value_on_the_command_line_unsets_the_option() -> None:
    args = parse(PARSER, ["--vae=", "--resume", "", "--network_args", "--caption_separator="])
    assert (args.vae, args.resume, args.network_args, args.caption_separator) == (None, None, None, "")


def test_caching_to_disk_implies_caching() -> None:
    args = parse(PARSER, ["--cache_latents_to_disk"])
    assert args.cache_latents is True


def test_the_misspelt_caption_extension_option_wins() -> None:
    args = parse(PARSER, ["--caption_extension", ".a", "--caption_extention", ".b"])
    assert args.caption_extension == ".b"


def test_normalizing_twice_changes_nothing(tmp_path: Path) -> None:
    args = parse_file(tmp_path, "cache_latents_to_disk = true\nclip_skip = 0\ncaption_extention = '.txt'")
    assert normalize(args) == args
    assert TrainOptions.from_args(args) == TrainOptions.from_args(normalize(args))


def test_a_file_with_all_defaults_of_a_front_end_changes_nothing(tmp_path: Path) -> None:
    """TOML cannot express None; front ends write an empty string or false."""
    for nothing in ("", False):
        values = {k: nothing if v is None else v for k, v in DEFAULTS.items()}
        args = parse_file(tmp_path, toml.dumps(values))
        assert TrainOptions.from_args(Namespace(**{**vars(args), "config_file": None})) == TrainOptions()


@pytest.mark.parametrize("script", first_is_fast(sorted(path.stem for path in ROOT.glob("*train_*.py"))))
def test_parsing_loads_no_heavy_library(script: str) -> None:
    code = (
        f"import sys; from {script} import setup_parser; from library.training.command_line.cli import parse;"
        "parse(setup_parser(), ['--seed', '1']);"
        "assert not {'torch', 'transformers', 'diffusers', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("line", "words"),
    first_is_fast(
        [
            ('console_log_level = "LOUD"', ["--console_log_level", "LOUD", "WARNING"]),
            ('console_log_file = "/dev/null/log.txt"', ["--console_log_file", "/dev/null/log.txt"]),
        ]
    ),
)
def test_a_config_file_whose_log_cannot_be_opened_exits_with_status_1(
    tmp_path: Path, line: str, words: list[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(line)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_network.py"), "--config_file", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words)

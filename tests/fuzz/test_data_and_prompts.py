"""Any dataset file, network arguments or prompt file either works or gives an error message.

Each case must also end quickly: an excessive number must not keep the machine busy.
"""

import string
from pathlib import Path
from typing import Any

import pytest
import toml
from hypothesis import given
from hypothesis import strategies as st

from library.data.concepts.prompts_file import PAIR_KEYS, SLIDER_KEYS, read_prompt_pairs
from library.data.description.schema import ALL_KEYS
from library.options.network_args import parse_network_args
from library.options.output.prompts import read_prompts
from library.protocols import PromptDefaults
from library.training.config_file import basic_string
from library.training.evaluation.prompts import resolve
from networks import dylora, lora, lora_fa
from networks.core.registry.parsing import list_arguments
from tests.fuzz.budget import any_input, works_or_says_why
from tests.unit.data.builders import options_of, plan_of, write_folder
from tests.unit.networks.toy import toy_models

PROMPT_DEFAULTS = PromptDefaults(num_steps=30, width=512, height=512, scale=7.5, size_step=8, sampler="ddim")

texts = st.text(max_size=12)
numbers = st.one_of(
    st.integers(-(10**20), 10**20),
    st.sampled_from([0, 1, -1, 64, 512, 10**9]),
    st.floats(),
    st.sampled_from([0.5, 1e308]),
)
values = st.recursive(st.one_of(texts, numbers, st.booleans()), lambda inner: st.lists(inner, max_size=3), max_leaves=4)


def write_toml(tables: dict[str, Any]) -> str:
    """Return TOML; the library's own string writer breaks some strings."""
    encoder = toml.TomlEncoder()
    encoder.dump_funcs[str] = basic_string
    return str(toml.dumps(tables, encoder))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures"), 3)


names = st.one_of(st.sampled_from(sorted(ALL_KEYS)), st.text(string.ascii_lowercase + "_", min_size=1, max_size=12))


@any_input(15)
@given(
    general=st.dictionaries(names, values, max_size=3),
    dataset=st.dictionaries(names, values, max_size=3),
    subset=st.dictionaries(names, values, max_size=3),
    has_folder=st.booleans(),
)
def test_any_tables_of_a_dataset_file_work_or_give_an_error(
    images: Path, tmp_path: Path, general: Any, dataset: Any, subset: Any, has_folder: bool
) -> None:
    if has_folder:
        dataset, subset = {"resolution": 64, **dataset}, {**subset, "image_dir": str(images)}
    path = tmp_path / "dataset.toml"
    path.write_text(write_toml({"general": general, "datasets": [{**dataset, "subsets": [subset]}]}), encoding="utf-8")
    works_or_says_why(lambda: plan_of(options_of("--dataset_config", str(path))))


@any_input(15)
@given(data=st.data())
def test_any_value_of_a_dataset_key_works_or_gives_an_error(images: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A single odd value among valid ones gets further than many."""
    name = data.draw(st.sampled_from(sorted(ALL_KEYS)))
    value = data.draw(values)
    tables: dict[str, Any] = {"dataset": {"resolution": 64, "enable_bucket": data.draw(st.booleans())}, "subset": {}}
    level = next(level for level in ("subset", "dataset") if level in ALL_KEYS[name].levels)
    tables[level][name] = value
    subset = {"image_dir": str(images), **tables["subset"]}
    path = tmp_path / "dataset.toml"
    path.write_text(write_toml({"datasets": [{**tables["dataset"], "subsets": [subset]}]}), encoding="utf-8")
    works_or_says_why(lambda: plan_of(options_of("--dataset_config", str(path))))


@any_input(15)
@given(content=st.one_of(st.binary(max_size=60), texts.map(str.encode)), ending=st.sampled_from([".toml", ".json"]))
def test_any_bytes_as_a_dataset_file_work_or_give_an_error(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"dataset{ending}"
    path.write_bytes(content)
    works_or_says_why(lambda: plan_of(options_of("--dataset_config", str(path))))


arguments = st.one_of(
    texts,
    st.tuples(
        st.sampled_from(sorted(list_arguments())), st.one_of(texts, numbers.map(str), st.sampled_from(["True", "0,1"]))
    ).map("=".join),
)


@pytest.mark.parametrize("network_module", [lora, lora_fa, dylora], ids=lambda network_module: network_module.__name__)
@any_input(15)
@given(items=st.lists(arguments, max_size=3), rank=st.sampled_from([1, 4]))
def test_any_network_arguments_work_or_give_an_error(network_module: Any, items: list[str], rank: int) -> None:
    def create() -> None:
        text, unet = toy_models(1)
        network = network_module.create_network(1.0, rank, 1.0, None, text, unet, **parse_network_args(items))
        network.apply_to(text, unet)
        network.prepare_optimizer_params_with_multiple_te_lrs([1e-2], 1e-2, 1e-2)

    works_or_says_why(create)


options = st.sampled_from(["w", "h", "d", "s", "l", "g", "n", "ss", "cn", "ctr", "rcfg", "fs", "x", ""])
lines = st.one_of(
    texts,
    st.lists(st.tuples(options, st.one_of(texts, numbers.map(str))).map(lambda o: f" --{o[0]} {o[1]}")).map("".join),
)


@any_input(15)
@given(line=lines, ending=st.sampled_from([".txt", ".json", ".toml"]))
def test_any_lines_of_a_prompt_file_work_or_give_an_error(tmp_path: Path, line: str, ending: str) -> None:
    path = tmp_path / f"prompts{ending}"
    path.write_text(line, encoding="utf-8", errors="replace")
    works_or_says_why(lambda: [resolve(wish, PROMPT_DEFAULTS) for wish in read_prompts(path)])


fields = st.sampled_from(
    ["prompt", "width", "height", "seed", "sample_steps", "scale", "sample_sampler", "flow_shift", "x"]
)


@any_input(15)
@given(tables=st.lists(st.dictionaries(fields, values, max_size=4), max_size=2))
def test_any_tables_of_a_prompt_file_work_or_give_an_error(tmp_path: Path, tables: list[dict[str, Any]]) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text(write_toml({"prompt": {"width": 64, "subset": tables}}), encoding="utf-8")
    works_or_says_why(lambda: [resolve(wish, PROMPT_DEFAULTS) for wish in read_prompts(path)])


words = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)
keys_of_pairs = st.one_of(st.sampled_from(sorted({*PAIR_KEYS, *SLIDER_KEYS})), words)
odd = st.one_of(values, st.lists(st.lists(numbers, max_size=2), max_size=2))


@any_input(60)
@given(
    head=st.sampled_from(["prompts", "targets", "slider"]),
    start=st.sampled_from(["target", "target_class", "positive", "negative"]),
    shared=st.dictionaries(keys_of_pairs, odd, max_size=1),
    entry=st.dictionaries(keys_of_pairs, odd, max_size=2),
)
def test_any_tables_of_a_prompt_pairs_file_work_or_give_an_error(
    tmp_path: Path, head: str, start: str, shared: Any, entry: Any
) -> None:
    prompt_pair = {start: "a cat", **entry}
    tables = {head: prompt_pair} if head == "slider" else {**shared, head: [prompt_pair]}
    path = tmp_path / "prompts.toml"
    path.write_text(write_toml(tables), encoding="utf-8")
    works_or_says_why(lambda: read_prompt_pairs(path))

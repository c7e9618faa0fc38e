"""Dataset files that the documentation shows and the repository ships are accepted, and every key is explained."""

import re
from pathlib import Path

import pytest

from library.data.description.dataset_file import load_dataset_config
from library.data.description.schema import ALL_KEYS, RunDataConfig
from library.options.train import TrainOptions
from tests.contracts.test_docs_commands import PAGES, ROOT, blocks_of
from train_network import setup_parser

EXAMPLES = sorted((ROOT / "configs" / "examples").glob("*.toml"))
SHOWN = [(page.name, block) for page in PAGES for block in blocks_of(page, "toml") if "[[datasets]]" in block]


def load(path: Path) -> RunDataConfig:
    masked = ["--masked_loss"] if "conditioning_data_dir" in path.read_text(encoding="utf-8") else []
    args = setup_parser().parse_args(["--dataset_config", str(path), "--resolution", "64", *masked])
    return load_dataset_config(TrainOptions.from_args(args))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_dataset_file_is_accepted(path: Path) -> None:
    assert load(path).datasets


def test_the_page_starts_with_the_file_named_in_the_commands() -> None:
    page, example = ROOT / "docs" / "dataset_config.md", ROOT / "configs" / "examples" / "dataset.toml"
    assert blocks_of(page, "toml")[0] == example.read_text(encoding="utf-8")


def test_the_example_leaves_size_batch_and_shuffling_to_the_recipe() -> None:
    (dataset,) = load(ROOT / "configs" / "examples" / "dataset.toml").datasets
    assert (dataset.resolution, dataset.batch_size, dataset.enable_bucket) == ((64, 64), 1, False)
    assert not any(subset.captions.moves_tags or subset.flip_aug for subset in dataset.subsets)


@pytest.mark.parametrize(("page", "block"), SHOWN)
def test_dataset_file_of_the_documentation_is_accepted(page: str, block: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(block, encoding="utf-8")
    assert load(tmp_path / "dataset.toml").datasets


def test_every_key_of_a_dataset_file_is_explained_once() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    table = page.partition("## Keys of a dataset file\n")[2].partition("\n## ")[0]
    explained = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(explained) == sorted(ALL_KEYS)

"""Facts that were defined in several places stay in one: the removed names must not come back."""

import ast
import re

import pytest

from tests.architecture.sources import python_files, text_of

TEXTS = {path.as_posix(): text_of(path) for path in python_files("library", "networks", "tools", "benchmarks")}

GONE = (
    "split_key", "flat_name", "OTHER_LEAVES", "NormAdapter", "AnyAdapter", "file_tensors",
    "down_by_columns", "factors_of", "product_norm", "require_forms", "describe_form", "merged_weight", "merged_norm",
    "LOW_RANK_FORMS", "LEAF_OF_NORM", "LORA_PARTS", "UP_FACTORS", "swap_pair", "HELD", "run_block", "keep_in_fp8",
    "is_foreseen", "without_effect", "AT_LEAST_ONE", "NOT_NEGATIVE", "DDPM_ONLY", "refuse_settings", "FluxPredict",
    "LuminaPredict", "SdxlPredict", "predict_for_preview", "Keeper", "Wish", "Allotment", "torch_optimizer",
    "recognise_base", "names_of_base", "all_tables", "unet_generation", "pipeline_base", "FILE_MARKS", "NAME_MARKS",
    "RANKS_BY_TYPE", "OPENERS", "ACCEPTED", "TrainingSet", "use_latents", "use_texts", "fix_captions",
    "limit_to_largest_batch", "limit_to_measured", "LatentFiles", "TextFiles",
)  # fmt: skip
GRAMMAR = "library/checkpoints/adapter_keys.py"
ONCE = {  # definition -> its file
    r"^def recognise_naming\(": GRAMMAR,
    r"^PEFT_PREFIX\b": GRAMMAR,
    r"^def to_underscores\(": GRAMMAR,
    r"^class AdapterKey\b": GRAMMAR,
    r"^def recognise_layout\(": "networks/core/registry/layouts.py",
}
FACTOR = re.compile(r"\blora_(up|down|mid|A|B)\b|\bhada_|\blokr_|\boft_R\b|\bboft_[Rs]\b|\bw_norm\b|\bb_norm\b")
MAY_NAME_FACTORS = (
    "networks/core/kinds/",
    "networks/core/changes/",
    GRAMMAR,
    "library/checkpoints/compatibility.py",  # the key suffixes that other programs look for
    "library/models/identify.py",  # markers of files that are not checkpoints
    "benchmarks/",  # reference implementations for comparison
)


def test_deleted_names_do_not_come_back() -> None:
    back = {path: sorted({*GONE} & {*re.findall(r"\w+", text)}) for path, text in TEXTS.items()}
    assert {path: names for path, names in back.items() if names} == {}


@pytest.mark.parametrize("pattern", ONCE)
def test_every_fact_is_defined_once(pattern: str) -> None:
    files = [path for path, text in TEXTS.items() if re.search(pattern, text, re.MULTILINE)]
    assert files == [ONCE[pattern]]


def factors_in(text: str) -> list[str]:
    """Return the attributes and key suffixes that name factors; texts for users may name them."""
    tree = ast.parse(text)
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    keys = [text for text in texts if " " not in text.strip() and FACTOR.search(text)]
    return keys + [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and FACTOR.search(node.attr)]


def test_no_other_module_accesses_factors() -> None:
    other_files = {path: text for path, text in TEXTS.items() if not path.startswith(MAY_NAME_FACTORS)}
    accesses = {path: factors_in(text) for path, text in other_files.items() if FACTOR.search(text)}
    assert {path: names for path, names in accesses.items() if names} == {}, "ask the change in networks/core/kinds"

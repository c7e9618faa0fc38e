"""A damaged state, cache, image, event file or report is used, recreated, or reported with an error message."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from library.base.errors import UserError
from library.processes.process_group import ALONE
from library.training.report_page.comparison import build_comparison
from library.training.report_page.page import build_page
from library.training.report_page.record import Record
from library.training.report_page.writer import build_report, read_events
from library.training.saving.resume import find_state, record_options
from library.training.saving.state import OptimizerState, require_undamaged, restore, save_state
from tests.event_lines import lines_of, whole_run
from tests.fuzz.budget import any_input, works_or_says_why
from tests.unit.data import test_cache as latents
from tests.unit.data import test_text_cache as texts
from tests.unit.data.builders import options_of, plan_of, write_folder
from tests.unit.training.test_state import DATASET

atoms = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(), st.text(max_size=8), st.just([]), st.just({})
)


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return network, optimizer


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network, optimizer = parts()
    folder = tmp_path_factory.mktemp("state") / "x-state"
    save_state(
        folder, step=7, epoch=2, seed=11, num_processes=1, options=record_options(options_of()), dataset=DATASET,
        network=network, keepers={"optimizer": OptimizerState(optimizer, "torch.optim.AdamW")},
    )  # fmt: skip
    return folder


def resume_state(folder: Path) -> None:
    """Resume a run from the state in a folder."""
    network, optimizer = parts()
    options = options_of("--resume", str(folder))
    manifest = find_state(options.state, options.hub, None, ALONE)
    assert manifest is not None
    require_undamaged(manifest)
    restore(manifest, network, {"optimizer": OptimizerState(optimizer, "torch.optim.AdamW")})


def value_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to every value in nested tables and lists."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [
        path_to_value for key, child in children for path_to_value in value_paths(child, (*path, key))
    ]


@any_input(15)
@given(data=st.data())
def test_a_state_with_a_changed_value_resumes_or_gives_an_error(
    state: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """The digest is removed, as it would detect every change."""
    content = json.loads((state / "train_state.json").read_text())
    del content["digest"]
    *way, last = data.draw(st.sampled_from(value_paths(content)))
    inner = content
    for key in way:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[last] = data.draw(atoms)
    else:
        del inner[last]
    folder = shutil.copytree(state, tmp_path / "state", dirs_exist_ok=True)
    (folder / "train_state.json").write_text(json.dumps(content))
    works_or_says_why(lambda: resume_state(folder))


@any_input(6)
@given(data=st.data())
def test_a_state_with_changed_bytes_resumes_or_gives_an_error(state: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = shutil.copytree(state, tmp_path / "state", dirs_exist_ok=True)
    file = folder / data.draw(st.sampled_from(["train_state.json", "network.safetensors", "training.safetensors"]))
    content = file.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    file.write_bytes(
        content[:start] + data.draw(st.binary(max_size=8)) + content[start + data.draw(st.integers(0, 8)) :]
    )
    works_or_says_why(lambda: resume_state(folder))


dtypes = st.sampled_from(["f4", "f8", "f2", "i8", "u1", "bool", "U3", "c8", "S2"])
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@any_input(6)
@given(data=st.data())
def test_a_latent_cache_with_a_changed_array_is_reused_or_recreated(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("latents")
    write_folder(folder / "2_a", 1)
    latents.cache(folder)
    file = latents.file_of(folder)
    name = data.draw(st.sampled_from(sorted(np.load(file).files))).removesuffix(latents.TAIL)
    array = np.zeros(data.draw(shapes), data.draw(dtypes))
    latents.rewrite(file, keeps_origin=data.draw(st.booleans()), **{name: data.draw(st.sampled_from([array, None]))})
    works_or_says_why(lambda: latents.cache(folder))
    works_or_says_why(lambda: latents.latents_by_key(latents.cache(folder)[0]))


@any_input(6)
@given(data=st.data())
def test_a_text_cache_with_a_changed_array_is_reused_or_recreated(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = texts.write_data(tmp_path_factory.mktemp("texts"), count=1)
    texts.cache(folder)
    file = texts.file_of(folder)
    name = data.draw(st.sampled_from(sorted(np.load(file).files))).removesuffix(latents.TAIL)
    array = np.zeros(data.draw(shapes), data.draw(dtypes))
    texts.rewrite(file, leaves_note=data.draw(st.booleans()), **{name: array})
    skips = data.draw(st.booleans())
    works_or_says_why(lambda: texts.draws_of(texts.cache(folder, skips_check=skips).batches))


@any_input(6)
@given(data=st.data())
def test_damaged_files_of_an_image_folder_work_or_give_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Truncate or modify images, captions and cache files."""
    folder = tmp_path_factory.mktemp("bytes")
    write_folder(folder / "2_a", 3)
    latents.cache(folder)
    file = data.draw(st.sampled_from(sorted((folder / "2_a").iterdir(), key=lambda path: path.name)))
    content = file.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    file.write_bytes(
        content[:start] + data.draw(st.binary(max_size=40)) + content[start + data.draw(st.integers(0, 99)) :]
    )
    line = "--resolution 64 --caption_extension .txt --train_data_dir"
    works_or_says_why(lambda: latents.latents_by_key(latents.cache(folder)[0]))
    works_or_says_why(lambda: plan_of(options_of(line, str(folder))).audit(latents.logging.getLogger("fuzz")))


# Event files and reports that were edited, damaged or fabricated.

LINES = lines_of(whole_run(6))
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, 1e308, float("nan"), "", "\ud800", "x" * 3000, [], {}, [[]], {"a": {}}, [None],
    -(2**63),
)  # fmt: skip


def mutate(value: Any, rng: random.Random, junk: Any) -> Any:
    """Return a copy with one value at any depth replaced, dropped or duplicated."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if rng.random() < 0.1:
        del copy[key]
    else:
        copy[key] = mutate(copy[key], rng, junk)
    return copy


@pytest.mark.slow
@given(seed=st.integers(0, 2**32), junk=st.sampled_from(JUNK), number=st.integers(0, len(LINES) - 1))
@any_input(150)
def test_any_change_of_an_event_works_or_gives_an_error(seed: int, junk: Any, number: int, tmp_path: Path) -> None:
    lines = [*LINES]
    lines[number] = mutate(lines[number], random.Random(seed), junk)
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    works_or_says_why(lambda: build_report(read_events(path)))
    works_or_says_why(lambda: build_comparison([path, path]))


@given(seed=st.integers(0, 2**32), junk=st.sampled_from(JUNK))
@any_input(150)
def test_any_change_of_a_report_works_or_gives_an_error(seed: int, junk: Any, tmp_path: Path) -> None:
    record = Record()
    for line in LINES:
        record.add(line)
    content = json.dumps(mutate(json.loads(json.dumps(record.as_json())), random.Random(seed), junk))
    page, placeholder = build_page("cat", "report.js", {"DATA": 0}), '{"DATA":0}'
    assert page.count(placeholder) == 1
    path = tmp_path / "cat-report.html"
    path.write_text(page.replace(placeholder, content.replace("<", "\\u003c")))
    works_or_says_why(lambda: build_comparison([path, path]))


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"event": "start", "time": 1, "options": []}', '{"event": "start"}', "3"]
)
def test_lines_that_are_not_events_give_an_error(line: str, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is not an event: "):
        read_events(path)

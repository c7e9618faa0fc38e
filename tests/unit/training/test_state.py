"""The content of a state, recognising state folders, and the step at which a run begins."""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.architectures.flux.options import FluxOptions
from library.base.errors import UserError
from library.checkpoints.tree_json import dump_tree, load_tree
from library.data.plan.dataset_digest import content_digests
from library.options.output.saving import SavingOptions, StateOptions
from library.options.train import TrainOptions
from library.options.training.run import RunOptions
from library.processes.process_group import ALONE, Processes
from library.training.reporting.progress import Part
from library.training.saving.names import Names
from library.training.saving.resume import (
    AlreadyComplete,
    alpha_of_state,
    batches_of_state,
    clear_up,
    find_state,
    rates_of_state,
    record_options,
    report_differences,
    resolve_starting_step,
    shares_to_store,
)
from library.training.saving.state import OptimizerState, StateManifest, read_manifest, restore, save_state
from library.training.step.accumulation import StepPlan
from tests.hiding import lazily
from tests.unit.test_processes import Board

optimization = lazily("transformers.optimization")

DATASET = {"num_pictures": 6, "num_batches": 3, "pictures": "a", "captions": "b", "settings": "c"}


def written(
    folder: Path,
    step: int = 7,
    options: TrainOptions | None = None,
    network: nn.Module | None = None,
    done: Sequence[Part] = (),
) -> Path:
    save_state(
        folder,
        step=step,
        epoch=2,
        seed=11,
        num_processes=1,
        options=record_options(options or TrainOptions()),
        dataset=DATASET,
        network=network or nn.Linear(3, 2),
        keepers={},
        done=done,
    )
    return folder


def test_nested_values_come_back_as_they_were() -> None:
    value: dict[Any, Any] = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3, dtype=torch.bfloat16)}},
        "groups": [{"betas": (0.9, 0.1 + 0.2), "lr": 1e-3, "name": None, "params": [0, 1], "is": True}],
        "limit": float("inf"),
    }
    tensors: dict[str, Tensor] = {}
    text = json.dumps(dump_tree(value, "x", tensors))
    loaded = load_tree(json.loads(text), tensors)
    assert repr(loaded) == repr(value)
    assert loaded["groups"][0]["betas"] == (0.9, 0.1 + 0.2)
    assert loaded["state"][0]["exp_avg"].dtype == torch.bfloat16


def test_values_that_only_pickle_can_store_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.state is a Linear"):
        dump_tree({"state": nn.Linear(1, 1)}, "optimizer", {})


def test_a_state_records_its_step_and_epoch(tmp_path: Path) -> None:
    manifest = read_manifest(written(tmp_path / "x-state"))
    assert (manifest.step, manifest.seed, manifest.dataset) == (7, 11, DATASET)
    content = json.loads((tmp_path / "x-state" / "train_state.json").read_text())
    assert (content["current_epoch"], content["current_step"]) == (2, 7)


def test_a_state_replaces_an_older_one_completely(tmp_path: Path) -> None:
    written(tmp_path / "x-state", step=3)
    written(tmp_path / "x-state", step=4)
    assert read_manifest(tmp_path / "x-state").step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["x-state"]


@pytest.mark.parametrize("name", ["network.safetensors", "training.safetensors"])
def test_a_truncated_state_is_refused(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "x-state")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"is not whole: {name}"):
        read_manifest(folder)


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["network.safetensors", "training.safetensors"])
@pytest.mark.parametrize("place", [-1, 12, 0])
def test_a_state_with_one_flipped_bit_is_refused(tmp_path: Path, name: str, place: int) -> None:
    folder = written(tmp_path / "x-state")
    flip_bit(folder / name, place)
    with pytest.raises(ValueError, match=f"x-state is damaged: {name} is not as it was written; copy it again or use"):
        find_one(options_with(tmp_path, resume=str(folder)), ALONE)


def test_a_flipped_bit_in_the_plain_values_is_detected(tmp_path: Path) -> None:
    folder = written(tmp_path / "x-state", step=7)
    text = (folder / "train_state.json").read_text()
    (folder / "train_state.json").write_text(text.replace('"current_step": 7', '"current_step": 5'))
    with pytest.raises(ValueError, match=r"x-state is damaged: train_state\.json is not as it was written"):
        read_manifest(folder)


def test_autoresume_falls_back_to_the_older_intact_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, step in (("x-step00000004-state", 4), ("x-step00000008-state", 8), ("x-step00000009-state", 9)):
        written(tmp_path / name, step=step)
    flip_bit(tmp_path / "x-step00000009-state" / "network.safetensors", -1)
    flip_bit(tmp_path / "x-step00000008-state" / "train_state.json", 20)
    manifest = find_one(options_with(tmp_path, autoresume=True), ALONE)
    assert manifest is not None and manifest.step == 4
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("x-step00000009-state is left out" in line and "is damaged" in line for line in warnings)
    assert any("x-step00000008-state is left out" in line for line in warnings)


def test_a_state_without_digests_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "x-state", step=7)
    content = json.loads((folder / "train_state.json").read_text())
    for name in ("digest", "digests", "done"):
        del content[name]
    (folder / "train_state.json").write_text(json.dumps(content))
    manifest = find_one(options_with(tmp_path, resume=str(folder)), ALONE)
    assert manifest is not None and manifest.step == 7 and not manifest.done


@pytest.mark.parametrize(
    ("name", "value"),
    [("current_step", -1), ("current_step", None), ("current_step", "7"), ("seed", "3"), ("num_processes", 0),
     ("options", None), ("dataset", None), ("parts", []), ("done", None), ("digests", None)],
)  # fmt: skip
def test_values_that_no_run_writes_are_named(tmp_path: Path, name: str, value: Any) -> None:
    """A state without a digest may contain any value."""
    folder = written(tmp_path / "x-state")
    content = json.loads((folder / "train_state.json").read_text())
    del content["digest"]
    (folder / "train_state.json").write_text(json.dumps({**content, name: value}))
    with pytest.raises(UserError, match=re.escape(f"{name} in its train_state.json is {value!r}; use another state")):
        read_manifest(folder)


def test_a_state_may_have_a_negative_seed(tmp_path: Path) -> None:
    """--seed takes one."""
    folder = written(tmp_path / "x-state")
    content = json.loads((folder / "train_state.json").read_text())
    del content["digest"]
    (folder / "train_state.json").write_text(json.dumps({**content, "seed": -3}))
    assert read_manifest(folder).seed == -3


def test_a_state_of_sd_scripts_is_refused_with_an_explanation(tmp_path: Path) -> None:
    (tmp_path / "train_state.json").write_text('{"current_epoch": 1, "current_step": 5}')
    (tmp_path / "optimizer.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"is a state of sd-scripts.*--network_weights"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 99}', '{"version": 1}'])
def test_damaged_facts_are_refused_with_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "train_state.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        read_manifest(tmp_path)


def test_another_network_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "x-state", network=nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"holds another network.*--network_dim"):
        restore(read_manifest(folder), nn.Linear(4, 2), {})


class SavingProducts(nn.Module):
    """A network whose `state_dict` is the content of its file, with its scalar multiplied in, as in LyCORIS."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.tensor([3.0, 5.0]))
        self.register_buffer("scalar", torch.tensor(1.0), persistent=False)
        self.register_load_state_dict_post_hook(self.reset_scalar)

    def reset_scalar(self, *_: Any) -> None:
        self.scalar.fill_(1.0)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"up": self.up * self.scalar}


def test_weights_and_buffers_are_kept_apart_that_a_network_multiplies_in_its_file(tmp_path: Path) -> None:
    network, resumed = SavingProducts(), SavingProducts()
    network.scalar.fill_(0.3)
    restore(read_manifest(written(tmp_path / "x-state", network=network)), resumed, {})
    assert torch.equal(resumed.up, network.up) and torch.equal(resumed.scalar, network.scalar)


def test_restoring_a_state_runs_the_load_hooks_of_a_network(tmp_path: Path) -> None:
    network, called = nn.Linear(3, 2), list[nn.Module]()
    network.register_load_state_dict_post_hook(lambda module, _: called.append(module))
    restore(read_manifest(written(tmp_path / "x-state", network=network)), network, {})
    assert called == [network], "GGPO goes on with its noise"


def test_an_older_state_holds_what_the_network_saves_as_its_file(tmp_path: Path) -> None:
    network = SavingProducts()
    manifest = read_manifest(written(tmp_path / "x-state", network=network))
    save_file({"up": torch.tensor([0.9, 1.5])}, manifest.path / "network.safetensors")
    restore(manifest, network, {})
    assert network.up.tolist() == pytest.approx([0.9, 1.5]) and network.scalar == 1.0


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_optimizer_state_is_cast_to_the_dtype_of_the_weights(before: torch.dtype, after: torch.dtype) -> None:
    """Adding or removing --full_bf16 on resuming changes that dtype, and the fused step supports a single one only."""

    def stepped(dtype: torch.dtype, state: dict[str, Any] | None) -> torch.optim.AdamW:
        torch.manual_seed(21)
        layer = nn.Linear(3, 2).to(dtype)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        if state is not None:
            OptimizerState(optimizer, "torch.optim.AdamW").load_state_dict(state)
        layer(torch.randn(4, 3).to(dtype)).float().square().sum().backward()
        optimizer.step()
        return optimizer

    saved = OptimizerState(stepped(before, None), "torch.optim.AdamW").state_dict()
    resumed = stepped(after, saved)
    assert {float(memory["step"]) for memory in resumed.state.values()} == {2.0}
    assert {memory["exp_avg"].dtype for memory in resumed.state.values()} == {after}


def test_the_state_of_another_optimizer_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    keeper = OptimizerState(torch.optim.AdamW([weight]), "torch.optim.AdamW(lr=1)")
    saved = OptimizerState(torch.optim.SGD([weight]), "torch.optim.SGD").state_dict()
    with pytest.raises(ValueError, match=r"torch\.optim\.SGD, but this run uses torch\.optim\.AdamW"):
        keeper.load_state_dict(saved)


@pytest.mark.parametrize("part", [{"table": 5}, {"tensor": "absent"}, [], {"list": None}])
def test_a_state_edited_by_hand_is_refused_with_a_sentence(tmp_path: Path, part: Any) -> None:
    manifest = read_manifest(written(tmp_path / "x-state"))
    weight = nn.Parameter(torch.ones(2))
    keeper = OptimizerState(torch.optim.SGD([weight], lr=0.1), "x")
    with pytest.raises(ValueError, match="does not fit the optimizer of this run"):
        restore(replace(manifest, parts={"optimizer": part}), nn.Linear(3, 2), {"optimizer": keeper})


def test_a_float32_optimizer_state_of_bfloat16_weights_is_not_rounded() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight]["average"] = torch.tensor([1 / 3, 2 / 3, 1e-3])
    saved = OptimizerState(optimizer, "x").state_dict()
    resumed = torch.optim.SGD([weight], lr=0.1)
    OptimizerState(resumed, "x").load_state_dict(saved)
    assert torch.equal(resumed.state[weight]["average"], torch.tensor([1 / 3, 2 / 3, 1e-3]))


def test_adafactor_does_not_change_who_sets_its_rates() -> None:
    """Otherwise the optimizer would keep the state's setting under a schedule that is made for the other one."""
    weight = nn.Parameter(torch.ones(2, 2))
    own, scheduled = (optimization.Adafactor([weight], lr=rate, relative_step=rate is None) for rate in (None, 0.1))
    with pytest.raises(UserError, match="relative_step of a group of parameters is False, here it is True"):
        OptimizerState(own, "x").load_state_dict(OptimizerState(scheduled, "x").state_dict())


# --- choosing a state ---


def options_with(folder: Path | None = None, max_train_steps: int = 100, **state: Any) -> TrainOptions:
    return replace(
        TrainOptions(),
        saving=replace(SavingOptions(), output_dir=str(folder) if folder else None, output_name="x"),
        state=replace(StateOptions(), **state),
        run=replace(RunOptions(), max_train_steps=max_train_steps),
    )


@pytest.mark.parametrize("other", ["x-251130", "x-20251130", "x-step5"])
def test_autoresume_tells_a_run_from_another_one_whose_name_is_longer(tmp_path: Path, other: str) -> None:
    """A date at the end of a name looks like the number of an epoch."""
    named = [
        replace(options, saving=replace(options.saving, output_name=name))
        for options in [options_with(tmp_path, autoresume=True)]
        for name in ("x", other)
    ]
    written(tmp_path / f"{other}-state", options=named[1])
    assert find_one(named[0], ALONE) is None
    manifest = find_one(named[1], ALONE)
    assert manifest is not None and manifest.path.name == f"{other}-state"
    written(tmp_path / "x-000002-state", step=3, options=named[0])
    manifest = find_one(named[0], ALONE)
    assert manifest is not None and manifest.path.name == "x-000002-state"


def test_autoresume_uses_the_intact_state_with_the_most_steps(tmp_path: Path) -> None:
    for name, step in (("x-step00000009-state", 9), ("x-000002-state", 12), ("x-step00000020-state", 20)):
        written(tmp_path / name, step=step)
    (tmp_path / "x-step00000020-state" / "network.safetensors").unlink()
    written(tmp_path / "y-step00000050-state", step=50)
    manifest = find_one(options_with(tmp_path, autoresume=True), ALONE)
    assert manifest is not None and manifest.step == 12


def test_of_two_states_of_the_same_step_the_more_complete_one_is_used(tmp_path: Path) -> None:
    for name, done in (("x-000002-state", ("epoch", "step")), ("x-step00000009-state", ("step",))):
        written(tmp_path / name, step=9, done=done)
    manifest = find_one(options_with(tmp_path, autoresume=True), ALONE)
    assert manifest is not None and manifest.path.name == "x-000002-state" and manifest.done == {"step", "epoch"}


def test_unfinished_files_of_a_killed_process_are_deleted(tmp_path: Path) -> None:
    own_files = [
        "x.safetensors", "x-best.ckpt", "x-000001.safetensors", "x-step00000009.safetensors",
        "sample/x_000002_00_20270115080000_1.png", "sample_grid/x_e000002_20270115080000.png",
    ]  # fmt: skip
    of_others = ["xy.safetensors", "x-y.safetensors", "sample/xy_000002_00_20270115080000.png", "sample/x_a.png"]
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample_grid").mkdir()
    for name in (*own_files, *of_others):
        path = tmp_path / name
        path.touch()
        path.with_name(f".{path.stem}.0123456789ab{path.suffix}").touch()
        path.with_name(f"..{path.stem}.0123456789ab.9876543210fe{path.suffix}").touch()
    find_one(options_with(tmp_path), ALONE)
    remaining = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in remaining if "/." not in f"/{name}"} == {*own_files, *of_others}
    hidden = {re.sub(r"(?<=/)\.+|\.[0-9a-f]{12}", "", f"/{name}")[1:] for name in remaining if "/." in f"/{name}"}
    assert hidden == {*of_others}


def test_autoresume_starts_from_the_beginning_without_a_state(tmp_path: Path) -> None:
    assert find_one(options_with(tmp_path / "new", autoresume=True), ALONE) is None


def test_unfinished_states_of_a_killed_process_are_deleted(tmp_path: Path) -> None:
    written(tmp_path / "x-state", step=5)
    (tmp_path / "x-state").rename(tmp_path / ".x-state.0123456789ab.replaced")
    (tmp_path / ".x-step00000009-state.0123456789ab.unfinished").mkdir()
    of_others = [".xy-000001-state.0123456789ab.unfinished", ".y-state.0123456789ab.unfinished"]
    for name in of_others:
        (tmp_path / name).mkdir()
    manifest = find_one(options_with(tmp_path, autoresume=True), ALONE)
    assert manifest is not None and manifest.step == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [*of_others, "x-state"]


def test_a_state_moved_aside_by_a_killed_process_is_restored_for_resume(tmp_path: Path) -> None:
    written(tmp_path / "x-state", step=5).rename(tmp_path / ".x-state.0123456789ab.replaced")
    manifest = find_one(options_with(tmp_path, resume=str(tmp_path / "x-state")), ALONE)
    assert manifest is not None and manifest.step == 5


def test_a_dry_run_does_not_touch_the_state_that_another_run_is_writing(tmp_path: Path) -> None:
    unfinished = tmp_path / ".x-state.0123456789ab.unfinished"
    unfinished.mkdir()
    options = options_with(tmp_path)
    assert find_one(options, ALONE, clears=False) is None
    assert unfinished.is_dir()


def find_one(options: TrainOptions, processes: Processes, clears: bool = True) -> StateManifest | None:
    """Return the state from which a run resumes."""
    names = Names.build(options.saving) if options.saving.output_dir else None
    if clears and processes.is_main and names is not None:
        clear_up(names)
    return find_state(options.state, options.hub, names, processes)


def find_in_two(main: TrainOptions, other: TrainOptions) -> list[StateManifest | None]:
    """Return the state from which each of two processes resumes."""
    board = Board()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(find_one, o, Processes(r, 2, store=board)) for r, o in enumerate((main, other))]
        return [future.result() for future in futures]


def test_all_processes_resume_from_the_state_of_the_main_process(tmp_path: Path) -> None:
    written(tmp_path / "x-000001-state", step=5)
    options = options_with(tmp_path, autoresume=True)
    elsewhere = options_with(tmp_path / "empty", autoresume=True)
    assert [manifest and manifest.step for manifest in find_in_two(options, elsewhere)] == [5, 5]
    assert find_in_two(elsewhere, options) == [None, None]


def test_copies_of_a_state_count_as_the_same_state(tmp_path: Path) -> None:
    original = written(tmp_path / "one" / "x-state", step=5)
    shutil.copytree(original, tmp_path / "two" / "x-state")
    states = find_in_two(*(options_with(resume=str(tmp_path / name / "x-state")) for name in ("one", "two")))
    assert [manifest and manifest.step for manifest in states] == [5, 5]


def test_processes_with_different_states_are_refused(tmp_path: Path) -> None:
    for name, step in (("one", 5), ("two", 7)):
        written(tmp_path / name / "x-state", step=step)
    options_a, options_b = (options_with(resume=str(tmp_path / name / "x-state")) for name in ("one", "two"))
    with pytest.raises(ValueError, match=r"the state of process 1 differs.*step 7.*step 5"):
        find_in_two(options_a, options_b)


# --- the first step ---

PLAN = StepPlan(num_batches=10, accumulation=1, max_train_steps=100)


def at_step(step: int, *done: Part) -> StateManifest:
    return StateManifest(Path("s"), step, 0, 1, {}, {}, {}, frozenset(done))


@pytest.mark.parametrize(
    ("saved", "state", "expected"),
    [
        (None, {}, 0),
        (37, {}, 37),
        (37, {"skip_until_initial_step": True}, 37),
        (37, {"initial_epoch": 3}, 20),
        (37, {"initial_step": 25, "skip_until_initial_step": True}, 25),
        (37, {"initial_step": 25}, 20),
        (None, {"initial_step": 25, "skip_until_initial_step": True}, 25),
        (None, {"initial_epoch": 2, "initial_step": 40}, 40),
        (None, {"initial_epoch": 1}, 0),
    ],
)
def test_the_first_step_of_a_run(saved: int | None, state: dict[str, Any], expected: int) -> None:
    assert begin(options_with(**state), PLAN, None if saved is None else at_step(saved)) == expected


def begin(options: TrainOptions, plan: StepPlan, manifest: StateManifest | None) -> int:
    end = Path(options.saving.output_dir or "") / "x.safetensors"
    return resolve_starting_step(options.state, end, plan, manifest)


def test_a_run_with_nothing_left_is_refused_or_complete(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    for named in (options_with(tmp_path, resume="s"), options_with(tmp_path, resume="s", autoresume=True)):
        with pytest.raises(ValueError, match="nothing is left to train; raise --max_train_steps"):
            begin(named, PLAN, at_step(100, "step", "end"))
    with pytest.raises(AlreadyComplete):
        begin(options_with(tmp_path, autoresume=True), PLAN, at_step(100, "end"))
    with pytest.raises(AlreadyComplete):
        begin(options_with(tmp_path, autoresume=True), PLAN, at_step(101, "step"))


def test_a_run_without_its_final_file_resumes_to_write_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for resume_options in ({"resume": "s"}, {"autoresume": True}):
        with caplog.at_level(logging.INFO):
            assert begin(options_with(tmp_path, **resume_options), PLAN, at_step(100, "end")) == 100  # it has ended
        (tmp_path / "x.safetensors").touch()  # of another run
        assert begin(options_with(tmp_path, **resume_options), PLAN, at_step(100, "step")) == 100
        (tmp_path / "x.safetensors").unlink()
    assert "the state s is at the last step: only the final files are left to write" in caplog.text


def differences(before: TrainOptions, now: TrainOptions, caplog: pytest.LogCaptureFixture, **changes: Any) -> str:
    manifest = StateManifest(Path("s"), 1, 0, 1, record_options(before), DATASET, {})
    with caplog.at_level(logging.INFO):
        report_differences(manifest, now, {**DATASET, **changes}, num_processes=1)
    return caplog.text


def test_the_same_run_at_another_path_logs_no_difference(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert differences(options_with(tmp_path), options_with(tmp_path / "b", resume="s"), caplog) == ""


@pytest.mark.parametrize(
    "changes", [{"log_events": "events.jsonl"}, {"no_report": True}, {"fit": "12GB", "fit_formats": ["int8"]}]
)
def test_options_that_do_not_affect_the_result_log_no_difference(
    caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    assert differences(TrainOptions(), TrainOptions().with_values(changes), caplog) == ""


def test_messages_about_changed_options_explain_the_effect(caplog: pytest.LogCaptureFixture) -> None:
    base = TrainOptions()
    now = replace(
        base,
        optimizer=replace(base.optimizer, learning_rate=5e-5),
        loss=replace(base.loss, min_snr_gamma=5.0),
        run=replace(base.run, max_train_steps=2000),
    )
    text = differences(base, now, caplog, pictures="other", num_pictures=7)
    assert "--learning_rate was 2e-06 in the state and is 5e-05, which takes effect from here on: the" in text
    assert "--min_snr_gamma was None in the state and is 5.0: the run continues, but differs from an" in text
    assert "--max_train_steps was 1600 in the state and is 2000: learning rates that depend on the length" in text
    assert "its images differ; 6 images in 3 batches then, 7 in 3 now" in text


def test_unset_rates_are_taken_from_the_state(caplog: pytest.LogCaptureFixture) -> None:
    before = TrainOptions().with_values({"learning_rate": 1e-4, "unet_lr": 2e-4, "text_encoder_lr": [5e-5]})
    manifest = StateManifest(Path("s"), 1, 0, 1, record_options(before), DATASET, {})
    with caplog.at_level(logging.INFO):
        rates = rates_of_state(TrainOptions().with_values({"unet_lr": 3e-4}), manifest)
    assert rates == {"learning_rate": 1e-4, "text_encoder_lr": [5e-5]}
    assert "--learning_rate is not given: that of the state stays, 0.0001" in caplog.text
    assert rates_of_state(before, None) == {}


def test_a_state_of_an_adapter_from_a_file_needs_the_file_no_more(caplog: pytest.LogCaptureFixture) -> None:
    before = TrainOptions().with_values({"network_weights": "a.safetensors", "dim_from_weights": True})
    assert differences(before, TrainOptions(), caplog) == ""


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (8.0, "--network_alpha 8 has no effect: the adapter in the state keeps its own, 4"),
        (1.0, "--network_alpha is not given: that of the state stays, 4"),
    ],
)
def test_the_adapter_keeps_the_alpha_of_its_state(alpha: float, message: str, caplog: pytest.LogCaptureFixture) -> None:
    manifest = StateManifest(Path("s"), 1, 0, 1, {"network_alpha": 4.0}, DATASET, {})
    with caplog.at_level(logging.INFO):
        assert alpha_of_state(alpha, manifest) == {"network_alpha": 4.0}
    assert message in caplog.text
    assert alpha_of_state(4.0, manifest) == alpha_of_state(4.0, None) == {}


def test_paths_of_events_and_cached_captions_log_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    base = FluxOptions()
    others = {"log_events": "other.jsonl", "no_report": True, "cache_text_encoder_outputs_to_disk": True,
              "disable_mmap_load_safetensors": True, "show_timesteps": "console"}  # fmt: skip
    assert differences(base, base.with_values(others), caplog) == ""


def test_changed_image_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [str(tmp_path / f"{name}.png") for name in "abcd"]
    for path in paths[:3]:
        Path(path).write_bytes(path.encode() * 30_000)
    before = content_digests(paths, 1)
    Path(paths[1]).touch()
    content = bytearray(Path(paths[2]).read_bytes())
    content[len(content) // 2] ^= 1
    Path(paths[2]).write_bytes(content)
    now = content_digests(paths, 2)
    manifest = StateManifest(Path("s"), 1, 0, 1, record_options(TrainOptions()), {**DATASET, "contents": before}, {})
    report_differences(manifest, TrainOptions(), {**DATASET, "contents": now}, 1, paths)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"1 image changed since the state was saved: {paths[2]}: the")


def test_tracing_and_an_equal_effective_batch_do_not_count_as_another_run(caplog: pytest.LogCaptureFixture) -> None:
    base = TrainOptions()
    traced = replace(base, diagnostics=replace(base.diagnostics, trace_nonfinite=True))
    assert differences(base, traced, caplog) == ""
    two = StateManifest(Path("s"), 1, 0, 2, record_options(base), DATASET, {})
    doubled = replace(base, run=replace(base.run, gradient_accumulation_steps=2))
    with caplog.at_level(logging.INFO):
        report_differences(two, doubled, DATASET, num_processes=1)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "a step averages as many batches as before" in caplog.text
    caplog.clear()
    assert "--gradient_accumulation_steps was 1 in the state and is 2: the run continues, but" in differences(
        base, doubled, caplog
    )


def test_passwords_are_not_written(tmp_path: Path) -> None:
    base = TrainOptions()
    options = replace(base, hub=replace(base.hub, huggingface_token="hf_secret"))
    folder = written(tmp_path / "x-state", options=options)
    assert "hf_secret" not in (folder / "train_state.json").read_text()


@pytest.mark.parametrize(("count", "num_own", "expected"), [(1, 2, 8), (8, 2, 1), (2, 2, 4), (3, 5, 5), (4, 2, 2)])
def test_a_step_with_another_number_of_processes_has_as_many_batches(count: int, num_own: int, expected: int) -> None:
    """The state has four processes with two batches each; a given accumulation of five differs and is kept."""
    base = TrainOptions().with_values({"gradient_accumulation_steps": 2})
    manifest = StateManifest(Path("s"), 1, 0, 4, record_options(base), DATASET, {})
    assert batches_of_state(num_own, manifest, count) == (
        {} if expected == num_own else {"gradient_accumulation_steps": expected}
    )


def test_one_command_line_goes_on_with_any_number_of_processes_and_again() -> None:
    """Each run is cut and goes on; the first has four processes, and every command says two batches in each."""
    manifest, steps = None, list[int]()
    for count in (4, 2, 2, 1, 8, 4):
        accumulation = batches_of_state(2, manifest, count).get("gradient_accumulation_steps", 2)
        steps.append(accumulation * count)
        processes, stored = shares_to_store(manifest, accumulation, count)
        options = TrainOptions().with_values({"gradient_accumulation_steps": stored})
        manifest = StateManifest(Path("s"), 1, 0, processes, record_options(options), DATASET, {})
    assert steps == [8] * 6
    assert shares_to_store(manifest, 5, 3) == (3, 5)  # other steps, as the command asks: the state holds them


def test_an_uneven_number_of_batches_is_refused_with_numbers_that_work() -> None:
    manifest = StateManifest(Path("s"), 1, 0, 4, record_options(TrainOptions()), DATASET, {})
    with pytest.raises(UserError, match=r"4 batches in each step; 3 cannot share these out\. Start 1 or 2 or 4 "):
        batches_of_state(1, manifest, 3)

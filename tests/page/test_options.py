"""The form of all options: what it sets is what the command line of train.py sets."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import train
from library.options.config_file import read_toml
from library.page.settings import check_settings, list_settings, read_settings
from library.page.store import Draft, Store
from library.page.tasks import START
from library.page.worker import make_plan, read_photos, start
from tests.browser import in_browser
from tests.chromium import Browser, Tab, browsing
from tests.page.serving import Server, serving
from tests.page.test_looks import AXE, RULES, SIZES
from tests.running import ROOT
from tests.simulated_gpu.build import obstacle

pytestmark = pytest.mark.slow

PHOTOS, TOY = ROOT / "configs" / "quickstart" / "dataset", ROOT / "configs" / "quickstart" / "toy_base"
GIVEN: Mapping[str, Any] = {
    "network_dim": "8",
    "network_args": ["conv_dim=4", "dropout=0.1"],
    "noise_offset": "-0.05",
    "gradient_checkpointing": True,
    "optimizer_type": "Lion",
    "training_comment": "two words",
}
WORDS = [
    "--network_dim", "8", "--network_args", "conv_dim=4", "dropout=0.1", "--noise_offset", "-0.05",
    "--gradient_checkpointing", "--optimizer_type", "Lion", "--training_comment", "two words",
]  # fmt: skip
OF_FILES = {"dataset_config", "sample_prompts", "output_dir", "cache_dir", "output_name"}


def silent(**values: Any) -> None:
    pass


def inputs_of(**values: Any) -> dict[str, Any]:
    return asdict(Draft(str(PHOTOS), trigger="zheart, a heart", base=str(TOY), **values))


def test_a_run_has_the_options_that_the_command_line_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(PHOTOS), "--base", str(TOY), "--trigger", "zheart, a heart", "--steps", "40", *WORDS]
    assert train.main([*words, "--name", "typed", "--plan_only", "--yes"]) == 0
    photos = {photo.name: photo.with_suffix(".txt").read_text().strip() for photo in PHOTOS.glob("*.png")}
    plan = make_plan({**inputs_of(steps=40, options=GIVEN), "photos": photos}, silent)
    started = start({"plan": plan, "trains": False}, silent)
    typed, clicked = (
        read_toml(path, "x") for path in (tmp_path / "output" / "typed" / "typed.toml", Path(started["config"]))
    )
    assert {*GIVEN} <= typed.keys() and typed["network_args"] == ["conv_dim=4", "dropout=0.1"]
    for values in (typed, clicked):
        for name in OF_FILES:
            del values[name]
    assert typed == clicked
    assert plan["record"]["options"] == read_settings(inputs_of(options=GIVEN))[2]
    assert any(label == "given" and "--network_dim 8" in text for label, text in plan["lines"])


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"network_dim": "abc"}, "--network_dim"),
        ({"network_dim": "0"}, "--network_dim"),
        ({"network_dim": True}, "--network_dim"),
        ({"gradient_checkpointing": "yes"}, "--gradient_checkpointing"),
        ({"caption_dropout_rate": "2"}, "--caption_dropout_rate"),
        ({"adaptive_noise_scale": "0.1"}, "--adaptive_noise_scale"),
        ({"vae": "/nowhere.safetensors"}, "--vae"),
        ({"prediction": "both"}, "--prediction"),
        ({"like": "/nowhere"}, "--like"),
        ({"no_such": "1"}, "--no_such"),
        ({"network_args": ["conv_dim=4", "--output_dir=/tmp"]}, "--network_args"),
        ({"network_args": ["-h"]}, "--network_args"),
        *(({name: "x"}, f"--{name}") for name in ("output_dir", "base", "steps", "name", "yes", "resume", "recipe")),
        *(({name: "x"}, f"--{name}") for name in ("output_name", "dataset_config", "config_file", "wandb_api_key")),
    ],
)
def test_an_error_names_the_field_that_it_is_about(options: dict[str, Any], setting: str) -> None:
    error = check_settings(inputs_of(options=options))["error"]
    assert error["setting"] == setting and setting in error["message"]


def test_the_form_has_every_option_but_those_that_are_set_elsewhere() -> None:
    listed = list_settings(inputs_of(options={"multires_noise_discount": "0.5"}), silent)
    names = [option["name"] for option in listed["options"]]
    assert len(names) == len({*names}) > 200
    assert not {*names} & {"output_dir", "resume", "dataset_config", "pretrained_model_name_or_path", "max_train_steps"}
    assert {"network_dim", "prediction", "like", "learning_rate"} <= {*names}
    by_name = {option["name"]: option for option in listed["options"]}
    assert by_name["network_dim"]["facts"]["takes"] == "a whole number from 1"
    assert by_name["adaptive_noise_scale"]["facts"]["requires"] == "--noise_offset"
    assert listed["recipe"]["network_dim"] == 16 and listed["error"] is None
    assert listed["unused"] == {
        "multires_noise_discount": "--multires_noise_discount has no effect without --multires_noise_iterations"
    }


@pytest.mark.skipif(obstacle() is not None, reason="no GPU can be simulated here")
def test_a_base_that_does_not_fit_the_card_is_an_error_of_the_plan() -> None:
    gpu = {"PYTHONPATH": str(ROOT / "tests" / "simulated_gpu" / "startup"), "SIMULATED_BYTES": "200000000"}
    inputs = json.dumps({**inputs_of(steps=40), "photos": {"heart_00.png": "a", "heart_01.png": "b"}}) + "\n"
    command, environment = [sys.executable, "-c", START, str(ROOT), "plan"], {**os.environ, **gpu}
    done = subprocess.run(command, input=inputs, env=environment, capture_output=True, text=True)
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["setting"] == "--fit" and "nothing fits: the least is" in error["message"].splitlines()[-1]


# --- in the browser ---


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Browser, str]]:
    """A server with a draft on the quickstart's model, and the address of its plan."""
    folder = tmp_path_factory.mktemp("options")
    store = Store(folder)
    store.create()
    draft = Draft(str(PHOTOS), trigger="zheart, a heart", base=str(TOY), steps=40)
    store.save(draft)
    store.write(draft.id, "photos.json", read_photos({"root": str(PHOTOS)}, silent))
    with serving(folder) as server, browsing(folder) as browser:
        first = browser.open(server.address.first_url)
        first.see("Train a LoRA on your photos")
        first.call("Page.close")
        yield server, browser, f"{server.address.url}#/plan/{draft.id}"


def open_form(opened: tuple[Server, Browser, str], *size: int, dark: bool = False) -> Tab:
    tab = opened[1].open(opened[2], *size, dark=dark)
    tab.when(
        "const form = [...document.querySelectorAll('details')].find((one) => one.innerText.startsWith('All options'));"
        "if (form && !form.open) form.firstChild.click(); return form;"
    )
    tab.when("return document.querySelectorAll('.options .field').length > 200")
    return tab


SHOWN = "[...document.querySelectorAll('.options .field')].filter((one) => one.getClientRects().length)"


def near(name: str, what: str) -> str:
    """Return a script with what the input of an option has."""
    label = f"[...document.querySelectorAll('label')].find((one) => one.textContent === {json.dumps(name)})"
    return f"{label}.control.{what}"


@in_browser
def test_axe_finds_nothing_in_the_form_and_no_width_scrolls_sideways(opened: Any) -> None:
    for width, height in SIZES:
        for dark in (False, True):
            tab = open_form(opened, width, height, dark=dark)
            tab.choose("Show", "all")
            assert tab.run("document.documentElement.scrollWidth") == width
            if (width, height) != SIZES[1]:  # axe takes seconds for so many fields
                tab.call("Page.close")
                continue
            tab.run(AXE.read_text(encoding="utf-8"))
            violations = tab.run(
                f"axe.run(document, {RULES}).then(({{violations}}) => JSON.stringify(violations.map(({{id, nodes}}) => "
                "[id, ...nodes.slice(0, 3).map(({html, failureSummary}) => html.slice(0, 200) + failureSummary)])))"
            )
            assert json.loads(violations) == [], (width, dark)
            tab.call("Page.close")
    assert opened[1].told == []


@in_browser
@pytest.mark.skipif(os.name != "posix", reason="passes pipes to a shell")
def test_options_are_found_set_refused_and_trained_by_clicks(opened: Any) -> None:
    server, _, _ = opened
    tab = open_form(opened, *SIZES[1])
    tab.see("What is decided, and why")
    tab.write("Search in names and explanations", "--network_dim")
    assert 1 <= tab.run(f"{SHOWN}.length") < 20
    tab.see("plan: 16")
    tab.write("network_dim", "many")
    tab.when(f"return {near('network_dim', 'getAttribute(`aria-invalid`)')} === 'true'")
    assert "invalid int value: 'many'" in tab.run(near("network_dim", "parentElement.innerText"))
    tab.write("network_dim", "8")
    tab.when(f"return {near('network_dim', 'getAttribute(`aria-invalid`)')} === 'false'")
    tab.see("yours; the recipe has 16")
    tab.write("Search in names and explanations", "network_args")
    tab.write("network_args", 'conv_dim=4 "dropout=0.1"')
    tab.write("Search in names and explanations", "")
    tab.choose("Show", "yours")
    tab.when(f"return {SHOWN}.length === 2")
    tab.see("All options (2 of yours)")
    tab.click("Make the plan again")
    tab.see("--network_dim 8")
    tab.click("Write the files and show the command")
    tab.see("This command trains with them")
    written = read_toml(next(server.folder.glob("output/*/*.toml")), "x")
    assert (written["network_dim"], written["network_args"]) == (8, ["conv_dim=4", "dropout=0.1"])
    tab.write("network_args", "")
    tab.write("network_dim", "")
    tab.see("The settings have changed")
    tab.when(f"return {SHOWN}.length === 0")
    assert opened[1].told == []


@in_browser
def test_a_keyboard_finds_and_sets_an_option(opened: Any) -> None:
    tab = open_form(opened, *SIZES[1])
    tab.click("Search in names and explanations")
    tab.call("Input.insertText", text="gradient_checkpointing")
    tab.when(f"return 0 < {SHOWN}.length && {SHOWN}.length < 20")
    for _ in range(30):
        tab.press("Tab")
        if tab.run("document.activeElement.labels?.[0]?.textContent") == "gradient_checkpointing":
            break
    tab.press(" ")
    tab.see("yours; the default is not set")
    assert tab.run("document.activeElement.checked")
    tab.press(" ")
    tab.when("return !document.body.innerText.includes('yours;')")

"""A form made from tools/capabilities.py alone, filled in by a browser: its words are what the script accepts."""

import contextlib
import html
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flux_2_train_network
from tests.browser import in_browser
from tests.chromium import ask
from tests.running import ROOT
from tools.capabilities import main

pytestmark = [pytest.mark.slow, in_browser]
SCRIPT = "flux_2_train_network.py"
# Fill in every field, and return the words of the command line and the fields that refuse what is out of range.
FILL = """
const words = [], strict = [];
for (const field of document.querySelectorAll("[data-flag]")) {
  if (field.min !== "" && field.type === "number") {
    field.value = Number(field.min) - 1;
    if (!field.checkValidity()) strict.push(field.name);
  }
  if (field.type === "checkbox") field.checked = true;
  else if (field.tagName === "SELECT") field.selectedIndex = field.options.length - 1;
  else field.value = field.type === "number" ? (field.max || Number(field.min || 0) + 1) : "x";
  if (!field.checkValidity()) throw Error(field.name + " refuses " + field.value);
  words.push(field.type === "checkbox" ? [field.dataset.flag] : [field.dataset.flag, field.value]);
}
return {words, strict, groups: [...document.querySelectorAll("fieldset")].map((set) => set.id)};
"""


def field_of(option: dict[str, Any]) -> str:
    words = f'name="{option["name"]}" data-flag="{option["flag"]}" title="{html.escape(option["help"])}"'
    if option["type"] == "flag":
        return f'<input type="checkbox" {words}>'
    if option["choices"] and not option["takes_other_values"]:
        return f"<select {words}>{''.join(f'<option>{choice}</option>' for choice in option['choices'])}</select>"
    if option["type"] in ("text", "path"):
        return f"<input {words}>"
    step = 'step="1"' if option["type"] == "int" else 'step="any"'
    least = option["minimum"] if option["minimum"] is not None else option["exclusive_minimum"]
    limits = [(name, value) for name, value in (("min", least), ("max", option["maximum"])) if value is not None]
    return f'<input type="number" {step} {" ".join(f"{name}={value}" for name, value in limits)} {words}>'


def test_a_form_of_the_json_fills_in_every_option_of_the_help(tmp_path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["--json", "--script", SCRIPT]) == 0
    (script,) = json.loads(printed.getvalue())["scripts"]
    options = {option["name"]: option for option in script["options"]}
    groups: dict[str, list[str]] = {}
    for option in options.values():
        groups.setdefault(option["group_id"], []).append(field_of(option))
    sets = "".join(f'<fieldset id="{name}">{"".join(fields)}</fieldset>' for name, fields in groups.items())
    policy = "<meta http-equiv=Content-Security-Policy content=\"script-src 'none'\">"
    found, told = ask(f"<!doctype html>{policy}<title>form</title><form>{sets}</form>", FILL, tmp_path)
    assert not told and found["groups"] == list(groups)
    flags = [flag for flag, *_ in found["words"]]
    shown = subprocess.run([sys.executable, ROOT / SCRIPT, "--help_all"], capture_output=True, text=True, check=True)
    in_help = {word.rstrip(",") for word in shown.stdout.split() if word.startswith("--")}
    assert {flag for flag in flags if not options[flag[2:]]["help"].startswith("==")} <= in_help
    # A form may send every value that its fields accept: the parser takes all of them.
    words = [word for pair in found["words"] for word in pair if pair[0] not in ("--help_all", "--version")]
    args = vars(flux_2_train_network.setup_parser().parse_args(words))
    for name, option in options.items():
        if option["type"] in ("int", "float") and not option["is_list"]:
            assert isinstance(args[name], (int, float)), name
    assert set(found["strict"]) >= {"network_dim", "max_train_steps"} & options.keys()

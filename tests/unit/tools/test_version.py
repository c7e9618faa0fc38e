"""--version and --errors_json of every script and command."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from library.base.version import VERSION

ROOT = Path(__file__).parents[3]
SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in (".", "tools", "networks", "finetune")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_its_version(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--version"])
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as ended:
        module.setup_parser().parse_args() if hasattr(module, "setup_parser") else module.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{Path(script).name} {VERSION}\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_a_wrong_command_line_as_json(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--errors_json"])
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if hasattr(module, "setup_parser"):
        assert "--errors_json" in module.setup_parser()._option_string_actions
    with pytest.raises(SystemExit):
        module.setup_parser().error("no file") if hasattr(module, "setup_parser") else module.main()
    fields = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]
    assert fields["message"] and fields["cause"] == "wrong value"

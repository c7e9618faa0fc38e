"""Runs in environments of front ends, which pin other package versions than requirements.txt."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from library.environment import installed
from tests.running import SCRIPTS, Finished
from tests.tiny.bases import BASES

KOHYA_SS = {"transformers": "4.54.1", "diffusers": "0.32.2"}
LORA_SCRIPTS = {"transformers": "4.44.0", "diffusers": "0.25.0"}
REFUSED = {
    "diffusers_train_network": "diffusers 0.32.2",
    **{base.script: base.needs_newer for base in BASES.values() if base.needs_newer},
}


def error_of(
    train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str], script: str
) -> str:
    """Return the error of a run whose base model is missing."""
    monkeypatch.setattr(installed, "version_of", versions.get)
    done = train(
        ["--pretrained_model_name_or_path", __file__, "--network_module", "networks.lora",
         "--output_dir", "out", "--train_data_dir", str(Path(__file__).parent), "--resolution", "64"],
        script,
    )  # fmt: skip
    assert done.status == 1 and "this is a bug" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_base_models_that_need_newer_packages_are_rejected(
    train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    error = error_of(train, monkeypatch, KOHYA_SS, script)
    assert ("The installed packages cannot train" in error) is (script in REFUSED)
    assert REFUSED.get(script, "") in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_packages_too_old_for_any_base_model_are_named_before_loading(
    train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    error = error_of(train, monkeypatch, LORA_SCRIPTS, script)
    assert "train adapters: transformers 4.44.0 (required: >=4.53); diffusers 0.25.0 (required: >=0.32)." in error
    assert 'Run python3 -m pip install -U "transformers>=4.53" "diffusers>=0.32"' in error

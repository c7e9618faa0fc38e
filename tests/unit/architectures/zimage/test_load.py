"""Z-Image models load alike in every layout; other files are refused with what they are."""

import pytest

from library.architectures.zimage.assembly import build
from library.architectures.zimage.options import ZImageOptions
from tests.tiny.zimage import build_tiny_zimage
from zimage_train_network import setup_parser


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_zimage(tmp_path_factory.mktemp("zimage"), 3)


def options_of(arguments: list[str]) -> ZImageOptions:
    return ZImageOptions.from_args(setup_parser().parse_args(arguments))


# Recognising Turbo


def test_turbo_without_a_training_adapter_is_warned_about_once(
    tiny: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    turbo, base = (build(options_of([*tiny, "--model_version", version])) for version in ("turbo", "base"))
    assert caplog.text.count("is Z-Image Turbo, which is distilled") == 1
    assert (turbo.preview.defaults.num_steps, turbo.preview.defaults.scale) == (8, 1.0)
    assert (base.preview.defaults.num_steps, base.preview.defaults.scale) == (50, 5.0)
    caplog.clear()
    build(options_of([*tiny, "--model_version", "turbo", "--training_adapter", "adapter.safetensors"]))
    assert "distilled" not in caplog.text

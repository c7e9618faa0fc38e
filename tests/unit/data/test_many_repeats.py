"""The length of an epoch is limited, because its whole order is built at once."""

import logging
from pathlib import Path

import pytest

from library.base.errors import UserError
from library.data.plan import samples
from tests.unit.data.builders import options_of, plan_of, write_folder


@pytest.mark.parametrize("has_regularisation", [False, True])
def test_an_epoch_that_is_too_long_is_refused_before_it_is_ordered(tmp_path: Path, has_regularisation: bool) -> None:
    write_folder(tmp_path / "data/1000000000_cat", 2)
    write_folder(tmp_path / "reg/1_cat", 1)
    reg = ["--reg_data_dir", str(tmp_path / "reg")] if has_regularisation else []
    with pytest.raises(UserError, match="num_repeats: an epoch would have 2000000000 samples, more than 10000000"):
        plan_of(options_of("--resolution 64 --train_data_dir", str(tmp_path / "data"), *reg))


def test_a_long_epoch_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(samples, "MANY_DRAWS", 100)
    write_folder(tmp_path / "data/60_cat", 2)
    with caplog.at_level(logging.WARNING):
        assert plan_of(options_of("--resolution 64 --train_data_dir", str(tmp_path / "data"))).num_batches == 120
    assert "an epoch has 120 samples; ordering them before it starts" in caplog.text

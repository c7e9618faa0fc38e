"""The digest by which a finished run is recognised."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from library.options.base import Options, group, option
from library.options.train import TrainOptions
from library.training.saving.finished import digest_run

DATA: Any = SimpleNamespace(identity={"images": "abc"})


@dataclass(frozen=True)
class LaterOptions(Options):
    """What a later release adds."""

    something_new: float = option(0.5, help="Has an effect.")


@dataclass(frozen=True)
class LaterTrainOptions(TrainOptions):
    later: LaterOptions = group(LaterOptions)


def test_a_release_with_one_more_option_recognises_the_runs_of_this_one() -> None:
    assert digest_run(LaterTrainOptions(), DATA, 1) == digest_run(TrainOptions(), DATA, 1)
    used = LaterTrainOptions(later=LaterOptions(something_new=0.25))
    assert digest_run(used, DATA, 1) != digest_run(TrainOptions(), DATA, 1)


def test_options_seed_and_data_change_the_digest() -> None:
    options = TrainOptions()
    other = replace(options, optimizer=replace(options.optimizer, learning_rate=3e-5))
    elsewhere = replace(options, saving=replace(options.saving, output_name="other"))
    digest = digest_run(options, DATA, 1)
    assert digest_run(elsewhere, DATA, 1) == digest
    changed = [
        digest_run(other, DATA, 1),
        digest_run(options, DATA, 2),
        digest_run(options, SimpleNamespace(identity={"images": "abd"}), 1),
    ]
    assert digest not in changed and len(set(changed)) == 3

"""Adapters of finished runs: which file is the one that a run would give."""

import json
from hashlib import blake2b

from library.base.errors import UserError
from library.checkpoints.headers import holds_safetensors, read_metadata
from library.checkpoints.overwriting import judge
from library.data.training_data import TrainingData
from library.options.train import TrainOptions
from library.training.saving.names import Names
from library.training.saving.resume import AlreadyComplete, record_options

DIGEST = "ss_run_digest"


def digest_run(options: TrainOptions, data: TrainingData, seed: int) -> str:
    """Return a digest of all that determines the trained weights: options, length, seed and data.

    Options at their defaults are left out, so a release with more options makes the same digest.
    """
    recorded = record_options(options)
    values = {
        name: recorded[name]
        for name, declared in type(options).declarations().items()
        if declared.affects_training and not declared.kept_in_state and declared.ignored is None
        if recorded[name] != declared.default
    }
    text = json.dumps([values, seed, dict(data.identity)], sort_keys=True, default=str)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def check_unfinished(names: Names, digest: str) -> None:
    """Raise AlreadyComplete if the adapter of the run with this digest is there, and UserError for another file of its
    name."""
    path = names.of_end()
    if not path.exists():
        return
    is_ours = judge(path, names.adapter_kind) == "ours"
    found = read_metadata(path).get(DIGEST) if is_ours and holds_safetensors(path) else None
    if found == digest:
        raise AlreadyComplete(f"{path} is finished: it is what this run gives")
    what = "was trained with other options, steps or images" if found else "does not say which run has trained it"
    raise UserError(f"{path} is there, and {what}", "move it away, or use another --output_name")

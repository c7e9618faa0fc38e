"""What is said to who starts a script of sd-scripts that trains something else than adapters.

Their files stand beside the scripts that are here: a command that names one would else end with "No such file or
directory" and no way out.
"""

import sys
from pathlib import Path

OWN = "train_network.py"
ELSEWHERE = "use sd-scripts for that"


def sentence_for(script: str) -> str:
    """What the script trains, and what does its work here."""
    model, is_whole, _ = script.partition("train.py")
    if is_whole or script in ("train_db.py", "fine_tune.py"):
        own = f"{model}{OWN}" if is_whole else OWN
        return (
            f"trains every weight of a model, this suite adapters: use {own}, whose --network_module networks.lokr "
            f"with --network_args full_matrix=True comes nearest to it, and tools/merge_lora.py; or {ELSEWHERE}"
        )
    if "textual_inversion" in script:
        return (
            f"trains a word of the text encoder (textual inversion), which is not here: {ELSEWHERE}, or train an "
            "adapter with the script of the base model"
        )
    return f"trains a ControlNet, which is not here: {ELSEWHERE}"


def main(path: str) -> int:
    """Say it, and return the exit status; `path` is the file that was started."""
    script = Path(path).name
    print(f"error: {script} {sentence_for(script)}", file=sys.stderr)
    return 1

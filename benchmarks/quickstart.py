"""Time the README's quickstart training with the thread settings that it chooses, against fixed ones.

    python -m benchmarks quickstart
    python -m benchmarks quickstart --busy_cores 1

Each round trains `--steps` steps with every setting in turn, so that all settings meet the same machine state; the
figure is the median time of a step. `--busy_cores N` keeps N cores busy with another program. Run it on an otherwise
idle machine: without busy cores, "chosen" should stay within 1.1 times "spinning", and with busy cores within 1.1 times
"sleeping".
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.runner import measurement
from library.base.command_parser import make_parser
from tools.start import ROOT, num_threads

CONFIG = "configs/quickstart/train.toml"  # the same training without previews

SETTINGS = {"chosen": {}, "spinning": {"OMP_WAIT_POLICY": "ACTIVE"}, "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"}}
SET_BY_SCRIPTS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
LOAD_AVERAGE_S = 45  # seconds until one busy core raises the one-minute load average above 0.5


def time_steps(setting: dict[str, str], num_steps: int) -> list[float]:
    """Train and return the seconds between the ends of consecutive steps."""
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder, "events.jsonl")
        command = [sys.executable, "train_network.py", "--config_file", CONFIG]
        command += ["--output_dir", folder, "--log_events", str(events), "--max_train_steps", str(num_steps)]
        inherited = {name: value for name, value in os.environ.items() if name not in SET_BY_SCRIPTS}
        environment = {**inherited, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", **setting}
        environment["OMP_NUM_THREADS"] = str(num_threads())
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        lines = map(json.loads, events.read_text().splitlines())
        times = [event["time"] for event in lines if event["event"] == "step"]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy_cores", type=int, default=0, help="cores that another program keeps busy")
    return parser


def compare(args: argparse.Namespace) -> None:
    """Print the median step time of each setting, and its ratio to the fastest."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy_cores)]
    try:
        if programs:
            time.sleep(LOAD_AVERAGE_S)
        seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(args.rounds):
            for name, setting in SETTINGS.items():
                seconds[name] += time_steps(setting, args.steps)
    finally:
        for program in programs:
            program.kill()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:10} {median:.3f} s per step, {median / min(medians.values()):.2f} x the fastest")


main = measurement(setup_parser, compare)

"""Check whether this machine can train: Python, torch, GPU, packages, memory, disk, and one matrix product per number
format. Each line is a finding; problems come with a fix. Attach the output to a bug report.

Nothing is changed, and only versions, settings and sizes are read: no tokens, none of your files.
"""

import argparse
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

NEEDS_PACKAGES = False  # read by library/environment/requirements.py
ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(ROOT))

from library.base.command_parser import make_parser  # noqa: E402
from library.base.errors import UserError  # noqa: E402
from library.base.terminal import print_line  # noqa: E402
from library.environment.installed import (  # noqa: E402
    GET_TORCH,
    architecture_of,
    explain_missing_kernels,
    explain_unused_gpu,
    find_lack,
    install_command,
    list_nvidia_gpus,
)
from library.environment.packages import version_of  # noqa: E402
from library.environment.requirements import package_of, python_problem, suggest_python  # noqa: E402
from library.environment.torch_builds import list_compiler_needs  # noqa: E402
from library.front_ends.journal import Place, compare_with_journal, read_journal  # noqa: E402

GIB = 2**30
LEAST_FREE_GIB = 8  # main memory, through which checkpoints are loaded
LEAST_DISK_GIB = 10  # for the caches, states and saved files of one training run
LEAST_SHARED_GIB = 1  # /dev/shm: containers get 64 MB by default
SIDE = 256  # rows and columns of the multiplied matrices
PINNED_MIB = 256
SECONDS = 120  # timeout of a separate process
OPTIONAL = ("xformers", "triton", "lycoris-lora", "wandb", "prodigyopt", "lion-pytorch", "dadaptation", "schedulefree")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
    "HF_HOME", "HF_HUB_OFFLINE", "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip
# Relative error (Frobenius norm) against the float64 product: three times the format's own rounding error on random
# numbers.
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.2e-2, "float8_e4m3fn": 0.12}


@dataclass(frozen=True)
class Line:
    """One finding: subject, result, and a fix for a problem or a remark."""

    what: str
    found: str
    fix: str = ""
    is_wrong: bool = False

    def __str__(self) -> str:
        mark = "WRONG" if self.is_wrong else "note" if self.fix else "ok"
        text = f"{mark:<6}{self.what:<26}{self.found}"
        return f"{text}\n{'':<8}-> {self.fix}" if self.fix else text


def python_lines() -> Iterator[Line]:
    """Report the interpreter, the operating system, and the revision of this suite."""
    version = f"{platform.python_version()}, {8 * struct.calcsize('P')} bit, {hide_user_name(sys.executable)}"
    problem = python_problem(sys.version_info[:2])
    fix = f"{problem}; {suggest_python()}" if problem else ""
    yield Line("Python", version, fix, bool(problem))
    yield Line("system", platform.platform())
    yield suite_line(Place(ROOT))


def suite_line(place: Place) -> Line:
    """Report the revision of this suite; inside a front end, whether its files are as they were installed."""
    try:
        journal = read_journal(place) if place.journal.exists() else None
    except UserError as error:
        return Line("suite", "its files cannot be checked", hide_user_name(str(error)), True)
    if journal is None:
        return Line("suite", revision())
    front_end = f"{journal.version} in {hide_user_name(str(place.folder))}"
    problem = str(compare_with_journal(place, journal))
    if not problem:
        return Line("suite", f"{front_end}, as installed")
    fix = "`python3 tools/front_end.py` with the front end's folder, in the suite's own folder, installs it again"
    return Line("suite", f"{front_end}, {problem}", fix, True)


def revision() -> str:
    """Return the current commit and the number of files changed since; outside git, the folder."""
    git = ["git", "-C", str(ROOT)]
    commit = output([*git, "log", "-1", "--format=%h of %cs"])
    if commit is None:
        return f"{hide_user_name(str(ROOT))}, not under git"
    changed = len((output([*git, "status", "-s", "-uno"]) or "").splitlines())
    return commit.strip() + (f", {changed} files changed since" if changed else "")


def package_lines(requirements: Path = ROOT / "requirements.txt") -> Iterator[Line]:
    """Compare the installed packages with requirements.txt, then list the optional ones."""
    yield from filter(None, map(requirement_line, requirements.read_text(encoding="utf-8").splitlines()))
    installed = [f"{name} {version}" for name in OPTIONAL if (version := version_of(name))]
    yield Line("optional packages", ", ".join(installed) or "none")


def requirement_line(text: str) -> Line | None:
    """Check the package of one requirements line; return None if the line does not apply to this Python."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # packaging comes with pip and transformers
        name = package_of(text)
        return None if name is None else Line(name, version_of(name) or "missing", "", version_of(name) is None)
    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    lack = find_lack(text)
    if lack is not None:
        return Line(lack.package, str(lack), install_command([lack.package + lack.needed]), True)
    return Line(requirement.name, version_of(requirement.name) or "")


def gpu_lines(torch: Any, gpus: Sequence[str]) -> Iterator[Line]:
    """Compare torch's build with the GPUs that NVIDIA's driver lists."""
    backends = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    build = next((f"{name} {version}" for name, version in backends.items() if version), "CPU")
    yield Line("torch build", f"{torch.__version__}, {build}")
    for gpu in gpus:
        yield Line("driver's GPU", gpu)
    if not torch.cuda.is_available():
        if fix := explain_unused_gpu(torch, gpus):
            yield Line("GPU", "present, but torch cannot use it", fix, True)
        elif getattr(torch.backends, "mps", None) and torch.backends.mps.is_available():
            yield Line("GPU", "Apple's, through MPS")
        else:
            slow = "fine for experiments, far too slow for full-size models"
            yield Line("GPU", "none; training runs on the CPU", slow)
        return
    for number in range(torch.cuda.device_count()):
        yield gpu_line(torch, number)


def gpu_line(torch: Any, number: int) -> Line:
    """Report one GPU that torch sees: free memory, and whether this build of torch has kernels for it."""
    free, total = torch.cuda.mem_get_info(number)
    free_text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    name = f"{torch.cuda.get_device_name(number)}, {architecture_of(torch, number)}, {free_text}"
    subject = f"GPU {number}"
    if reason := explain_missing_kernels(torch, number):
        return Line(subject, name, reason, True)
    if free < 0.8 * total:
        return Line(subject, name, "other programs use its memory: list them with `nvidia-smi` and close them")
    return Line(subject, name)


def product_lines(torch: Any, device: Any) -> Iterator[Line]:
    """Compare one matrix product in each number format with float64."""
    generator = torch.Generator().manual_seed(20)
    a, b = (torch.randn(SIDE, SIDE, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()

    def plain(name: str) -> Any:
        dtype = getattr(torch, name)
        return a.to(device, dtype) @ b.to(device, dtype)

    def fp8() -> Any:
        scale, dtype = torch.ones((), device=device), torch.float8_e4m3fn
        # The kernel takes the second matrix in column-major order only.
        columns = b.t().contiguous().to(device, dtype).t()
        return torch._scaled_mm(a.to(device, dtype), columns, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)

    for name, bound in BOUNDS.items():
        multiply = fp8 if name.startswith("float8") else partial(plain, name)
        yield product_line(f"product in {name}", multiply, exact, bound)
    codes = [(matrix * 40).round().clamp(-127, 127).to(torch.int8) for matrix in (a, b)]
    # Integers are summed exactly, so no difference is allowed.
    exact_sums = codes[0].double() @ codes[1].double()
    yield product_line("product in int8", lambda: torch._int_mm(*(m.to(device) for m in codes)), exact_sums, 0.0)


def fused_line(device: Any) -> Line:
    """Compile an operation as training does, and report what that took, or what is missing."""
    from library.memory.fused_kernels import find_compiler_fault

    began, subject = time.perf_counter(), "fused operations"
    reason = find_compiler_fault(device)
    if reason is None:
        return Line(subject, f"compiled in {time.perf_counter() - began:.1f} s")
    needs = list_compiler_needs()
    fix = f": install {' and '.join(needs)}" if needs else ", see docs/windows.md" if sys.platform == "win32" else ""
    return Line(subject, reason, f"norms, gates and activations are slower and take more memory{fix}")


def product_line(subject: str, multiply: Callable[[], Any], exact: Any, bound: float) -> Line:
    """Report the relative error of a product; an unsupported format is a remark, not a problem."""
    try:
        relative_error = ((multiply().cpu().double() - exact).norm() / exact.norm()).item()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return Line(
            subject, "cannot be computed here", f"options that require it end with an error ({get_first_line(error)})"
        )
    result = f"off by {relative_error:.1e}"
    if not relative_error <= bound:
        fix = f"more than {bound:.0e}: the GPU, its driver or its clock is unreliable; try another driver"
        return Line(subject, result, fix, True)
    return Line(subject, result)


def memory_lines(torch: Any | None) -> Iterator[Line]:
    """Report main memory, whether it can be pinned, the shared memory of worker processes, and the processor."""
    import psutil

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    summary = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free, {swap.total / GIB:.1f} GiB swap"
    warning = f"less than {LEAST_FREE_GIB} GiB: close programs, or training may end when the system runs out"
    yield Line("main memory", summary, warning if memory.available < LEAST_FREE_GIB * GIB else "")
    if torch is not None and torch.cuda.is_available():
        yield check_pinning(torch)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / GIB
        hint = "workers and shared weights need more: start the container with --shm-size=8g or --ipc=host"
        yield Line("/dev/shm", f"{free:.1f} GiB free", hint if free < LEAST_SHARED_GIB else "")
    yield Line("processor", f"{os.cpu_count()} threads, {psutil.cpu_count(logical=False)} cores")


def check_pinning(torch: Any) -> Line:
    """Report whether main memory can be pinned, which fast copies of offloaded blocks need."""
    try:
        torch.empty(PINNED_MIB * 2**20, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        fix = f"offloaded blocks are copied through small buffers, which is slower ({get_first_line(error)})"
        return Line("pinned memory", f"{PINNED_MIB} MiB refused", fix)
    limit = "; Windows allows about half of main memory" if sys.platform == "win32" else ""
    return Line("pinned memory", f"{PINNED_MIB} MiB allocated{limit}")


def disk_lines(folders: Mapping[str, Path]) -> Iterator[Line]:
    """Report free disk space where files are written."""
    for subject, folder in folders.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / GIB
        hint = f"less than {LEAST_DISK_GIB} GiB: caches, states and files of one training need about this much"
        yield Line(
            subject, f"{free:.0f} GiB free at {hide_user_name(str(folder))}", hint if free < LEAST_DISK_GIB else ""
        )


def setting_lines() -> Iterator[Line]:
    """Report environment variables that affect training, and accelerate's settings."""
    for name in VARIABLES:
        if name in os.environ:
            yield Line(name, hide_user_name(os.environ[name]))
    path = accelerate_config()
    if path.is_file():
        settings = [
            line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if describes_training(line)
        ]
        yield Line("accelerate's settings", f"{hide_user_name(str(path))}: {'; '.join(settings)}")
    else:
        yield Line("accelerate's settings", "none; the command line decides")


def accelerate_config() -> Path:
    """Return the path of `accelerate launch`'s settings file."""
    # As in accelerate/commands/config/config_args.py, which is not imported because it loads torch.
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "accelerate" / "default_config.yaml"


def describes_training(line: str) -> bool:
    """Return True if a line of accelerate's settings describes processes or precision, rather than other machines."""
    prefixes = ("mixed_precision", "distributed_type", "num_processes", "num_machines", "dynamo_backend", "use_cpu")
    return line.strip().startswith(prefixes)


# bitsandbytes keeps states of fewer than 4,096 values in 32 bits, so the weight has more. The first step of Adam moves
# every value by the learning rate.
EIGHT_BITS = """
import torch, bitsandbytes
from bitsandbytes.optim import AdamW8bit
weight = torch.nn.Parameter(torch.ones(8192, device={device!r}))
weight.grad = torch.ones_like(weight)
AdamW8bit([weight], lr=0.1).step()
print("moved" if abs(weight.mean().item() - 0.9) < 0.01 else f"wrong: {{weight.mean().item()}}")
"""


def eight_bit_line(device: str) -> Line:
    """Report one step of an 8-bit optimizer, taken in a separate process because a broken library may crash it."""
    if version_of("bitsandbytes") is None:
        return Line("8-bit optimizer", "bitsandbytes is missing", "only *8bit optimizers and nf4 require it")
    command = [sys.executable, "-c", EIGHT_BITS.format(device=device)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Line("8-bit optimizer", f"no answer in {SECONDS} s", "reinstall bitsandbytes", True)
    if process.stdout.strip().endswith("moved"):
        return Line("8-bit optimizer", "works")
    last_line = (
        process.stdout.strip() or process.stderr.strip() or f"ended with status {process.returncode}"
    ).splitlines()[-1]
    fix = "python3 -m pip install -U bitsandbytes; until it works use --optimizer_type AdamW and no nf4"
    return Line("8-bit optimizer", f"fails: {last_line}", fix, True)


def output(command: Sequence[str]) -> str | None:
    """Return a program's standard output; None if the program is missing or fails."""
    try:
        process = subprocess.run(list(command), capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout if process.returncode == 0 else None


def hide_user_name(path: str) -> str:
    """Return a path without the user's name, because the output is shared with others."""
    home = str(Path.home())
    return f"~{path[len(home) :]}" if home != "/" and path.startswith(home) else path


def get_first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def iterate_lines(folder: Path) -> Iterator[Line]:
    """Yield every finding, the slow ones last. `folder` is the output folder of training runs."""
    yield from python_lines()
    yield from package_lines()
    torch: Any = None
    try:
        import torch
    except Exception as error:  # a broken installation can raise anything; the other checks still run
        yield Line("torch", f"cannot be imported: {get_first_line(error)}", GET_TORCH, True)
    if torch is not None:
        yield from gpu_lines(torch, list_nvidia_gpus())
    if version_of("psutil") is not None:
        yield from memory_lines(torch)
    yield from disk_lines({"disk": folder, "temporary files": Path(tempfile.gettempdir())})
    yield from setting_lines()
    if torch is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield from product_lines(torch, torch.device(device))
        if torch.cuda.is_available():
            yield fused_line(torch.device("cuda", 0))
        yield eight_bit_line(device)


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    help_text = "where trainings write (default: this folder)"
    parser.add_argument("--output_dir", type=Path, default=Path.cwd(), help=help_text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings. Return 0 if there is no problem, else 1."""
    args = setup_parser().parse_args(argv)
    problems = []
    for line in iterate_lines(args.output_dir.resolve()):
        print_line(str(line))
        if line.is_wrong:
            problems.append(line.what)
    print_line(f"\n{len(problems)} wrong: {', '.join(problems)}" if problems else "\nNothing is wrong.")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

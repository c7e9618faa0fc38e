"""--cuda_allow_tf32 and --cuda_cudnn_benchmark configure torch for the duration of the run."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from library.base.determinism import deterministic
from library.options.machine.kernels import KernelOptions
from library.options.no_effect import find_unused
from library.options.train import TrainOptions
from library.training.command_line import training
from library.training.models.cuda_kernels import cuda_kernels
from tests.running import Finished


def settings() -> tuple[bool, bool, bool]:
    """Return the settings of TF32 matmul, TF32 convolution and cuDNN benchmarking."""
    backends = torch.backends
    return (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark)


def set_all(values: tuple[bool, bool, bool]) -> None:
    backends = torch.backends
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark = values


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Use full precision; torch's default allows TF32 convolutions."""
    before = settings()
    set_all((False, False, False))
    yield
    set_all(before)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(
    ("options", "inside"),
    [
        (KernelOptions(), (False, False, False)),
        (KernelOptions(cuda_allow_tf32=True), (True, True, False)),
        (KernelOptions(cuda_cudnn_benchmark=True), (False, False, True)),
    ],
)
def test_torch_is_configured_inside_the_context_and_restored_after_an_error(
    options: KernelOptions, inside: tuple[bool, bool, bool]
) -> None:
    with pytest.raises(ZeroDivisionError), cuda_kernels(options):
        assert settings() == inside
        raise ZeroDivisionError
    assert settings() == (False, False, False)


@pytest.mark.usefixtures("full_precision")
def test_deterministic_overrides_cudnn_benchmarking_and_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with cuda_kernels(KernelOptions(cuda_allow_tf32=True, cuda_cudnn_benchmark=True)), deterministic(True):
        assert settings() == (True, True, False)
    both = TrainOptions().with_values({"deterministic": True, "cuda_cudnn_benchmark": True})
    assert "--cuda_cudnn_benchmark has no effect with --deterministic" in [*find_unused(both, {})]


def test_a_machine_without_a_gpu_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING), cuda_kernels(KernelOptions()):
        assert not caplog.messages
    with caplog.at_level(logging.WARNING), cuda_kernels(KernelOptions(cuda_allow_tf32=True)):
        assert caplog.messages == ["--cuda_allow_tf32: no effect, as torch finds no CUDA GPU"]


@pytest.mark.slow
@pytest.mark.usefixtures("full_precision")
def test_a_run_uses_the_settings(
    train: Callable[..., Finished], base_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_seen, real = [], training.train

    def watched(*arguments: object) -> None:
        settings_seen.append(settings())
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train", watched)
    words = ["--cuda_allow_tf32", "--cuda_cudnn_benchmark", "--max_train_steps", "1"]
    assert train([*base_arguments, *words]).status == 0
    assert settings_seen == [(True, True, True)] and settings() == (False, False, False)

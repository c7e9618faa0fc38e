"""Every optimizer by its name, Muon, and stochastic rounding."""

import logging
import re
import sys
import types
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from library.base.errors import UserError
from library.options.keyword_args import read_keyword_args
from library.options.no_effect import find_unused
from library.options.training.optimizer import OptimizerOptions
from library.training.optimization.muon import MuonWithAdamW, is_matrix
from library.training.optimization.optimizers import (
    KNOWN,
    BuiltOptimizer,
    build_optimizer,
    can_fuse,
    can_skip_by_flag,
    effective_rates,
)
from library.training.optimization.rounding import round_to_bf16, stochastic_rounding
from tests.hiding import hide

# A rate at which each optimizer makes progress within 60 steps of the small problem below.
RATES = {
    "SGDNesterov": 0.02, "SGDNesterov8bit": 0.02, "SGDScheduleFree": 0.5, "Prodigy": 1.0, "DAdaptation": 1.0,
    "DAdaptAdamPreprint": 1.0, "DAdaptAdaGrad": 1.0, "DAdaptAdam": 1.0, "DAdaptAdan": 1.0, "DAdaptAdanIP": 1.0,
    "DAdaptLion": 1.0, "DAdaptSGD": 1.0,
}  # fmt: skip


def tensors(seed: int) -> tuple[nn.Parameter, nn.Parameter, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = normal(96, 64)
    targets = inputs @ normal(64, 80) * 0.1 + 0.5
    return nn.Parameter(normal(64, 80) * 0.1), nn.Parameter(normal(80) * 0.1), inputs, targets


def train(options: OptimizerOptions, steps: int, seed: int) -> tuple[BuiltOptimizer, list[float]]:
    """Train a linear regression with two groups; return the loss before each step and after the last one."""
    weight, bias, inputs, targets = tensors(seed)
    rate = options.learning_rate
    built = build_optimizer(options, [{"params": [weight], "lr": rate}, {"params": [bias], "lr": rate}])
    losses = []
    for _ in range(steps):
        loss = (inputs @ weight + bias - targets).square().mean()
        losses.append(loss.item())
        loss.backward()
        built.optimizer.step()
        built.optimizer.zero_grad(set_to_none=True)
    built.eval()
    return built, [*losses, (inputs @ weight + bias - targets).square().mean().item()]


@pytest.mark.parametrize("name", KNOWN)
def test_each_name_in_any_case_lowers_the_loss(name: str) -> None:
    args = {"Adafactor": ["relative_step=False", "scale_parameter=False"], "DAdaptAdaGrad": ["d0=1e-2"]}.get(name)
    for spelling in (name, name.lower()):
        options = OptimizerOptions(spelling, learning_rate=RATES.get(name, 0.02), optimizer_args=args)
        _, losses = train(options, steps=60, seed=11)
        assert losses[-1] < 0.7 * losses[0], (spelling, losses[0], losses[-1])


def advance(built: BuiltOptimizer, weight: Tensor, bias: Tensor, inputs: Tensor, targets: Tensor, steps: int) -> None:
    for _ in range(steps):
        (inputs @ weight + bias - targets).square().mean().backward()
        built.optimizer.step()
        built.optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", KNOWN)
def test_each_optimizer_resumes_from_its_saved_state_bit_for_bit(name: str) -> None:
    options = OptimizerOptions(name, learning_rate=RATES.get(name, 0.02))
    weight, bias, inputs, targets = tensors(seed=31)
    built = build_optimizer(options, [{"params": [weight]}, {"params": [bias]}])
    advance(built, weight, bias, inputs, targets, 4)
    file = BytesIO()
    torch.save(built.optimizer.state_dict(), file)
    resumed = [nn.Parameter(p.detach().clone()) for p in (weight, bias)]
    advance(built, weight, bias, inputs, targets, 4)

    resumed_built = build_optimizer(options, [{"params": [p]} for p in resumed])
    file.seek(0)
    resumed_built.optimizer.load_state_dict(torch.load(file, weights_only=True))
    advance(resumed_built, *resumed, inputs, targets, 4)
    assert torch.equal(resumed[0], weight)
    assert torch.equal(resumed[1], bias)


def test_the_fused_step_works_with_a_gradient_scaler() -> None:
    parameter = nn.Parameter(torch.linspace(-1, 1, 20))
    built = build_optimizer(OptimizerOptions(learning_rate=0.125), [{"params": [parameter]}])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
    for factor, moves in ((3.0, True), (torch.inf, False)):
        before = parameter.detach().clone()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.unscale_(built.optimizer)
        norm = torch.nn.utils.clip_grad_norm_([parameter], 1e9)
        assert norm.item() == pytest.approx(factor * 20**0.5)
        scaler.step(built.optimizer)
        scaler.update()
        built.optimizer.zero_grad()
        assert torch.equal(before, parameter) is not moves


def test_adamw_is_the_default_fused_and_steps_like_the_paper() -> None:
    weight, bias, inputs, targets = tensors(seed=12)
    built = build_optimizer(
        OptimizerOptions(learning_rate=0.01, optimizer_args=["weight_decay=0.1", "betas=0.8,0.9"]),
        [{"params": [weight], "lr": 0.003}, {"params": [bias]}],
    )
    assert built.name == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.8, 0.9))"
    assert [group["lr"] for group in built.optimizer.param_groups] == [0.003, 0.01]
    assert built.optimizer.param_groups[0]["fused"] is True

    expected = weight.detach().double()
    m = v = torch.zeros_like(expected)
    for step in range(1, 6):
        (inputs @ weight + bias - targets).square().mean().backward()
        assert weight.grad is not None
        g = weight.grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        expected = expected * (1 - 0.003 * 0.1)
        expected = expected - 0.003 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        built.optimizer.step()
        built.optimizer.zero_grad()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("device", "fuses"), [("cuda", True), ("xpu", True), ("mps", True), ("meta", False)])
def test_the_step_is_fused_on_every_device_for_which_torch_has_a_kernel(device: str, fuses: bool) -> None:
    on_device: Any = SimpleNamespace(is_floating_point=lambda: True, device=torch.device(device))
    assert can_fuse([{"params": [on_device]}], {}) is fuses
    assert device == "meta" or device in _get_fused_kernels_supported_devices()
    assert can_skip_by_flag([on_device]) is (device != "mps"), "the kernels for MPS ignore found_inf"


@pytest.mark.parametrize("argument", ["fused=False", "foreach=True"])
def test_an_explicit_implementation_is_not_replaced_by_the_fused_one(argument: str) -> None:
    built, losses = train(OptimizerOptions("adamw", learning_rate=0.02, optimizer_args=[argument]), steps=5, seed=13)
    assert not built.optimizer.param_groups[0]["fused"]
    assert losses[-1] < losses[0]


def test_the_fused_step_accepts_half_precision_weights() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        parameter = nn.Parameter(torch.linspace(-1, 1, 33).to(dtype))
        built = build_optimizer(OptimizerOptions(learning_rate=0.125), [{"params": [parameter]}])
        parameter.grad = torch.ones_like(parameter)
        before = parameter.detach().clone()
        built.optimizer.step()
        assert ((before - parameter.detach()) > 0.1).all()


def test_optimizer_names_set_their_momentum_unless_it_is_given() -> None:
    group = train(OptimizerOptions("sgdnesterov", learning_rate=0.01), 1, 14)[0].optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    built, _ = train(OptimizerOptions("SGDNesterov8bit", learning_rate=0.01, optimizer_args=["momentum=0.5"]), 1, 15)
    assert built.name == "bitsandbytes.optim.sgd.SGD8bit(momentum=0.5,nesterov=True)"
    assert built.optimizer.param_groups[0]["betas"][0] == 0.5, "where bitsandbytes keeps the momentum"


@pytest.mark.parametrize(
    ("options", "path"),
    [
        (OptimizerOptions(use_8bit_adam=True), "bitsandbytes.optim.adamw.AdamW8bit"),
        (OptimizerOptions(use_lion_optimizer=True), "lion_pytorch.lion_pytorch.Lion"),
        (OptimizerOptions("Adamax"), "torch.optim.adamax.Adamax"),
        (OptimizerOptions("bitsandbytes.optim.AdEMAMix8bit"), "bitsandbytes.optim.ademamix.AdEMAMix8bit"),
        (OptimizerOptions("torch.optim.RAdam"), "torch.optim.radam.RAdam"),
    ],
)
def test_older_flags_torch_classes_and_dotted_paths_are_resolved(options: OptimizerOptions, path: str) -> None:
    assert train(options, 1, 16)[0].name == path


def test_8_bit_optimizers_store_8_bit_state() -> None:
    built, _ = train(OptimizerOptions("PagedAdamW8bit", learning_rate=0.01), 2, 17)
    weight = built.optimizer.param_groups[0]["params"][0]
    assert built.optimizer.state[weight]["state1"].dtype == torch.uint8


# --- what goes wrong ------------------------------------------------------------------------------------------------


def refusal_of(**options: Any) -> str:
    with pytest.raises(ValueError) as error:
        train(OptimizerOptions(**options), 1, 18)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("AdamW8bit", "bitsandbytes", "bitsandbytes"),
        ("Lion", "lion_pytorch", "lion-pytorch"),
        ("DAdaptation", "dadaptation", "dadaptation"),
        ("Prodigy", "prodigyopt", "prodigyopt"),
        ("AdamWScheduleFree", "schedulefree", "schedulefree"),
    ],
)
def test_a_missing_library_names_the_package_to_install(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(module, monkeypatch)
    assert (
        refusal_of(optimizer_type=name)
        == f"--optimizer_type {name} needs the package {package}, which is not installed: pip "
        f"install {package}"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("no torch.foo"), r"prodigyopt \d\S* cannot be imported .ImportError: no torch.foo.*--upgrade"),
        (ModuleNotFoundError("No module", name="pytorch_optimizer.x"), r"prodigyopt \d\S* needs .*install pytorch-opt"),
    ],
)
def test_a_library_that_fails_to_import_is_named_with_its_version(
    error: ImportError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        @staticmethod
        def find_spec(fullname: str, path: object = None, target: object = None) -> None:
            if fullname.split(".")[0] == "prodigyopt":
                raise error

    for loaded in [m for m in sys.modules if m.split(".")[0] == "prodigyopt"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [Failing, *sys.meta_path])
    assert re.search(message, refusal_of(optimizer_type="Prodigy"))


def test_an_argument_is_split_at_its_first_equals_sign() -> None:
    assert read_keyword_args(["mode='a=b'", " betas = (0.9, 0.99) ", "flag=True", "x=None"], "--optimizer_args") == {
        "mode": "a=b",
        "betas": (0.9, 0.99),
        "flag": True,
        "x": None,
    }


@pytest.mark.parametrize(("name", "argument"), [("RMSprop", "differentiable=True"), ("DAdaptSGD", "momentum=[[1]]")])
def test_an_argument_on_which_the_first_step_fails_is_refused_at_the_start(name: str, argument: str) -> None:
    weights = [nn.Parameter(torch.ones(3, 5))]
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=rf"--optimizer_type {name} fails with --optimizer_args {argument[:5]}"):
        build_optimizer(OptimizerOptions(optimizer_type=name, optimizer_args=[argument]), [{"params": weights}])
    assert torch.equal(weights[0], torch.ones(3, 5)) and torch.equal(torch.get_rng_state(), before)


# --- optimizers with rates of their own -----------------------------------------------------------------------------


def test_adafactor_sets_its_own_rates_by_default() -> None:
    weight, bias, inputs, targets = tensors(seed=19)
    groups = [{"params": [weight], "lr": 0.5}, {"params": [bias], "lr": 0.25}]
    built = build_optimizer(OptimizerOptions("adafactor", learning_rate=3.0), groups)
    assert built.has_relative_step
    assert built.name == "transformers.optimization.Adafactor(relative_step=True)"
    assert [group["lr"] for group in groups] == [0.5, 0.25], "the caller's groups stay as they are"
    assert [group["lr"] for group in built.optimizer.param_groups] == [None, None]
    before = (inputs @ weight + bias - targets).square().mean()
    before.backward()
    built.optimizer.step()
    assert (inputs @ weight + bias - targets).square().mean() < before


def test_adafactor_with_warmup_init_switches_relative_step_on(caplog: pytest.LogCaptureFixture) -> None:
    built, _ = train(OptimizerOptions("Adafactor", optimizer_args=["warmup_init=True", "relative_step=False"]), 1, 20)
    assert built.has_relative_step
    assert "needs relative_step=True" in caplog.text
    assert "--unet_lr, --text_encoder_lr and the rates and ratios of --network_args have no effect" in caplog.text


def test_adafactor_without_relative_step_uses_the_rates() -> None:
    built, _ = train(OptimizerOptions("AdaFactor", learning_rate=0.01, optimizer_args=["relative_step=False"]), 1, 21)
    assert not built.has_relative_step
    assert built.optimizer.param_groups[1]["lr"] == 0.01


def test_fused_backward_pass_is_for_adafactor() -> None:
    assert "works with --optimizer_type Adafactor only" in refusal_of(fused_backward_pass=True)
    options = OptimizerOptions("Adafactor", fused_backward_pass=True)
    train(options, 1, 22)
    (line,) = find_unused(options, {})
    assert line.startswith("--fused_backward_pass has no effect: ")


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptAdaGrad"])
def test_a_small_rate_is_warned_about_if_the_optimizer_adapts_it(name: str, caplog: pytest.LogCaptureFixture) -> None:
    train(OptimizerOptions(name, learning_rate=1.0), 1, 23)
    assert "meant to be about 1.0" not in caplog.text
    train(OptimizerOptions(name, learning_rate=0.1), 1, 23)
    assert "which is 0.1; use about 1.0" in caplog.text


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptation", "DAdaptAdam", "DAdaptSGD"])
def test_two_different_rates_are_refused_but_a_rate_of_0_freezes_a_part(name: str) -> None:
    weight, bias, _, _ = tensors(seed=24)
    options = OptimizerOptions(name, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"one learning rate for all parts.*give 0\.5, 1\.0"):
        build_optimizer(options, [{"params": [weight], "lr": 0.5}, {"params": [bias], "lr": 1.0}])
    built = build_optimizer(options, [{"params": [weight], "lr": 1.0}, {"params": [bias], "lr": 0.0}])
    weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
    before = bias.detach().clone()
    built.optimizer.step()
    assert torch.equal(bias, before)


@pytest.mark.parametrize("name", ["DAdaptLion", "DAdaptAdaGrad", "DAdaptAdan", "DAdaptAdanIP"])
def test_rate_0_is_refused_if_the_library_would_still_train_the_part(name: str) -> None:
    weight, bias, _, _ = tensors(seed=25)
    with pytest.raises(ValueError, match=r"give 0\.0, 1\.0; use one value everywhere$"):
        build_optimizer(OptimizerOptions(name, learning_rate=1.0), [{"params": [weight], "lr": 0}, {"params": [bias]}])


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptation"])
def test_effective_rates_are_d_times_lr(name: str) -> None:
    built, _ = train(OptimizerOptions(name, learning_rate=0.5), 20, 26)
    groups = built.optimizer.param_groups
    rates = effective_rates(built.optimizer, built.name)
    assert rates == [float(group["d"]) * 0.5 for group in groups]
    assert rates[0] > 1e-6 * 0.5, "d has grown from its start"


def test_other_optimizers_report_no_effective_rate() -> None:
    built, _ = train(OptimizerOptions("AdamW"), 1, 27)
    assert effective_rates(built.optimizer, built.name) is None
    assert effective_rates(built.optimizer, "elsewhere.ProdigyOfAnotherKind(x=1)") is None, "its groups hold no d"


# --- schedule-free --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_schedule_free_weights_differ_between_training_and_saving(name: str) -> None:
    weight, bias, inputs, targets = tensors(seed=28)
    built = build_optimizer(OptimizerOptions(name, learning_rate=0.05), [{"params": [weight, bias]}])
    assert built.is_schedule_free
    for _ in range(12):
        (inputs @ weight + bias - targets).square().mean().backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
    training = weight.detach().clone()
    built.eval()
    averaged = weight.detach().clone()
    assert not torch.allclose(training, averaged)
    built.train()
    torch.testing.assert_close(weight.detach(), training, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_stochastically_rounded_bf16_weights_are_averaged_and_restored_bit_for_bit(name: str) -> None:
    """The averaged weights are the average of the float32 copies, rounded to nearest: y + (z - y) * (1 - 1 / beta)."""
    weight, bias, inputs, targets = tensors(seed=28)
    weight, bias = (nn.Parameter(parameter.detach().bfloat16()) for parameter in (weight, bias))
    options = OptimizerOptions(name, learning_rate=0.05, stochastic_rounding=True)
    built = build_optimizer(options, [{"params": [weight, bias]}])
    for step in range(12):
        (inputs @ weight.float() + bias.float() - targets).square().mean().backward()
        with stochastic_rounding([weight, bias], torch.Generator().manual_seed(step)):
            built.optimizer.step()
    training, memory = weight.detach().clone(), built.optimizer.state[weight]["z"]
    built.eval()
    assert memory.dtype == torch.float32 and weight.dtype == torch.bfloat16
    beta = built.optimizer.param_groups[0].get("betas", [0.9])[0]
    expected = training.float() + (memory - training.float()) * (1 - 1 / beta)
    torch.testing.assert_close(weight.detach(), expected.bfloat16(), rtol=2**-7, atol=0)
    assert not torch.equal(weight, training)
    built.train()
    assert torch.equal(weight, training)


def test_a_third_party_class_is_recognised_as_schedule_free_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class OddScheduleFree(torch.optim.SGD):
        modes: list[str]

        def __init__(self, params: Any, lr: float, **others: Any) -> None:
            self.modes = []
            super().__init__(params, lr, **others)

        def train(self) -> None:
            self.modes.append("train")

        def eval(self) -> None:
            self.modes.append("eval")

    module = types.ModuleType("odd_optimizers")
    module.OddScheduleFree = OddScheduleFree  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odd_optimizers", module)
    built, _ = train(OptimizerOptions("odd_optimizers.OddScheduleFree", optimizer_args=["momentum=0.5"]), 1, 29)
    assert built.is_schedule_free
    assert built.optimizer.modes == ["train", "eval"]  # type: ignore[attr-defined]


def test_train_and_eval_do_not_affect_other_optimizers() -> None:
    built, _ = train(OptimizerOptions("AdamW"), 2, 30)
    weight = built.optimizer.param_groups[0]["params"][0]
    before = weight.detach().clone()
    built.eval()
    built.train()
    assert torch.equal(weight, before)


# Muon for matrices, AdamW for the rest: each weight is updated as by its optimizer alone.

SHAPES = [(8, 5), (6, 4, 3, 3), (1, 7), (), (9,), (4, 12)]


def parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_every_weight_is_updated_as_by_its_optimizer_alone_at_the_rate_of_its_group() -> None:
    combined, alone = parameters(701), parameters(701)
    groups = [{"params": combined[:3], "lr": 0.02}, {"params": combined[3:], "lr": 0.005}]
    built = build_optimizer(OptimizerOptions("muon", optimizer_args=["weight_decay=0.03"]), groups)
    assert len(built.optimizer.param_groups) == 2
    theirs = []
    for number, parameter in enumerate(alone):
        lr = 0.02 if number < 3 else 0.005
        if number in (0, 5):
            theirs.append(torch.optim.Muon([parameter], lr, 0.03, adjust_lr_fn="match_rms_adamw"))
        else:
            theirs.append(torch.optim.AdamW([parameter], lr, weight_decay=0.03))
    generator = torch.Generator().manual_seed(702)
    for step in range(6):
        for actual, expected in zip(combined, alone, strict=True):
            actual.grad = torch.randn(actual.shape, generator=generator)
            expected.grad = actual.grad.clone()
        if step == 3:  # as a schedule does
            for group in (*built.optimizer.param_groups, *(g for optimizer in theirs for g in optimizer.param_groups)):
                group["lr"] *= 0.1
        built.optimizer.step()
        for optimizer in theirs:
            optimizer.step()
    for actual, expected in zip(combined, alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_log_counts_the_weights_of_each_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        MuonWithAdamW([{"params": parameters(703)}])
    assert "Muon moves 2 of the 6 weights, which are matrices; AdamW moves the others" in caplog.text
    assert [is_matrix(p) for p in parameters(703)] == [True, False, False, False, False, True]


def test_only_matrices_or_no_matrices_are_trained() -> None:
    for shapes in ([(3, 4)], [(3,), (2, 2, 1, 1)]):
        weights = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = MuonWithAdamW([{"params": weights}], lr=0.1)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert all((weight < 1).all() for weight in weights)


def test_a_loaded_state_keeps_its_settings() -> None:
    """torch's optimizers keep theirs too. Other --optimizer_args on resume have no effect, as the log says."""
    trained = []
    for weight_decay in (0.5, 0.0):
        weights = parameters(704)
        before, after = (MuonWithAdamW([{"params": weights}], weight_decay=decay) for decay in (0.5, weight_decay))
        after.load_state_dict(before.state_dict())
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        after.step()
        trained.append(weights)
    for kept, other in zip(*trained, strict=True):
        assert torch.equal(kept, other)


# Stochastic rounding is unbiased, and bf16 training progresses where rounding to nearest stalls.


def test_values_are_rounded_to_a_neighbour_and_unchanged_on_average() -> None:
    torch.manual_seed(801)
    values = torch.cat([torch.randn(40), torch.randn(40) * 1e-20, torch.tensor([0.0, -0.0, 1.0, -2.5])])
    generator = torch.Generator().manual_seed(802)
    num_draws = 4_000
    rounded = torch.stack([round_to_bf16(values, generator).double() for _ in range(num_draws)])
    below = torch.minimum(values.abs().view(torch.int32) >> 16 << 16, values.abs().view(torch.int32)).view(
        torch.float32
    )
    spacing = ((below.view(torch.int32) + (1 << 16)).view(torch.float32) - below).double()
    assert ((rounded - values.double()).abs() < spacing).all()
    # The mean of draws between two neighbours errs by at most half a spacing / sqrt(draws): five times that.
    error = (rounded.mean(0) - values.double()).abs()
    assert (error <= 5 * 0.5 * spacing / num_draws**0.5).all()
    exact = values.bfloat16().float() == values
    assert exact.sum() >= 4
    assert torch.equal(rounded[:, exact], values[exact].double().expand(num_draws, -1))


def test_non_finite_values_are_unchanged() -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = round_to_bf16(values, torch.Generator().manual_seed(803))
    assert rounded[:2].tolist() == [float("inf"), -float("inf")]
    assert rounded[2].isnan()


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 12, generator=generator)
    return inputs, inputs @ torch.randn(12, 5, generator=generator), torch.randn(12, 5, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_training_reaches_the_float32_loss_where_plain_bf16_stalls(name: str) -> None:
    """Linear regression in small steps: plain bf16 loses updates below 1/512 of a weight, stochastic rounding does not.

    Losses are of the float32 arithmetic with each run's weights, relative to that at the start.
    """
    inputs, targets, start = problem(804)
    make = {
        "AdamW": lambda weights: torch.optim.AdamW(weights, lr=4e-3, weight_decay=0.0),
        "SGD": lambda weights: torch.optim.SGD(weights, lr=1e-2),
    }[name]
    reached = {}
    for kind in ("float32", "bf16", "rounded"):
        weight = nn.Parameter(start.clone().to(torch.float32 if kind == "float32" else torch.bfloat16))
        optimizer = make([weight])
        for step in range(1000):
            loss = (inputs @ weight.float() - targets).square().mean()
            loss.backward()
            if kind == "rounded":
                with stochastic_rounding([weight], torch.Generator().manual_seed(805_000 + step)):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
        assert weight.dtype == (torch.float32 if kind == "float32" else torch.bfloat16)
        first = float((inputs @ start - targets).square().mean())
        reached[kind] = float((inputs @ weight.detach().float() - targets).square().mean()) / first
    assert reached["float32"] < 0.01
    assert reached["rounded"] == pytest.approx(reached["float32"], abs=0.003)
    assert reached["bf16"] > 10 * reached["rounded"]


def test_the_optimizer_state_is_float32_and_gradients_are_freed() -> None:
    weight, other = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight, other], lr=0.1)
    weight.grad, other.grad = torch.ones(3, dtype=torch.bfloat16), torch.ones(2)
    with stochastic_rounding([weight, other], torch.Generator().manual_seed(806)):
        assert weight.dtype == torch.float32
        optimizer.step()
    assert (weight.dtype, other.dtype) == (torch.bfloat16, torch.float32)
    assert weight.grad is None
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32

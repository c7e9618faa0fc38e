"""The loss of a batch against literal float64 recomputations, and DDPM's against diffusers' scheduler."""

import argparse
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from library.architectures.sd.assembly import build
from library.diffusion.objective import DDPM, build_ddpm
from library.options.train import TrainOptions
from library.protocols import Objective
from library.training.step.conditioning import CaptionMemo
from library.training.step.context import Models, StepContext
from library.training.step.losses import add_noise_to, loss_of
from library.types import Batch, Noised
from networks.core.protocol import AdoptedNetwork
from tests.hiding import lazily

diffusers = lazily("diffusers")


def options_for(folder: Path, **noise_or_loss: Any) -> TrainOptions:
    parser = argparse.ArgumentParser()
    TrainOptions.add_to(parser)
    args = parser.parse_args(["--pretrained_model_name_or_path", str(folder)])
    for name, value in noise_or_loss.items():
        setattr(args, name, value)
    return TrainOptions.from_args(args)


class Multiplier(nn.Module):
    """A network stub that records its multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def set_multiplier(self, value: float) -> None:
        self.values.append(value)


def context_of(options: TrainOptions, seen: list[tuple[Noised, Tensor]]) -> StepContext:
    arch = build(options)
    encoders = arch.load.text_encoders()
    network = Multiplier()

    def predict(denoiser: Any, noised: Noised, conditioning: Any, batch: Batch) -> Tensor:
        prediction_BCHW = arch.predict(denoiser, noised, conditioning, batch)
        if network.values and network.values[-1] == 0.0:
            prediction_BCHW = prediction_BCHW + 0.5  # the prediction of a model without its adapter
        else:
            seen.append((noised, prediction_BCHW))
        return prediction_BCHW

    models = Models(arch.load.denoiser(), encoders, arch.load.vae(), ([], nn.Module()))
    return StepContext(
        arch=replace(arch, predict=predict),
        models=models,
        network=AdoptedNetwork(network),
        seed=3,
        device=torch.device("cpu"),
        autocast=nullcontext,
        trains_text_encoder=False,
        captions=CaptionMemo(lambda captions: arch.text.encode(encoders, arch.text.tokenize(captions))),
        vae_batch_size=options.caching.vae_batch_size,
    )


def batch_of(seed: int, masks: bool = False, **fields: Any) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch = Batch(
        keys=["a.png", "b.png"],
        captions=["a cat", "two dogs"],
        pixels_BCHW=None,
        latents_BCHW=torch.randn(2, 4, 8, 8, generator=generator) * 5,
        conditioning=None,
        loss_weights_B=torch.tensor([1.0, 0.3]),
        masks_B1HW=torch.rand(2, 1, 64, 64, generator=generator) if masks else None,
        sizes_B6=torch.zeros(2, 6),
        attributes=[{}, {}],
    )
    return replace(batch, **fields)


def abar(timesteps_B: Tensor) -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)[timesteps_B].view(-1, 1, 1, 1)


@pytest.mark.parametrize("velocity", [False, True])
def test_noisy_input_target_masks_and_weights_match_the_recomputation(tiny_sd_folder: Path, velocity: bool) -> None:
    calls: list[tuple[Noised, Tensor]] = []
    run = context_of(options_for(tiny_sd_folder, v_parameterization=velocity), calls)
    batch = batch_of(seed=21, masks=True)
    batch.masks_B1HW[1, :, 16:] = 0  # type: ignore[index]
    loss = loss_of(run, batch, batch_number=4)

    noised, prediction_BCHW = calls[0]
    clean_BCHW = batch.latents_BCHW.double() * 0.18215  # type: ignore[union-attr]
    noise_BCHW, a_B111 = noised.noise_BCHW.double(), abar(noised.timesteps_B)
    torch.testing.assert_close(
        noised.latents_BCHW.double(),
        a_B111.sqrt() * clean_BCHW + (1 - a_B111).sqrt() * noise_BCHW,
        rtol=1e-6,
        atol=1e-6,
    )
    target_BCHW = a_B111.sqrt() * noise_BCHW - (1 - a_B111).sqrt() * clean_BCHW if velocity else noise_BCHW
    masks_B1HW = batch.masks_B1HW.double().view(2, 1, 8, 8, 8, 8).mean((3, 5))  # type: ignore[union-attr]
    error_BCHW = (prediction_BCHW.double() - target_BCHW) ** 2 * masks_B1HW
    expected = (error_BCHW.mean((1, 2, 3)) * torch.tensor([1.0, 0.3], dtype=torch.float64)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)  # float32 sums of 512 squares


def test_pixels_are_encoded_when_latents_are_not_cached(tiny_sd_folder: Path) -> None:
    """Latents are samples of the posterior, mean + std * noise, so their average is the posterior's mean."""
    calls: list[tuple[Noised, Tensor]] = []
    run = context_of(options_for(tiny_sd_folder), calls)
    pixels_BCHW = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    batch = batch_of(seed=22, latents_BCHW=None, pixels_BCHW=pixels_BCHW)
    for number in range(40):
        loss_of(run, batch, number)
    drawn = torch.stack([noised.clean_BCHW for noised, _ in calls])
    posterior = run.models.vae.encode(pixels_BCHW).latent_dist
    standard_error = posterior.std.mean() * 0.18215 / 40**0.5
    assert ((drawn.mean(0) - posterior.mean * 0.18215).abs().mean() < 2 * standard_error).item()
    assert not torch.equal(drawn[0], drawn[1])


def test_random_draws_depend_only_on_the_batch_number(tiny_sd_folder: Path) -> None:
    run = context_of(options_for(tiny_sd_folder, noise_offset=0.1, multires_noise_iterations=2), [])
    batch = batch_of(seed=23)
    first, other = loss_of(run, batch, 7), loss_of(run, batch, 8)
    torch.manual_seed(99)
    assert loss_of(run, batch, 7).item() == first.item() != other.item()


def test_marked_samples_are_trained_toward_the_base_models_output(tiny_sd_folder: Path) -> None:
    calls: list[tuple[Noised, Tensor]] = []
    run = context_of(options_for(tiny_sd_folder), calls)
    attributes = [{"diff_output_preservation": True}, {}]
    loss = loss_of(run, batch_of(seed=24, attributes=attributes), 0)
    noised, prediction_BCHW = calls[0]
    prior_loss = 0.5**2  # the base model predicts 0.5 more everywhere
    learned = ((prediction_BCHW[1] - noised.noise_BCHW[1]) ** 2).mean() * 0.3
    torch.testing.assert_close(loss, (prior_loss + learned) / 2, rtol=1e-5, atol=0.0)
    assert run.network.module.values == [0.0, 1.0]


def test_preserved_samples_have_a_weight_and_the_noise_levels_of_few_steps(tiny_sd_folder: Path) -> None:
    """Four DDIM steps call the denoiser at 751, 501, 251 and 1; samples without `num_steps` keep their draws."""
    calls: list[tuple[Noised, Tensor]] = []
    run = context_of(options_for(tiny_sd_folder), calls)
    attributes = [{"diff_output_preservation": {"weight": 0.25, "num_steps": 4}}, {}]
    batch, plain = batch_of(seed=24, attributes=attributes), batch_of(seed=24)
    levels = []
    for number in range(40):
        loss = loss_of(run, batch, number)
        noised, prediction_BCHW = calls[-1]
        learned = ((prediction_BCHW[1] - noised.noise_BCHW[1]) ** 2).mean() * 0.3
        torch.testing.assert_close(loss, (0.25 * 0.5**2 + learned) / 2, rtol=1e-5, atol=0.0)
        a = abar(noised.timesteps_B)[0]
        expected = a.sqrt() * noised.clean_BCHW[0].double() + (1 - a).sqrt() * noised.noise_BCHW[0].double()
        torch.testing.assert_close(noised.latents_BCHW[0].double(), expected, rtol=1e-5, atol=1e-5)
        levels.append(int(noised.timesteps_B[0]))
        unmarked = add_noise_to(run, plain, number)
        assert torch.equal(unmarked.latents_BCHW[1], noised.latents_BCHW[1])
    assert set(levels) == {1, 251, 501, 751}


def test_what_masks_leave_out_is_preserved_by_its_share(tiny_sd_folder: Path) -> None:
    """Recomputed in float64; the first sample has a mask of each value, the second none."""
    calls: list[tuple[Noised, Tensor]] = []
    run = context_of(options_for(tiny_sd_folder), calls)
    attributes = [{"diff_output_preservation": {"outside_mask": True, "weight": 0.3}}, {}]
    masks_B1HW = torch.ones(2, 1, 64, 64)
    masks_B1HW[0] = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(3))
    batch = batch_of(seed=24, attributes=attributes, masks_B1HW=masks_B1HW)
    loss = loss_of(run, batch, 0)
    noised, prediction_BCHW = calls[0]
    error_BCHW = (prediction_BCHW.double() - noised.noise_BCHW.double()) ** 2
    cells = 64 // error_BCHW.shape[-1]
    mask_1HW = masks_B1HW[0].double().unfold(1, cells, cells).unfold(2, cells, cells).mean((-1, -2))
    first = (mask_1HW * error_BCHW[0]).mean() + 0.3 * ((1 - mask_1HW) * 0.5**2).expand_as(error_BCHW[0]).mean()
    expected = (first + 0.3 * error_BCHW[1].mean()) / 2  # 0.3 is the second subset's weight
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)


def test_nan_latents_raise_an_error_that_names_the_image(tiny_sd_folder: Path) -> None:
    run = context_of(options_for(tiny_sd_folder), [])
    pixels_BCHW = torch.zeros(2, 3, 64, 64)
    pixels_BCHW[1, 0, 0, 0] = torch.nan
    batch = batch_of(seed=25, latents_BCHW=None, pixels_BCHW=pixels_BCHW)
    assert loss_of(run, batch, 0).isnan(), "the step goes on, and its loss tells"
    with pytest.raises(ValueError, match=r"NaN for b\.png; add --no_half_vae"):
        add_noise_to(run, batch, 0)


# The DDPM objective against a literal float64 recomputation and diffusers' scheduler.
# The recomputation replays the documented order of draws from an equal generator and then uses only float64 and
# separate
# formulas, written per sample.

B, C, H, W = 6, 4, 12, 9


def options_of(**flags: Any) -> TrainOptions:
    options = TrainOptions()
    groups = {}
    for group in ("noise", "loss", "model"):
        values = getattr(options, group)
        flag_values = {name: flags.pop(name) for name in list(flags) if name in vars(values)}
        groups[group] = replace(values, **flag_values)
    assert not flags, flags
    return replace(options, **groups)


def objective_of(options: TrainOptions) -> DDPM:
    return build_ddpm(options.noise, options.loss, options.model.v_parameterization)


def latents(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.8 * torch.randn(B, C, H, W, generator=generator) + 0.3).to(dtype)


def table(zero_terminal_snr: bool) -> list[float]:
    """Return abar by plain products."""
    abar, running = [], 1.0
    for t in range(1000):
        running *= 1 - (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999) ** 2
        abar.append(running)
    if zero_terminal_snr:
        first, last = math.sqrt(abar[0]), math.sqrt(abar[-1])
        abar = [((math.sqrt(a) - last) * first / (first - last)) ** 2 for a in abar]
    return abar


def recompute(options: TrainOptions, clean: Tensor, prediction: Tensor, seed: int) -> dict[str, Tensor]:
    """Return noise, noisy latents, timesteps, target and loss in float64."""
    o, loss_options = options.noise, options.loss
    g = torch.Generator().manual_seed(seed)
    clean, prediction = clean.double(), prediction.double()
    noise = torch.randn(B, C, H, W, generator=g).double()
    if o.noise_offset:
        strength = o.noise_offset
        if o.noise_offset_random_strength:
            strength *= float(torch.rand((), generator=g))
        draws = torch.randn(B, C, 1, 1, generator=g).double()
        for b in range(B):
            for c in range(C):
                s = strength
                if o.adaptive_noise_scale:
                    s = max(0.0, s + o.adaptive_noise_scale * abs(float(clean[b, c].mean())))
                noise[b, c] += s * draws[b, c]
    if o.multires_noise_iterations:
        for i in range(o.multires_noise_iterations):
            r = 2 + 2 * float(torch.rand((), generator=g))
            h, w = max(1, int(H / r**i)), max(1, int(W / r**i))
            grain = torch.randn(B, C, h, w, generator=g).double()
            noise += o.multires_noise_discount**i * interpolate(grain, (H, W), mode="bilinear", align_corners=False)
            if h == 1 or w == 1:
                break
        for b in range(B):
            values = noise[b].flatten()
            deviation = math.sqrt(float(((values - values.mean()) ** 2).sum()) / (len(values) - 1))
            noise[b] /= deviation
    low, high = o.min_timestep or 0, 1000 if o.max_timestep is None else o.max_timestep
    timesteps = torch.randint(low, high, (B,), generator=g) if low < high else torch.full((B,), high)
    mixed = noise
    if o.ip_noise_gamma:
        gamma = o.ip_noise_gamma
        if o.ip_noise_gamma_random_strength:
            gamma *= float(torch.rand((), generator=g))
        mixed = noise + gamma * torch.randn(B, C, H, W, generator=g).double()

    abar, plain = table(o.zero_terminal_snr), table(False)
    noisy, target, loss = (torch.empty(B, C, H, W, dtype=torch.float64) for _ in range(3))
    for b, t in enumerate(timesteps.tolist()):
        a = abar[t]
        noisy[b] = math.sqrt(a) * clean[b] + math.sqrt(1 - a) * mixed[b]
        is_v = options.model.v_parameterization
        target[b] = math.sqrt(a) * noise[b] - math.sqrt(1 - a) * clean[b] if is_v else noise[b]
        loss[b] = error(loss_options, prediction[b] - target[b], t, a) * weight(loss_options, plain[t], is_v)
    return {"noise": noise, "noisy": noisy, "timesteps": timesteps, "target": target, "loss": loss}


def error(o: Any, d: Tensor, t: int, a: float) -> Tensor:
    if o.loss_type == "l2":
        return d**2
    if o.loss_type == "l1":
        return d.abs()
    if o.huber_schedule == "constant":
        c = o.huber_c
    elif o.huber_schedule == "exponential":
        c = math.exp(math.log(o.huber_c) * t / 1000)
    else:
        sigma = math.sqrt((1 - a) / a) if a else math.inf
        c = (1 - o.huber_c) / (1 + sigma) ** 2 + o.huber_c
    c *= o.huber_scale
    return (2 * c if o.loss_type == "huber" else 2) * (torch.sqrt(d**2 + c**2) - c)


def weight(o: Any, a: float, is_v: bool) -> float:
    snr = a / (1 - a)
    s = min(snr, 1000.0)
    w = 1.0
    if o.min_snr_gamma:
        w *= min(snr, o.min_snr_gamma) / (snr + 1 if is_v else snr)
    if o.scale_v_pred_loss_like_noise_pred:
        w *= s / (s + 1)
    if o.v_pred_like_loss:
        w += o.v_pred_like_loss * w * (s + 1) / s
    if o.debiased_estimation_loss:
        w *= 1 / (s + 1) if is_v else 1 / math.sqrt(s)
    return w


CASES: list[dict[str, Any]] = [
    {},
    {"v_parameterization": True},
    {"noise_offset": 0.1},
    {"noise_offset": 0.2, "noise_offset_random_strength": True},
    {"noise_offset": 0.05, "adaptive_noise_scale": 0.4},
    {"noise_offset": 0.05, "adaptive_noise_scale": -0.2},
    {"multires_noise_iterations": 6, "multires_noise_discount": 0.4},
    {"multires_noise_iterations": 1},
    {"ip_noise_gamma": 0.1},
    {"ip_noise_gamma": 0.3, "ip_noise_gamma_random_strength": True, "v_parameterization": True},
    {"min_timestep": 300, "max_timestep": 310},
    {"min_timestep": 640, "max_timestep": 640},
    {"zero_terminal_snr": True, "v_parameterization": True},
    {"zero_terminal_snr": True, "v_parameterization": True, "min_timestep": 999, "min_snr_gamma": 5.0},
    {"zero_terminal_snr": True, "min_timestep": 999, "max_timestep": 999, "debiased_estimation_loss": True},
    {"min_snr_gamma": 5.0},
    {"min_snr_gamma": 1.0, "v_parameterization": True},
    {"scale_v_pred_loss_like_noise_pred": True, "v_parameterization": True},
    {"v_pred_like_loss": 0.3},
    {"debiased_estimation_loss": True},
    {"debiased_estimation_loss": True, "v_parameterization": True},
    {"min_snr_gamma": 3.0, "v_pred_like_loss": 0.5, "debiased_estimation_loss": True, "max_timestep": 5},
    {"loss_type": "l1"},
    *(
        {"loss_type": kind, "huber_schedule": schedule, "huber_c": 0.15, "huber_scale": 1.3}
        for kind in ("huber", "smooth_l1")
        for schedule in ("constant", "exponential", "snr")
    ),
    {"loss_type": "huber", "zero_terminal_snr": True, "v_parameterization": True, "min_timestep": 999},
    {
        "noise_offset": 0.1, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.3,
        "multires_noise_iterations": 4, "ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True,
        "v_parameterization": True, "zero_terminal_snr": True, "min_snr_gamma": 5.0,
        "scale_v_pred_loss_like_noise_pred": True, "loss_type": "smooth_l1",
    },
]  # fmt: skip


@pytest.mark.parametrize("flags", CASES, ids=lambda flags: "-".join(flags) or "plain")
def test_every_option_equals_its_float64_recomputation(flags: dict[str, Any]) -> None:
    seed = 7100 + CASES.index(flags)
    options = options_of(**flags)
    clean, prediction = latents(seed), latents(seed + 500)
    objective = objective_of(options)
    noised = objective.corrupt(clean, torch.Generator().manual_seed(seed))
    target = objective.target(noised)
    loss = objective.loss(prediction, target, noised)
    expected = recompute(options, clean, prediction, seed)
    assert torch.equal(noised.timesteps_B, expected["timesteps"])
    assert torch.equal(noised.clean_BCHW, clean)
    assert torch.isfinite(loss).all()
    for ours, name in (
        (noised.noise_BCHW, "noise"),
        (noised.latents_BCHW, "noisy"),
        (target, "target"),
        (loss, "loss"),
    ):
        assert ours.dtype == torch.float32
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(ours.double(), expected[name], rtol=2e-5, atol=2e-6 * max(1.0, scale))


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noisy_latents_and_targets_match_diffusers(zero_terminal_snr: bool) -> None:
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_terminal_snr
    )
    # diffusers computes its table in float32, and the rescaled schedule from betas derived from it
    tolerance = {"rtol": 1e-3, "atol": 2e-4} if zero_terminal_snr else {"rtol": 1e-5, "atol": 5e-6}
    clean = latents(71)
    for is_v in (False, True):
        objective = objective_of(options_of(v_parameterization=is_v, zero_terminal_snr=zero_terminal_snr))
        noised = objective.corrupt(clean, torch.Generator().manual_seed(72))
        theirs = scheduler.add_noise(clean, noised.noise_BCHW, noised.timesteps_B)
        torch.testing.assert_close(noised.latents_BCHW, theirs, **tolerance)
        velocity = scheduler.get_velocity(clean, noised.noise_BCHW, noised.timesteps_B)
        torch.testing.assert_close(objective.target(noised), velocity if is_v else noised.noise_BCHW, **tolerance)


def test_sigmas_are_noise_per_signal() -> None:
    noised = objective_of(options_of(zero_terminal_snr=True)).corrupt(latents(73), torch.Generator().manual_seed(74))
    abar = table(zero_terminal_snr=True)
    expected = [math.sqrt((1 - abar[t]) / abar[t]) for t in noised.timesteps_B.tolist()]
    assert noised.sigmas_B.tolist() == pytest.approx(expected, rel=1e-5)
    assert noised.sigmas_B.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_are_noised_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    options = options_of(noise_offset=0.1, adaptive_noise_scale=0.3, multires_noise_iterations=5, ip_noise_gamma=0.1)
    objective, clean = objective_of(options), latents(75, dtype)
    half = objective.corrupt(clean, torch.Generator().manual_seed(76))
    full = objective.corrupt(clean.float(), torch.Generator().manual_seed(76))
    assert half.latents_BCHW.dtype == half.noise_BCHW.dtype == dtype
    assert torch.equal(half.latents_BCHW, full.latents_BCHW.to(dtype))
    assert torch.equal(half.noise_BCHW, full.noise_BCHW.to(dtype))


def test_loss_and_target_are_float32_under_autocast_and_propagate_gradients() -> None:
    objective = objective_of(options_of(v_parameterization=True, loss_type="huber", min_snr_gamma=5.0))
    prediction = latents(77, torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        noised = objective.corrupt(latents(78, torch.bfloat16), torch.Generator().manual_seed(79))
        target = objective.target(noised)
        loss = objective.loss(prediction, target, noised)
    assert target.dtype == loss.dtype == torch.float32
    assert not target.requires_grad
    loss.mean().backward()
    assert prediction.grad is not None
    assert prediction.grad.abs().min() > 0


def test_equal_generators_give_equal_noise_and_an_option_only_adds_draws() -> None:
    def corrupt(seed: int, **flags: Any) -> Noised:
        return objective_of(options_of(**flags)).corrupt(latents(80), torch.Generator().manual_seed(seed))

    first, again, other = corrupt(81), corrupt(81), corrupt(82)
    assert torch.equal(first.latents_BCHW, again.latents_BCHW)
    assert not torch.allclose(first.latents_BCHW, other.latents_BCHW)
    perturbed = corrupt(81, ip_noise_gamma=0.1)
    assert torch.equal(perturbed.noise_BCHW, first.noise_BCHW)
    assert torch.equal(perturbed.timesteps_B, first.timesteps_B)
    assert not torch.allclose(perturbed.latents_BCHW, first.latents_BCHW)


def test_fixing_the_timestep_keeps_everything_else() -> None:
    objective: Objective = objective_of(options_of(min_timestep=10, max_timestep=20, v_parameterization=True))
    noised = objective.at_timestep(400).corrupt(latents(83), torch.Generator().manual_seed(84))
    assert noised.timesteps_B.tolist() == [400] * B
    assert torch.equal(objective.at_timestep(400).target(noised), objective.target(noised))


def test_options_configure_the_objective() -> None:
    objective = objective_of(options_of(min_timestep=3, v_parameterization=True))
    assert isinstance(objective, DDPM)
    assert (objective.min_timestep, objective.max_timestep, objective.predicts_velocity) == (3, 1000, True)
    with pytest.raises(ValueError, match="--max_timestep is 2000"):
        objective_of(options_of(max_timestep=2000))
    with pytest.raises(ValueError, match=r"--huber_c is 0\.0"):
        objective_of(options_of(loss_type="smooth_l1", huber_c=0.0))

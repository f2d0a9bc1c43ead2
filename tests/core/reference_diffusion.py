"""Replays schedules, conversions, losses and sampling runs that the published code computed.

A folder has `index_diffusion.json` and the files that it names; `replay_case` measures how far this project is from
one of them. Configurations are read by the published code's keys, and a key that is not known here is an error.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mdm_core.apple_config import SCHEDULES, THRESHOLDS
from mdm_core.conditioning import Condition
from mdm_core.denoiser import Diffusion
from mdm_core.guidance import Guidance
from mdm_core.loss import matryoshka_loss, training_pairs, vdm_weights, weighted_mean
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import (
    add_noise,
    eps_from_v,
    eps_from_x0,
    prediction_target,
    to_x0,
    v_from_x0,
    x0_from_eps,
    x0_from_v,
)
from mdm_core.pyramid import build_pyramid
from mdm_core.sampler_steps import ddim_step, ddpm_step
from mdm_core.samplers import Sampling, StepReport, noise_levels, sample
from mdm_core.unet import UNet
from tests.core.reference_forward import TOLERANCE, CaseResult
from tests.core.reference_settings import DIFFUSION_DEFAULTS, Setup, with_defaults

Build = Callable[[str], UNet]
"""Gives the network with the weights of that name."""


def replay_case(folder: Path, name: str, build: Build) -> CaseResult:
    """The result of one case; what kind it is, its entry and its file say."""
    case = json.loads((folder / "index_diffusion.json").read_text())["cases"][name]
    if case["file"].endswith(".npz"):
        arrays = dict(np.load(folder / case["file"]))
        conversions = any(key.startswith("step.") for key in arrays)
        errors = _conversions(case, arrays) if conversions else _schedules(arrays)
    else:
        replay = {"loss": _loss, "trajectory": _trajectory}[case["kind"]]
        errors = replay(case, load_file(folder / case["file"]), build)
    return CaseResult(name, max(errors.values()), TOLERANCE)


# Schedules and conversions.


def _schedules(arrays: Mapping[str, Any]) -> dict[str, float]:
    pattern = r"(\w+)\.(gammas|vdm_loss_weights)(?:\.shift([\d.]+?))?(?:\.power([\d.]+?))?(?:\.n(\d+))?"
    longest = max(len(array) for key, array in arrays.items() if ".gammas" in key) - 1
    errors = {}
    for key, array in arrays.items():
        if key.startswith("timesteps."):
            got: Any = np.array(noise_levels(longest, int(key.split(".")[1]), "reference"))
        else:
            match = re.fullmatch(pattern, key)
            if match is None:
                raise ValueError(f"array {key!r} is not known; wanted TYPE.gammas… or TYPE.vdm_loss_weights…")
            kind, what, ratio, power, levels = match.groups()
            schedule = NoiseSchedule(
                kind=SCHEDULES[kind], num_timesteps=int(levels or longest), shift_power=float(power or 1)
            )
            got = schedule.alpha_bar(float(ratio or 1))
            got = (got if what == "gammas" else vdm_weights(got)).numpy()
        errors[key] = _relative(torch.from_numpy(got), torch.from_numpy(array))
    return errors


def _conversions(case: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, float]:
    data = {key: torch.from_numpy(array) for key, array in arrays.items()}
    kind, levels = case["note"].split()[:2]
    alpha_bar = NoiseSchedule(kind=SCHEDULES[kind], num_timesteps=int(re.sub(r"\D", "", levels))).alpha_bar()
    now, then = (alpha_bar[data[key]][:, None, None, None] for key in ("t", "t_last"))
    x0, eps, x_t, pred = data["x0"], data["eps"], data["xt"], data["pred"]
    got = {
        "g": now.flatten(),
        "g_last": then.flatten(),
        "xt": add_noise(x0, eps, now),
        "v_target": prediction_target(x0, eps, now, "v"),
        "eps_target": prediction_target(x0, eps, now, "eps"),
        "x0_from_v": x0_from_v(x_t, pred, now),
        "eps_from_v": eps_from_v(x_t, pred, now),
        "v_from_x0": v_from_x0(x_t, x0, now),
        "x0_from_eps": x0_from_eps(x_t, pred, now),
        "eps_from_eps": eps_from_x0(x_t, x0_from_eps(x_t, pred, now), now),
        "eps_from_x0": eps_from_x0(x_t, x0, now),
    }
    for key in data:
        match = re.fullmatch(r"step\.(v|eps)\.(\w+)\.eta(None|[\d.]+)\.x0", key)
        if match is not None:
            prediction, threshold, eta = match.groups()
            clean = THRESHOLDS[threshold.upper()].apply(to_x0(pred, x_t, now, prediction))  # type: ignore[arg-type]
            got[key] = clean
            got[key[:-2] + "xs"] = (
                ddpm_step(x_t, clean, now, then, data["noise"])
                if eta == "None"
                else ddim_step(x_t, clean, now, then, float(eta), data["noise"])
            )
    unknown = data.keys() - got.keys() - {"t", "t_last", "x0", "eps", "noise", "pred"}
    if unknown:
        raise ValueError(f"arrays {sorted(unknown)} of the conversions are not known")
    # Dividing by a small number makes rounding visible (4e-5 of eps at timestep 1), so it is undone before comparing.
    small = {"x0_from_eps": now.sqrt()} | dict.fromkeys(("eps_from_v", "eps_from_x0", "v_from_x0"), (1 - now).sqrt())
    return {
        key: _relative(got[key] * small.get(key, 1.0), data[key] * small.get(key, 1.0))
        for key in data.keys() & got.keys()
    }


# Losses.


def _loss(case: Mapping[str, Any], data: Mapping[str, Tensor], build: Build) -> dict[str, float]:
    setup = Setup(case, build(case["weights"]).train())
    diffusion = with_defaults(case["diffusion_config"], DIFFUSION_DEFAULTS, "diffusion_config")
    levels, timestep = range(len(setup.resolutions)), data["time"]
    eps, alpha_bars = [data[f"eps{r}"] for r in levels], setup.schedule.alpha_bars(setup.resolutions)
    x0 = build_pyramid(data["img0"], setup.resolutions, setup.tiles)
    pairs = training_pairs(
        x0, eps, timestep, alpha_bars=alpha_bars, divisors=setup.divisors, prediction_type=setup.prediction
    )
    parts = _mixed_parts(diffusion["mixed_ratio"], len(levels))
    rows = [int(part * len(timestep)) for part in parts]
    given = [x[:n] for x, n in zip(pairs.x_t, rows, strict=True)]
    outputs = setup.call(diffusion["model_output_scale"])(given, timestep, **_condition(data).arguments())
    weights = _resolution_weights(diffusion, len(levels))
    # The published code divides by the part that is asked for, not by the one that the batch can have.
    weights = [w * n / (part * len(timestep)) for w, n, part in zip(weights, rows, parts, strict=True)]
    loss_rows = matryoshka_loss(
        pairs.targets,
        outputs,
        pairs.alpha_bar,
        resolution_weights=weights,
        prediction_type=setup.prediction,
        weighting=setup.loss_target,
    )
    row_weights = vdm_weights(setup.schedule.alpha_bar())[timestep + 1]
    loss = weighted_mean(loss_rows, row_weights) if diffusion["use_vdm_loss_weights"] else loss_rows.sum(0).mean()
    loss.backward()
    got = {"loss": loss, "loss_per_sample": loss_rows.sum(dim=0), "weights": row_weights}
    for r in levels:
        output = torch.cat([outputs[r], outputs[r].new_zeros(len(timestep) - rows[r], *outputs[r].shape[1:])])
        signal, clean = pairs.alpha_bar[r], x0[r] / setup.divisors[r]
        got |= {f"img{r}": x0[r], f"gamma{r}": signal.flatten(), f"xt{r}": pairs.x_t[r], f"pred{r}": output}
        got[f"pred_for_loss{r}"] = setup.as_loss_target(output, pairs.x_t[r], signal)
        got[f"target{r}"] = prediction_target(clean, eps[r], signal, setup.loss_target)
    return _compared(got | _gradients(setup.network), data, {"time", "lm_outputs", "lm_mask"}) | _gradient_norms(
        setup.network, case["grad_norms"]
    )


def _mixed_parts(mixed_ratio: str | None, levels: int) -> list[float]:
    """The part of the batch that each resolution sees, finest first."""
    if not mixed_ratio:
        return [1.0] * levels
    counts = np.cumsum([float(count) for count in mixed_ratio.split(":")])
    return list(counts / counts[-1])


def _resolution_weights(diffusion: Mapping[str, Any], levels: int) -> list[float]:
    if levels == 1:
        return [1.0]
    if not diffusion["no_use_residual"]:
        raise ValueError("no_use_residual=false fails in the published code; there is nothing to replay")
    if diffusion["model_output_scale"]:
        raise ValueError(f"model_output_scale={diffusion['model_output_scale']} is not read for nested networks")
    if diffusion["multi_res_weights"] is None:
        return [1.0, *[float(diffusion["use_double_loss"])] * (levels - 1)]
    if not diffusion["use_double_loss"]:
        raise ValueError("multi_res_weights without use_double_loss fails in the published code")
    return [float(weight) for weight in diffusion["multi_res_weights"].split(":")]


def _gradients(network: UNet) -> dict[str, Tensor]:
    gradients = {f"grad.{name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return gradients | {"grad_total_norm": torch.stack([gradient.norm() for gradient in gradients.values()]).norm()}


def _gradient_norms(network: UNet, norms: Mapping[str, float]) -> dict[str, float]:
    got = _gradients(network)
    return {
        f"norm of {name}": _relative(got[f"grad.{name}"].norm(), torch.tensor(norm)) for name, norm in norms.items()
    }


# Sampling runs.


def _trajectory(case: Mapping[str, Any], data: Mapping[str, Tensor], build: Build) -> dict[str, float]:
    setup = Setup(case, build(case["weights"]).eval())
    eta, steps = case["ddim_eta"], case["num_inference_steps"]
    condition, guidance = _guided(case["guidance_scale"], _condition(data))
    sampling = Sampling(
        num_inference_steps=steps,
        solver="ddpm" if eta is None else "ddim",
        eta=eta or 0.0,
        spacing="reference",
        guidance=guidance,
        threshold=setup.threshold,
    )
    levels = noise_levels(setup.schedule.num_timesteps, steps, "reference")
    if levels[:-1] != case.get("timesteps", levels[:-1]):
        raise ValueError(f"the run visits {case['timesteps']}, but the sampler {levels[:-1]}")
    noise, step_noise = setup.noise(data, levels, stochastic=eta != 0, eta=1.0 if eta is None else eta)
    got: dict[str, Tensor] = {}

    def note(report: StepReport) -> None:
        for r, divisor in enumerate(setup.divisors):
            got[f"step{report.done - 1}.x0_{r}"] = report.x0[r] / divisor
            got[f"step{report.done - 1}.xs_{r}"] = report.x_t[r]

    pictures = sample(
        Diffusion(
            setup.call(case.get("diffusion_config", {}).get("model_output_scale", 0)), setup.schedule, setup.prediction
        ),
        noise,
        sampling=sampling,
        condition=condition,
        step_noise=step_noise,
        on_step=note,
    )
    given = {key for key in data if re.fullmatch(r"(init|noise)\d+|t|lm_outputs|lm_mask", key)}
    return _compared(got | {"final": pictures[0]}, data, given)


def _guided(scale: float, condition: Condition) -> tuple[Condition, Guidance]:
    """With guidance the rows of the file are those without the condition, then those with it."""
    if scale == 1:
        return condition, Guidance()

    def half(index: int) -> Condition:
        cut = {
            name: None if part is None else part.chunk(2)[index]
            for name, part in (("text_emb", condition.text_emb), ("text_mask", condition.text_mask))
        }
        return Condition(**cut, micros={name: value.chunk(2)[index] for name, value in condition.micros.items()})

    return half(1), Guidance(scale=scale, negative=half(0))


def _condition(data: Mapping[str, Tensor]) -> Condition:
    mask = data.get("lm_mask")
    return Condition(
        text_emb=data.get("lm_outputs"),
        text_mask=None if mask is None else mask.bool(),
        micros={key.split(".", 1)[1]: value for key, value in data.items() if key.startswith("micro.")},
    )


# Comparing.


def _compared(got: Mapping[str, Tensor], data: Mapping[str, Tensor], given: set[str]) -> dict[str, float]:
    """The difference of each stored array; `given` are those that the replay began with.

    Pictures are compared absolutely; losses and gradients, which grow with the weighting, relatively above 1.
    """
    unknown = [key for key in data if key not in got and key not in given and not key.startswith(("eps", "micro."))]
    if unknown:
        raise ValueError(f"stored arrays {unknown} are not known")
    return {
        key: (_relative if key.startswith(("loss", "grad", "weights")) else _difference)(got[key].detach(), data[key])
        for key in data
        if key in got
    }


def _difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference; where the published code gave no number there is nothing to compare."""
    error = (got.double() - wanted.double()).abs()[torch.isfinite(wanted)]
    return float(error.nan_to_num(nan=math.inf).max()) if error.numel() else 0.0


def _relative(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of the value where that is above 1 (noise as x0 reaches 40,000)."""
    return _difference(got / wanted.abs().clamp(min=1), wanted / wanted.abs().clamp(min=1))

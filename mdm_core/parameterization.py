"""Clean picture, noise and velocity, each from the others (arXiv 2202.00512, section 2 and appendix D).

`alpha_bar` broadcasts against pictures: (B, 1, 1, 1) in [0, 1]. x0 is in [-1, 1]; eps and v have about unit variance.
"""

from typing import Literal, get_args

from torch import Tensor

PredictionType = Literal["v", "eps", "x0"]


def check_prediction_type(prediction_type: str) -> None:
    """Raises a ValueError if there is no such prediction type."""
    if prediction_type not in get_args(PredictionType):
        raise ValueError(f"prediction_type={prediction_type!r} is unknown; use one of {list(get_args(PredictionType))}")


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noised picture x_t = √alpha_bar · x0 + √(1 − alpha_bar) · eps."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def v_target(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The velocity v = √alpha_bar · eps − √(1 − alpha_bar) · x0."""
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0


def prediction_target(x0: Tensor, eps: Tensor, alpha_bar: Tensor, prediction_type: PredictionType) -> Tensor:
    """What a network of this prediction type should answer for the picture that `add_noise` makes."""
    if prediction_type == "v":
        return v_target(x0, eps, alpha_bar)
    return eps if prediction_type == "eps" else x0


def x0_from_v(x_t: Tensor, v: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean picture that `x_t` and `v` imply."""
    return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v


def eps_from_v(x_t: Tensor, v: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise that `x_t` and `v` imply."""
    return (1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v


def x0_from_eps(x_t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean picture that `x_t` and `eps` imply; `alpha_bar` must be above 0."""
    return (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def v_from_eps(x_t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The velocity that `x_t` and `eps` imply; `alpha_bar` must be above 0."""
    return (eps - (1 - alpha_bar).sqrt() * x_t) / alpha_bar.sqrt()


def eps_from_x0(x_t: Tensor, x0: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise that `x_t` and `x0` imply; `alpha_bar` must be below 1."""
    return (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()


def v_from_x0(x_t: Tensor, x0: Tensor, alpha_bar: Tensor) -> Tensor:
    """The velocity that `x_t` and `x0` imply; `alpha_bar` must be below 1."""
    return (alpha_bar.sqrt() * x_t - x0) / (1 - alpha_bar).sqrt()


def to_x0(output: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: PredictionType) -> Tensor:
    """The clean picture that a network's output means."""
    if prediction_type == "v":
        return x0_from_v(x_t, output, alpha_bar)
    return x0_from_eps(x_t, output, alpha_bar) if prediction_type == "eps" else output


def to_eps(output: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: PredictionType) -> Tensor:
    """The noise that a network's output means."""
    if prediction_type == "v":
        return eps_from_v(x_t, output, alpha_bar)
    return output if prediction_type == "eps" else eps_from_x0(x_t, output, alpha_bar)


def to_v(output: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: PredictionType) -> Tensor:
    """The velocity that a network's output means."""
    if prediction_type == "v":
        return output
    return v_from_eps(x_t, output, alpha_bar) if prediction_type == "eps" else v_from_x0(x_t, output, alpha_bar)

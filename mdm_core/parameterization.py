"""Clean picture, noise and velocity, each from the others (arXiv 2202.00512, section 2 and appendix D).

`alpha_bar` broadcasts against pictures: (B, 1, 1, 1) in [0, 1]. x0 is in [-1, 1]; eps and v have about unit variance.
"""

from torch import Tensor


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noised picture x_t = √alpha_bar · x0 + √(1 − alpha_bar) · eps."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def v_target(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The velocity v = √alpha_bar · eps − √(1 − alpha_bar) · x0."""
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0


def x0_from_v(x_t: Tensor, v: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean picture that `x_t` and `v` imply."""
    return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v


def eps_from_x0(x_t: Tensor, x0: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise that `x_t` and `x0` imply; `alpha_bar` must be below 1."""
    return (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

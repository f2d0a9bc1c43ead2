"""Convolutions and linear layers that keep less for the backward pass.

Nearly all memory of a training step is feature maps kept for the backward pass, and two thirds of those are the
results of a normalisation or a nonlinearity just ahead of a convolution: cheap to compute again from what came before
them. `conv_after` keeps only that, and computes the rest once more when the gradient arrives; the convolution itself
is not repeated.

Legend: B batch, C channels, H W height and width, L tokens, D their width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Activation = Literal["none", "silu", "gelu", "upsample"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "upsample": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
}


def conv_after(
    conv: nn.Conv2d,
    x: Tensor,
    *,
    norm: nn.GroupNorm | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The convolution of `activation(norm(x) · (1 + scale) + shift)`, with only `x` kept for the backward pass.

    Args:
        conv: The convolution, without groups or dilation.
        x: (B, C, H, W).
        norm: What normalises `x`; None for nothing.
        scale: (B, C, 1, 1); None for no modulation.
        shift: (B, C, 1, 1), where there is a scale.
        activation: What comes between the two; `upsample` doubles the sides (nearest).
        residual: (B, C_out, H_out, W_out) to add to the result; None for nothing.

    Returns:
        (B, C_out, H_out, W_out).
    """
    plan = _Plan(
        num_groups=0 if norm is None else norm.num_groups,
        activation=activation,
        stride=(conv.stride[0], conv.stride[1]),
        padding=(int(conv.padding[0]), int(conv.padding[1])),
    )
    return _run(plan, x, norm, scale, shift, conv.weight, conv.bias, residual)


def linear_after(linear: nn.Linear, x: Tensor, *, norm: nn.LayerNorm | None = None) -> Tensor:
    """The linear layer of `norm(x)`, with only `x` kept for the backward pass: (B, L, D) -> (B, L, D_out)."""
    # Tokens are the positions of a picture in channels-last order, and a linear layer is a 1×1 convolution.
    picture = x[:, :, None].permute(0, 3, 1, 2)
    plan = _Plan(layer_norm=norm is not None)
    y = _run(plan, picture, norm, None, None, linear.weight[:, :, None, None], linear.bias, None)
    return y.permute(0, 2, 3, 1)[:, :, 0]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    layer_norm: bool = False
    num_groups: int = 0
    activation: Activation = "none"
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


def _run(
    plan: _Plan,
    x: Tensor,
    norm: nn.GroupNorm | nn.LayerNorm | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    norm_weight, norm_bias = (None, None) if norm is None else (norm.weight, norm.bias)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_meta:
        # The compiler plans its own recomputation, and there is no memory to save on the meta device.
        y = _convolve(_before(plan, x, norm_weight, norm_bias, scale, shift), weight, bias, plan)
        return y if residual is None else y + residual
    result: Tensor = _ConvAfter.apply(plan, x, norm_weight, norm_bias, scale, shift, weight, bias, residual)
    return result


class _ConvAfter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> Tensor:
        *before, weight, bias, residual = tensors
        y = _convolve(_before(plan, *before), weight, bias, plan)
        if residual is not None:
            y = y.add_(residual) if y.dtype == residual.dtype else y + residual
        ctx.plan = plan
        ctx.autocast = torch.is_autocast_enabled(y.device.type), torch.get_autocast_dtype(y.device.type)
        ctx.save_for_backward(*before, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *before, weight = ctx.saved_tensors
        plan: _Plan = ctx.plan
        needed: tuple[bool, ...] = ctx.needs_input_grad[1:]
        needs_before, needs_weight, needs_bias = needed[:5], needed[5], needed[6]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(grad.device.type, dtype=dtype, enabled=enabled):
            leaves = [
                None if tensor is None else tensor.detach().requires_grad_(wants)
                for tensor, wants in zip(before, needs_before, strict=True)
            ]
            h = _before(plan, *leaves)
        grad_h, grad_weight, grad_bias = _convolution_backward(
            grad, h.detach(), weight, plan, mask=(any(needs_before), needs_weight, needs_bias)
        )
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(h, wanted, grad_h.to(h.dtype)) if wanted else ())
        grads_before = (next(found) if wants else None for wants in needs_before)
        return (None, *grads_before, grad_weight, grad_bias, grad if needed[7] else None)


def _before(
    plan: _Plan,
    x: Any,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    if plan.num_groups:
        x = F.group_norm(x, plan.num_groups, norm_weight, norm_bias)
    if plan.layer_norm:
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], norm_weight, norm_bias).permute(0, 3, 1, 2)
    if scale is not None and shift is not None:
        x = torch.addcmul(shift, x, scale + 1)
    return _ACTIVATIONS[plan.activation](x)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
    if _is_slow_pointwise(x, weight, plan):
        return _as_picture(F.conv2d(_as_16_rows(x), weight, bias), x.shape)
    return F.conv2d(x, weight, bias, plan.stride, plan.padding)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, plan: _Plan, *, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input, the weight and the bias, those that `mask` asks for."""
    shape, slow = x.shape, _is_slow_pointwise(x, weight, plan)
    if slow:
        x, grad = _as_16_rows(x), _as_16_rows(grad)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x.to(grad.dtype),
        weight.to(grad.dtype),
        [weight.shape[0]],
        plan.stride,
        plan.padding,
        (1, 1),
        False,
        (0, 0),
        1,
        list(mask),
    )
    if slow and grad_x is not None:
        grad_x = _as_picture(grad_x, shape)
    return (
        grad_x,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(weight.dtype),
    )


def _is_slow_pointwise(x: Tensor, weight: Tensor, plan: _Plan) -> bool:
    """Whether PyTorch would leave a 1×1 convolution to BLAS, which on AMD processors is half as fast as oneDNN.

    It does so on one thread for fewer than 16 rows (ATen's rule), so the positions are regrouped into 16 rows, which
    in channels-last order costs nothing.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[2:] == (1, 1)
        and plan.stride == (1, 1)
        and x.shape[0] < 16
        and (x.shape[0] * x.shape[2] * x.shape[3]) % 16 == 0
        and torch.get_num_threads() == 1
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _as_16_rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (16, C, B·H·W / 16, 1), a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).reshape(16, -1, 1, x.shape[1]).permute(0, 3, 1, 2)


def _as_picture(rows: Tensor, shape: torch.Size) -> Tensor:
    """(16, C, B·H·W / 16, 1) -> (B, C, H, W), with B, H and W of `shape`."""
    batch, _, height, width = shape
    return rows.permute(0, 2, 3, 1).reshape(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)

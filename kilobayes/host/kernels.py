"""Matrix products with a frozen weight that was brought into the CPU's own layout once.

torch runs a float32 ``nn.Linear`` on the CPU through MKL, which on AMD processors stays on AVX2; oneDNN uses
all the vector units it finds. A frozen weight never changes, so it can be reordered once for ``W`` (forward)
and once for its transpose (backward for activations). The arithmetic keeps the weight's own precision; only
the order of summation differs. No batch size is given to the reordering: that layout serves every number of
rows, whereas one made for a single row would be reordered again at every call.

The two operators belong to torch's compiler and are not public, so ``available`` tries them before anything
else does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
# Below about a million multiply-adds the dearer call costs more than the faster product gains (float32 only).
SMALLEST = 1 << 20
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def eager(device: str) -> bool:
    """Whether code runs as it is written: no autocast, no ``torch.func`` transform, no compiler."""
    return not (torch.is_autocast_enabled(device) or _functorch_active() or torch.compiler.is_compiling())


def _reorder(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight.default(weight.detach().contiguous())


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """A frozen weight ``values`` ``(d_out, d_in)`` and bias ``(d_out,)`` or None, multiplied as usual."""

    values: Tensor
    bias: Tensor | None

    @property
    def mT(self) -> FrozenWeight:
        """The transposed map without bias, which carries gradients back."""
        return FrozenWeight(self.values.mT, None)

    def serves(self, x: Tensor) -> bool:
        """Whether x is a plain tensor of the weight's dtype and device, of at least one row."""
        return (
            type(x) is Tensor
            and x.dtype == self.values.dtype
            and x.device == self.values.device
            and x.dim() > 1
            and x.numel() > 0
        )

    def product(self, x: Tensor) -> Tensor:
        """``x W^T + b`` outside autograd: ``(..., d_in) -> (..., d_out)``."""
        return torch.nn.functional.linear(x, self.values, self.bias)


@dataclass(frozen=True, eq=False)
class PackedWeight(FrozenWeight):
    """The same in oneDNN's layout too.

    Attributes:
        source: the weight as the module holds it, never written to; ``values`` is the same memory, kept so
            that its address stays taken.
        version: of ``source`` when it was packed, to notice in-place changes.
        weight: ``(d_out, d_in)`` reordered (opaque).
        transpose: ``(d_in, d_out)`` reordered, or None where no backward is wanted.
    """

    source: Tensor
    version: int
    weight: Tensor
    transpose: Tensor | None

    @property
    def mT(self) -> PackedWeight:
        assert self.transpose is not None
        return PackedWeight(self.values.mT, None, self.source, self.version, self.transpose, self.weight)

    def current(self, source: Tensor | None, bias: Tensor | None) -> bool:
        """Whether these are still the frozen tensors that were packed, with their numbers unchanged."""
        return (
            source is self.source
            and bias is self.bias
            and not source.requires_grad
            and (bias is None or not bias.requires_grad)
            and source._version == self.version
            and source.data_ptr() == self.values.data_ptr()
        )

    def serves(self, x: Tensor) -> bool:
        """Also, whether the transpose is at hand if x needs a gradient."""
        return super().serves(x) and not (
            self.transpose is None and x.requires_grad and torch.is_grad_enabled()
        )

    def small(self, x: Tensor) -> bool:
        """Whether the product is too small for the packed operator to pay."""
        return x.numel() * self.values.shape[0] < SMALLEST and x.dtype is torch.float32

    def product(self, x: Tensor) -> Tensor:
        return super().product(x) if self.small(x) else self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """The packed operator itself."""
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


def pack(
    weight: Tensor, bias: Tensor | None = None, backward: bool = True, inputs_first: bool = False
) -> PackedWeight:
    """Reorder ``weight`` ``(d_out, d_in)``, or ``(d_in, d_out)`` with ``inputs_first``; costs a copy, two
    with backward.

    Raises:
        RuntimeError: this build or CPU has no such operator for the dtype (see ``available``).
    """
    matrix = (weight.mT if inputs_first else weight).detach()
    transpose = _reorder(matrix.mT) if backward else None
    return PackedWeight(matrix, bias, weight, weight._version, _reorder(matrix), transpose)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: FrozenWeight) -> Tensor:
        ctx.base = base
        return base.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # A linear map again, so differentiating twice works too.
        return linear(grads[0], ctx.base.mT), None


def linear(x: Tensor, base: FrozenWeight) -> Tensor:
    """``y = x W^T + b``, ``(..., d_in) -> (..., d_out)``, differentiable in x."""
    return _Linear.apply(x, base)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: FrozenWeight) -> Tensor:
        y = base.product(x)
        h = torch.bmm(x.view(a.shape[0], -1, x.shape[-1]), a.mT)
        y.view(a.shape[0], -1, y.shape[-1]).baddbmm_(h, b.mT)
        ctx.save_for_backward(x, h, a, b)
        ctx.base = base
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, h, a, b = ctx.saved_tensors
        want_x, want_a, want_b, _ = ctx.needs_input_grad
        rows = x.view(a.shape[0], -1, x.shape[-1])
        if torch.is_grad_enabled():  # to be differentiated again: h must depend on x and A
            h = torch.bmm(rows, a.mT)
        grad = grad.contiguous()
        grad_y = grad.view(a.shape[0], -1, grad.shape[-1])
        grad_b = torch.bmm(grad_y.mT, h) if want_b else None
        if not (want_x or want_a):
            return None, None, grad_b, None
        grad_h = torch.bmm(grad_y, b)
        grad_a = torch.bmm(grad_h.mT, rows) if want_a else None
        grad_x = None
        if want_x and torch.is_grad_enabled():
            grad_x = low_rank_linear(grad, ctx.base.mT, b.mT, a.mT)
        elif want_x:
            grad_x = ctx.base.mT.product(grad)
            grad_x.view(rows.shape).baddbmm_(grad_h, a)
        return grad_x, grad_a, grad_b, None


def low_rank_linear(x: Tensor, base: FrozenWeight, a: Tensor, b: Tensor) -> Tensor:
    """``y = x W^T + bias + (x A_s^T) B_s^T`` for a stack of S members over one frozen base.

    Args:
        x: ``(S * n, ..., d_in)``, rows grouped by member (all of member 0 first).
        a: ``(S, r, d_in)``.
        b: ``(S, d_out, r)``.

    The update is added into the base's product in place, forward and backward, and only x and ``x A^T`` are
    kept for the backward pass. An x that the base does not serve takes the same products one by one.
    """
    if dense_pays(x, base, a, b):
        weight = torch.baddbmm(base.values.expand(len(a), -1, -1), b, a)
        y = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), weight.mT).view(*x.shape[:-1], -1)
        return y if base.bias is None else y + base.bias
    if not base.serves(x):
        y = torch.nn.functional.linear(x, base.values, base.bias)
        rows = (a.shape[0], x.shape[:-1].numel() // a.shape[0])
        h = torch.bmm(x.reshape(*rows, x.shape[-1]), a.mT)
        return torch.baddbmm(y.reshape(*rows, y.shape[-1]), h, b.mT).view(y.shape)
    return _LowRankLinear.apply(x.contiguous(), a, b, base)


def dense_pays(x: Tensor, base: FrozenWeight, a: Tensor, b: Tensor) -> bool:
    """Whether W + B A, made once, takes fewer multiplications than two thin products beside W.

    That is so from a rank of about a fifth of the width on, as VeRA's are. Of n rows of a member, with a
    backward: n d_in d_out for the gradient of W + B A and 3 r d_in d_out to and from its factors, against
    n r (2 d_in + 3 d_out), and n r d_in if A has a gradient too. In float32 alone: a sum in fewer bits loses
    small updates.
    """
    if x.dtype != torch.float32 or base.values.dtype != torch.float32 or type(base) is not FrozenWeight:
        return False
    r, d_in, d_out = a.shape[1], a.shape[2], b.shape[1]
    n = x.numel() // d_in // len(a)
    if not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return r * d_in * d_out < n * r * (d_in + d_out) and 2 * r * (d_in + d_out) > d_in * d_out > 0
    thin = n * r * ((3 if a.requires_grad else 2) * d_in + 3 * d_out)
    return n * d_in * d_out + 3 * r * d_in * d_out < thin


@functools.cache
def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether the private operators exist here and give the right numbers, forward and backward (tried
    once)."""
    if dtype not in DTYPES or not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.inference_mode(False), torch.no_grad():
            weight = torch.linspace(-1.0, 1.0, 7 * 5).view(7, 5).sin().to(dtype)
            bias = torch.linspace(0.5, 1.0, 7).to(dtype)
            packed = pack(weight, bias)
            tolerance = 1e-5 if dtype is torch.float32 else 5e-2
            for rows in (1, 3):
                x = torch.linspace(-1.0, 2.0, 2 * rows * 5).view(2, rows, 5).cos().to(dtype)
                y = packed.multiply(x)
                back = packed.mT.multiply(y)
                pairs = ((y, x @ weight.T + bias), (back, y @ weight))
                if not all(torch.allclose(*pair, rtol=tolerance, atol=tolerance) for pair in pairs):
                    return False
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True

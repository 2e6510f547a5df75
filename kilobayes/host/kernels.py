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
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def _reorder(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight.default(weight.detach().contiguous())


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A frozen weight in oneDNN's layout, beside the tensor it was made from.

    Attributes:
        source: the weight as the module holds it; never written to.
        values: what ``source`` held when it was packed, as ``(d_out, d_in)``: the same memory, kept so that
            its address stays taken.
        version: of ``source`` when it was packed, to notice in-place changes.
        d_in, d_out: input and output width.
        weight: ``(d_out, d_in)`` reordered (opaque).
        transpose: ``(d_in, d_out)`` reordered, or None where no backward is wanted.
        bias: ``(d_out,)`` or None.
    """

    source: Tensor
    values: Tensor
    version: int
    d_in: int
    d_out: int
    weight: Tensor
    transpose: Tensor | None
    bias: Tensor | None

    @property
    def mT(self) -> PackedWeight:
        """The transposed map without bias, which carries gradients back."""
        assert self.transpose is not None
        flipped = (self.d_out, self.d_in, self.transpose, self.weight, None)
        return PackedWeight(self.source, self.values, self.version, *flipped)

    def current(self, source: Tensor | None, bias: Tensor | None) -> bool:
        """Whether these are still the frozen tensors that were packed, numbers unchanged, and the code runs
        eagerly (no autocast, no ``torch.func`` transform, no compiler)."""
        return (
            source is self.source
            and bias is self.bias
            and not source.requires_grad
            and (bias is None or not bias.requires_grad)
            and source._version == self.version
            and source.data_ptr() == self.values.data_ptr()
            and not torch.is_autocast_enabled("cpu")
            and not _functorch_active()
            and not torch.compiler.is_compiling()
        )

    def serves(self, x: Tensor) -> bool:
        """Whether x is a plain CPU tensor of the weight's dtype, and the transpose is at hand if it needs a
        gradient."""
        return (
            type(x) is Tensor
            and x.is_cpu
            and x.dtype == self.source.dtype
            and x.dim() > 1
            and x.numel() > 0
            and not (self.transpose is None and x.requires_grad and torch.is_grad_enabled())
        )

    def product(self, x: Tensor) -> Tensor:
        """``x W^T + b`` outside autograd: ``(..., d_in) -> (..., d_out)``."""
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


def pack(
    weight: Tensor, bias: Tensor | None = None, backward: bool = True, inputs_first: bool = False
) -> PackedWeight:
    """Reorder ``weight`` ``(d_out, d_in)``, or ``(d_in, d_out)`` with ``inputs_first``; costs a copy, two
    with backward.

    Raises:
        RuntimeError: this build or CPU has no such operator for the dtype (see ``available``).
    """
    matrix = weight.mT if inputs_first else weight
    d_out, d_in = matrix.shape
    return PackedWeight(
        source=weight,
        values=matrix.detach(),
        version=weight._version,
        d_in=d_in,
        d_out=d_out,
        weight=_reorder(matrix),
        transpose=_reorder(matrix.mT) if backward else None,
        bias=bias,
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return packed.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # A linear map again, so differentiating twice works too.
        return linear(grads[0], ctx.packed.mT), None


def linear(x: Tensor, packed: PackedWeight) -> Tensor:
    """``y = x W^T + b``, ``(..., d_in) -> (..., d_out)``, differentiable in x."""
    return _Linear.apply(x, packed)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, packed: PackedWeight) -> Tensor:
        y = packed.product(x)
        h = torch.bmm(x.view(a.shape[0], -1, x.shape[-1]), a.mT)
        y.view(a.shape[0], -1, y.shape[-1]).baddbmm_(h, b.mT)
        ctx.save_for_backward(x, h, a, b)
        ctx.packed = packed
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, h, a, b = ctx.saved_tensors
        want_x, want_a, want_b, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_y = grad.view(a.shape[0], -1, grad.shape[-1])
        grad_b = torch.bmm(grad_y.mT, h) if want_b else None
        if not (want_x or want_a):
            return None, None, grad_b, None
        grad_h = torch.bmm(grad_y, b)
        grad_a = torch.bmm(grad_h.mT, x.view(a.shape[0], -1, x.shape[-1])) if want_a else None
        grad_x = None
        if want_x:
            grad_x = ctx.packed.mT.product(grad)
            grad_x.view(a.shape[0], -1, x.shape[-1]).baddbmm_(grad_h, a)
        return grad_x, grad_a, grad_b, None


def low_rank_linear(x: Tensor, packed: PackedWeight, a: Tensor, b: Tensor) -> Tensor:
    """``y = x W^T + bias + (x A_s^T) B_s^T`` for a stack of S members over one packed base.

    Args:
        x: ``(S * n, ..., d_in)``, rows grouped by member (all of member 0 first).
        a: ``(S, r, d_in)``.
        b: ``(S, d_out, r)``.

    The update is added into the base's product in place, and only x and ``x A^T`` are kept for the backward
    pass. An x that the packed weight does not serve takes the same products one by one.
    """
    if not packed.serves(x):
        y = torch.nn.functional.linear(x, packed.values, packed.bias)
        rows = (a.shape[0], x.shape[:-1].numel() // a.shape[0])
        h = torch.bmm(x.reshape(*rows, packed.d_in), a.mT)
        return torch.baddbmm(y.reshape(*rows, packed.d_out), h, b.mT).view(y.shape)
    return _LowRankLinear.apply(x.contiguous(), a, b, packed)


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
                y = packed.product(x)
                back = packed.mT.product(y)
                pairs = ((y, x @ weight.T + bias), (back, y @ weight))
                if not all(torch.allclose(*pair, rtol=tolerance, atol=tolerance) for pair in pairs):
                    return False
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True

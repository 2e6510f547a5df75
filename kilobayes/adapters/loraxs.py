r"""LoRA-XS: one small square matrix between frozen singular vectors, Bałazy et al., arXiv:2405.17604.

.. math:: W \approx U_r \Sigma_r V_r^\top, \qquad
          y = W x + \frac{\alpha}{r}\, U_r R\, \Sigma_r V_r^\top x

U ``(d_out, r)`` and Sigma V^T ``(r, d_in)`` are the leading singular vectors and values of the base's weight,
frozen; Sigma stands on the side of the input, as in the published code. Trained and stored is R ``(S, r, r)``
alone, which starts at N(0, 1e-5^2). The update is linear in R, so Laplace's approximation of a linearised
model is, as far as the adapter goes, no approximation.

**Which singular vectors.** R means nothing without them, and they are not stored. They are computed in double
precision, to a residual of 1e-7 of the largest singular value, by block Krylov iteration (Musco and Musco,
arXiv:1504.05477) from numbers of a seed of its own, restarted until that is reached, or by the eigenvectors
of the smaller Gram matrix where that is no dearer. The largest entry of each u_i in absolute value is
positive. So another machine finds the same vectors from the same weights, up to that residual over the gap
to the next singular value: 1e-4 where that is 0.1% of the largest. Equal singular values (or two largest
entries of equal size) leave the vectors open: then R belongs to the very arithmetic that computed them. Where
they are close, it belongs to weights that have not been rounded in between. A checkpoint carries a number by
which it is refused on a base where they differ.

A weight of zeros has an update of zero, whatever R is.

Departures: the published code decomposes by scikit-learn, in NumPy, which knows neither bfloat16 nor
quantised weights, leaves the signs to it, stores U and V besides R, and decomposes anew, less exactly, when
it merges. Here every weight that can be dequantised will do, and the same vectors serve training, merging and
export. U and V take 4 r (d_in + d_out) bytes of memory at a site, in float32 on any base: products with a
half-precision base round them once, and files hold none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.random import generator
from kilobayes.types import LowRank, Params, Site

START = 1e-5  # standard deviation of R
SEED = 240517604
EXTRA, DEPTH, RESTARTS, TOLERANCE = 8, 8, 12, 1e-7


@torch.no_grad()
def leading(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U ``(d_out, k)``, the singular values ``(k)``, V ``(d_in, k)``, in double precision, signs as above.

    k is the rank, or the smaller side of the weight.
    """
    exact = (weight.cpu() if weight.device.type == "mps" else weight).double()  # which has no doubles
    wide = exact.shape[0] < exact.shape[1]
    left, values, right = _tall(exact.mT if wide else exact, rank)
    u, v = (right, left) if wide else (left, right)
    signs = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
    return u * signs, values, v * signs


def _tall(m: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading left vectors, values and right vectors of a matrix of at least as many rows as columns."""
    columns, width = m.shape[1], rank + EXTRA
    if 2 * width * (DEPTH + 1) < columns:
        noise = torch.randn(columns, width, generator=generator(SEED, columns), dtype=torch.double)
        block = torch.linalg.qr(noise.to(m.device))[0]
        for _ in range(RESTARTS):
            left, values, block = _krylov(m, block)
            residual = m.mT @ left[:, :rank] - block[:, :rank] * values[:rank]
            if residual.norm(dim=0).max() <= TOLERANCE * values[0]:
                return left[:, :rank], values[:rank], block[:, :rank]
    basis = torch.linalg.eigh(m.mT @ m)[1].flip(1)[:, :rank]
    return _ritz(basis, m @ basis)


def _krylov(m: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best of the span of a block X, M'M X, ..., (M'M)^DEPTH X: as many vectors as X has."""
    width, basis, images = block.shape[1], block, m @ block
    for _ in range(DEPTH):
        block = m.mT @ images[:, -width:]
        for _ in range(2):  # once is not orthogonal where little is left, as of a matrix of low rank
            block = torch.linalg.qr(block - basis @ (basis.mT @ block))[0]
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, m @ block], dim=1)
    left, values, right = _ritz(basis, images)
    return left[:, :width], values[:width], right[:, :width]


def _ritz(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of a matrix on the span of a basis, from the basis's images."""
    left, values, turn = torch.linalg.svd(images, full_matrices=False)
    return left, values, basis @ turn.mT


@dataclass(frozen=True)
class LoRAXS:
    """An r by r matrix a layer, between the leading singular vectors of the layer's own weight.

    Args:
        r: rank; r squared numbers a site. At most the smaller side of a site's weight is used.
        alpha: scale, divided by r.

    Raises:
        ValueError: a rank below 1.
    """

    r: int = 16
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, found {self.r}")

    def rank(self, site: Site) -> int:
        """Rows and columns of R at a site."""
        return min(self.r, site.d_in, site.d_out)

    def freeze(self, sites: list[Site]) -> Params:
        """U and Sigma V^T of every site, in float32."""
        constants: Params = {}
        for site in sites:
            weight, k = site.weight(), self.rank(site)
            if weight.is_meta:
                u, sv = weight.new_empty(site.d_out, k), weight.new_empty(k, site.d_in)
            else:
                u, values, v = leading(weight, k)
                sv = values[:, None] * v.mT
            constants |= {f"{site.name}/U": u.float(), f"{site.name}/SV": sv.float()}
        return constants

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        ranks = {site.name: self.rank(site) for site in sites}
        return {f"{name}/R": START * torch.randn(stack, k, k, generator=gen) for name, k in ranks.items()}

    def build(self, params: Params, constants: Params, site: Site) -> LowRank:
        r = params["R"]
        u, sv = constants["U"].to(r), constants["SV"].to(r)
        return LowRank(A=sv.expand(len(r), -1, -1), B=self.alpha / self.r * (u @ r))

    def rates(self) -> dict[str, float]:
        """R at 0.016 and heads at 0.008 at the default rate of 2e-3, for short training of small models.

        The paper has 1e-4 to 4e-3 for R and 5e-4 to 5e-3 for heads, on large models and for many epochs.
        """
        return {"R": 8.0, "head": 4.0}

    def count(self, sites: list[Site]) -> int:
        """Numbers trained and stored: r squared for each site."""
        return sum(self.rank(site) ** 2 for site in sites)

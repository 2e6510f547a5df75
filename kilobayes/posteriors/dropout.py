r"""Monte-Carlo dropout: Gal & Ghahramani, arXiv:1506.02142, over the leaves of an adapter.

.. math:: q(\theta): \quad \theta = \hat\theta\, \frac{\operatorname{diag}(z)}{1 - p}, \qquad
          z_j \sim \text{Bernoulli}(1 - p)

with one z_j for each entry of a leaf's last axis, so a whole column is there or not. On LoRA's A that is
dropout of the inputs of an adapted layer. Survivors are divided by 1 - p, so theta-hat is the mean of q, and
what plain dropout predicts with. Training minimises, over theta-hat, the mean over rows of

.. math:: \mathbb{E}_q\bigl[-\log p(y_i \mid x_i, \theta)\bigr]
          + \frac{\lambda}{2N} \Bigl(\lVert\hat\theta - \theta_0\rVert^2
          + \frac{p}{1 - p} \lVert\hat\theta_{\text{dropped}}\rVert^2\Bigr)

whose expectation is by one draw for every row of a batch, and whose second part is E_q of the prior around
theta_0; the entropy of q does not depend on theta-hat. A prediction averages the probabilities of draws.

Departures. The mask is shared by the tokens of a row, in training, and by all rows and tokens of a draw at
prediction: published code for language models draws a mask for every token (dropout of the layer's input),
whose draws are no weights, and which understates how much the tokens of a row err together. With
``noise="token"`` it is had all the same: the layer's input x becomes x z / (1 - p), z of its own for every
token, column and site, a hash of the draw's seed and the row's tokens (:mod:`kilobayes.host.tokens`), so that
a draw is still a function of the row. What it adds to the weights' prior is then no penalty on theta-hat: the
weights do not vary, and the last term above is left out.

The prior is centred where training starts, as :class:`~kilobayes.posteriors.point.Point`'s, instead of at
zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.posteriors.point import Point, PointState
from kilobayes.random import Streams
from kilobayes.tree import SHARES, TOKENS, chosen, size, split_key
from kilobayes.types import Params, Progress

NOISE = ("row", "step", "token")


@dataclass(frozen=True)
class MCDropout:
    """Dropout of columns while training and again at prediction, where every draw is one adapter.

    Args:
        p: probability that a column is dropped. An adapter's own dropout, as in ``LoRA(dropout=0.1)``, comes
            on top of it, while training only: a column is then kept with (1 - p)(1 - dropout).
        over: which leaves, as a glob such as ``"*/A"``; "" for A, or all of the adapter if none is called so.
        noise: "row" for a mask for each row of a batch; "step" for one a step, which takes less memory: its
            gradients are noisier; "token" for a mask of each token of an adapted layer's input, as published
            code for language models has it, in training and in a draw.
        prior_precision: lambda, in nats per squared weight; 0 is no prior.

    Raises:
        ValueError: a setting outside its range.
    """

    p: float = 0.1
    over: str = ""
    noise: str = "row"
    prior_precision: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.p < 1.0:
            raise ValueError(f"p must lie in [0, 1), found {self.p}")
        if self.noise not in NOISE:
            raise ValueError(f"noise must be {', '.join(NOISE[:-1])} or {NOISE[-1]}, found {self.noise!r}")
        self._point()

    def _point(self) -> Point:
        return Point(self.prior_precision)

    def init(self, theta: Params, gen: torch.Generator) -> PointState:
        chosen(theta, self.over)  # refuses a glob that fits nothing before a step is taken
        return self._point().init(theta, gen)

    def perturb(
        self, state: PointState, theta: Params, rows: int, streams: Streams, progress: Progress
    ) -> Params:
        if not self.p:
            return theta
        if self.masks:
            like = next(iter(theta.values()))
            bits = streams.normal(torch.empty(len(like), 2)).view(torch.int64)  # of two float32 each
            return theta | self._seeds(theta, bits[:, 0].to(like.device))
        times = rows if self.noise == "row" else 1
        each = {key: value.repeat_interleave(times, dim=0) for key, value in theta.items()}
        for key in chosen(theta, self.over):
            each[key] = each[key] * (streams.keep(mask_like(each[key]), 1.0 - self.p) / (1.0 - self.p))
        return each

    def penalty(self, state: PointState, theta: Params, progress: Progress) -> Tensor:
        loss = self._point().penalty(state, theta, progress)
        varied = self.p and self.prior_precision and not self.masks
        for key in chosen(theta, self.over) if varied else ():
            spread = self.p / (1.0 - self.p) * theta[key].square().flatten(1).sum(dim=1)
            loss = loss + self.prior_precision / (2 * progress.rows) * spread
        return loss

    def observe(self, state: PointState, theta: Params, progress: Progress) -> PointState:
        return self._point().observe(state, theta, progress)

    def sample(self, state: PointState, n: int, gen: torch.Generator) -> Params:
        theta = self._point().sample(state, n, gen)
        if self.masks:
            bits = torch.randint(1 << 62, (n,), generator=gen)
            return theta | self._seeds(theta, bits.to(next(iter(theta.values())).device))
        for key in chosen(theta, self.over) if self.p else ():
            shape = mask_like(theta[key]).shape
            keep = torch.rand(shape, generator=gen) < 1.0 - self.p  # on the CPU, whatever the device
            theta[key] = theta[key] * (keep.to(theta[key]) / (1.0 - self.p))
        return theta

    @property
    def masks(self) -> bool:
        """Whether draws are the trained weights with masks of tokens, and no other weights."""
        return self.noise == "token" and self.p > 0

    def _seeds(self, theta: Params, bits: Tensor) -> Params:
        """For each site of the chosen leaves, what has its layer mask: seeds ``(S,)`` and the share kept."""
        kept = min(max(round((1.0 - self.p) * SHARES), 1), SHARES - 1)
        leaf = torch.stack([bits, torch.full_like(bits, kept)], dim=1)
        return {f"{split_key(key)[0]}/{TOKENS}": leaf for key in chosen(theta, self.over)}

    def mean(self, state: PointState) -> Params:
        return self._point().mean(state)

    def support(self, state: PointState) -> int | None:
        return None if self.p else size(state.theta)


def mask_like(leaf: Tensor) -> Tensor:
    """A view of the shape of a leaf's mask: ``(S, 1, ..., 1, d)`` for ``(S, ..., d)``, one entry a column."""
    for axis in range(1, leaf.dim() - 1):
        leaf = leaf.narrow(axis, 0, 1)
    return leaf

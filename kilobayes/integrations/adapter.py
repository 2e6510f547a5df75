"""What an adapter itself does while it is trained, inside transformers' ``Trainer`` or TRL's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from kilobayes import host, parametrise
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.integrations.places import ADAPTER, extent, kept
from kilobayes.types import Params, Progress


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """What a hosted model trains, in groups of learning rates: ``lr`` times the adapter's own factors.

    For ``Trainer(optimizers=(torch.optim.AdamW(kb.parameter_groups(model, 2e-3)), None))``; a schedule scales
    all groups alike. Parameters that the adapter knows nothing of are at ``lr``.

    Raises:
        KilobayesError: no adapter of kilobayes in the model.
    """
    leaves = host.read(model)
    factors = parametrise.rates(host.method(model), leaves)
    factor_of = {id(leaf): factors.get(key, 1.0) for key, leaf in leaves.items()}
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(factor_of.get(id(parameter), 1.0), []).append(parameter)
    return [
        {"params": found, "lr": lr * factor, "weight_decay": weight_decay} for factor, found in groups.items()
    ]


class AdapterCallback(TrainerCallback):
    """The part in training of adapters that take one: RoseLoRA prunes, B-LoRA has a price for open gates.

    Without it they train as if they had none: RoseLoRA stays dense, B-LoRA's gates stay open. Others need
    nothing of it. :class:`~kilobayes.PosteriorCallback` brings its own; do not use both.

    The price's gradient joins that of the trainer's loss after it was clipped, as a mean over rows: a loss
    that sums over rows needs prices times their number. Pruning sees gradients as they were clipped.

    Raises:
        KilobayesError: at the start of training, a model without an adapter of kilobayes; a checkpoint to go
            on from without this callback's file.
    """

    def __init__(self) -> None:
        self.memo: Params = {}
        self._theta: Params = {}
        self._method: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the leaves, and the memory of a training that goes on."""
        self._theta, self._method = host.read(kwargs["model"]), host.method(kwargs["model"])
        self._per_epoch, self._rows = extent(kwargs["train_dataloader"], args, state)
        self.memo = {}
        if state.global_step and hasattr(self._method, "project"):
            found, _ = read_tensors(kept(args, state, ADAPTER))
            self.memo = {k: v.to(next(iter(self._theta.values())).device) for k, v in found.items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the gradient of the adapter's own loss."""
        price = parametrise.penalty(self._method, self._theta, self._progress(state))
        if not isinstance(price, Tensor) or not price.requires_grad:
            return
        leaves = list(self._theta.values())
        for leaf, found in zip(leaves, torch.autograd.grad(price.sum(), leaves, allow_unused=True)):
            if found is not None:
                leaf.grad = found if leaf.grad is None else leaf.grad + found

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prunes, while the gradients of the step are still there."""
        if hasattr(self._method, "project"):
            gradients = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in self._theta.items()}
            progress = self._progress(state)
            self.memo = parametrise.project(self._method, self._theta, gradients, self.memo, progress)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prunes to the end where training ended early."""
        if state.global_step < state.max_steps and hasattr(self._method, "project"):
            still = {k: torch.zeros_like(v) for k, v in self._theta.items()}
            end = replace(self._progress(state), step=state.global_step, steps=state.global_step)
            self.memo = parametrise.project(self._method, self._theta, still, self.memo, end)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the memory of pruning beside the trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and hasattr(self._method, "project"):
            write_atomically(folder / ADAPTER, self.memo, {"adapter": repr(self._method)})

    def _progress(self, state: Any) -> Progress:
        return Progress(state.global_step + 1, state.max_steps, self._per_epoch, self._rows)

"""One optimiser step's forward and backward passes, for a stack, over micro-batches and processes."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from kilobayes import host, parametrise, tree
from kilobayes.posteriors import ask
from kilobayes.random import Streams, generator
from kilobayes.types import Params, Posterior, Progress


class TrainData(Protocol):
    """Rows to train on, as a task encodes them."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs and labels of some rows, in their order."""
        ...


Nll = Callable[[Any, Tensor], Tensor]  # (model output, labels (S B)) -> nats (S B)


@functools.lru_cache(maxsize=64)
def order(seed: int, epoch: int, rows: int) -> Tensor:
    """A member's permutation of the rows in an epoch: a function of its seed and the epoch alone."""
    return torch.randperm(rows, generator=generator(seed, epoch, 2))


def rows_of_step(seed: int, step: int, rows: int, batch: int) -> Tensor:
    """Rows of a member in step ``step`` (from 0): the last batch of an epoch may be shorter."""
    per_epoch = -(-rows // batch)
    epoch, at = divmod(step, per_epoch)
    return order(seed, epoch, rows)[at * batch : (at + 1) * batch]


def full_batch(seed: int, step: int, rows: int, batch: int) -> Tensor:
    """Rows of a member in step ``step`` (from 0): full batches of its permutations, one after another."""
    place = torch.arange(step * batch, (step + 1) * batch)
    epochs = place // rows
    return torch.cat([order(seed, int(e), rows)[place[epochs == e] % rows] for e in epochs.unique()])


class Processes:
    """The processes of ``torchrun`` or ``accelerate launch``; one where there is no such thing."""

    def __init__(self, device: torch.device) -> None:
        # on the CPU they talk through gloo, even where there is a GPU
        self.state = PartialState() if PartialState._shared_state else PartialState(cpu=device.type == "cpu")
        self.count: int = self.state.num_processes
        self.index: int = self.state.process_index

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.index == 0

    def share(self, rows: Tensor) -> Tensor:
        """The rows of this process, which may be none."""
        return rows[self.index :: self.count]

    def places(self, start: int, stop: int) -> slice:
        """Where this process's rows ``start`` to ``stop`` stand among those of all processes."""
        return slice(self.index + self.count * start, self.index + self.count * stop, self.count)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes."""
        return reduce(value, reduction="sum") if self.count > 1 else value

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any process: all must leave the loop at the same step."""
        if self.count == 1:
            return list(flags)
        return self.sum(torch.tensor(flags, dtype=torch.float32, device=self.state.device)).bool().tolist()


@dataclass
class Step:
    """What does not change from one step to the next.

    Args:
        seeds: one per member: its data order.
        batch_size: rows of a member, over all processes.
        accumulate: micro-batches that they are split into.
        own: the rows of each member, where these are not everyone's; then batches are full.
    """

    model: nn.Module
    data: TrainData
    nll: Nll
    posterior: Posterior
    streams: Streams
    seeds: tuple[int, ...]
    batch_size: int
    accumulate: int
    processes: Processes
    own: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        self.method: Any = host.method(self.model)

    def rows(self, step: int) -> list[Tensor]:
        """Each member's rows in a step, from 0; equally many."""
        if self.own is None:
            return [rows_of_step(seed, step, len(self.data), self.batch_size) for seed in self.seeds]
        pairs = zip(self.seeds, self.own, strict=True)
        return [rows[full_batch(seed, step, len(rows), self.batch_size)] for seed, rows in pairs]

    def run(self, state: Any, theta: Params, progress: Progress, autocast: str) -> tuple[Tensor, Params]:
        """Losses ``(S,)`` of a step, its penalty aside, and the weights drawn for it.

        Gradients of losses and penalty are in ``theta``'s ``.grad``.
        """
        stack = len(self.seeds)
        rows = self.rows(progress.step - 1)
        whole = len(rows[0])
        rows = [self.processes.share(r) for r in rows]
        for value in theta.values():
            value.grad = None
        count = len(rows[0])
        size = max(1, -(-count // self.accumulate))
        device = next(iter(theta.values())).device
        total = torch.zeros(stack, device=device)
        # noise is drawn for the whole step: it depends neither on micro-batches nor on processes
        drawn = ask.perturb(self.posterior, state, theta, whole, self.streams, progress)
        used = parametrise.drop(self.method, drawn, self.streams)
        used = parametrise.restrict(self.method, used, theta, progress)
        each = tree.size(used) // stack  # 1, or a draw for every row
        factors = Factors(self.model)
        for at in range(0, count, size):
            part = [r[at : at + size] for r in rows]
            share = len(part[0]) / whole
            inputs, labels = self.data.batch(torch.cat(part))
            if each == 1 or len(part[0]) == whole:
                factors.use(used)
            else:
                factors.use(_of_rows(used, stack, self.processes.places(at, at + len(part[0]))))
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast == "bf16"):
                output = self.model(**{k: v.to(device) for k, v in inputs.items()})
            loss = self.nll(output, labels.to(device).reshape(stack, -1)).mean(dim=1)
            (loss.sum() * share).backward()
            total += loss.detach() * share
        penalty = ask.penalty(self.posterior, state, theta, progress)
        penalty = penalty + parametrise.penalty(self.method, theta, progress)
        factors.backward(penalty.sum() / self.processes.count)
        if self.processes.count > 1:
            for value in theta.values():
                value.grad = self.processes.sum(torch.zeros_like(value) if value.grad is None else value.grad)
        return self.processes.sum(total), drawn


def _of_rows(drawn: Params, stack: int, rows: slice) -> Params:
    """The draws of some rows, from a draw for every row of each member."""
    return {k: v.unflatten(0, (stack, -1))[:, rows].flatten(0, 1) for k, v in drawn.items()}


class Factors:
    """Operators built once per optimiser step, their gradients collected, then one backward into the leaves.

    The passes of gradient accumulation and of checkpointing's recomputation all meet detached factors; how an
    adapter builds them from a bank, logits or coefficients is differentiated once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.theta: Params | None = None
        self.pairs: list[tuple[host.Built, host.Built]] = []

    def use(self, theta: Params) -> None:
        """Install the operators of a stack; the same stack is built once."""
        if theta is not self.theta:
            built = host.build(self.model, theta)
            detached = host.detach(built)
            host.install(self.model, detached)
            self.pairs.append((built, detached))
            self.theta = theta

    def backward(self, penalty: Tensor) -> None:
        """Carry the factors' gradients, and a penalty's, on into the leaves they were built from.

        Together, since a penalty may share its graph with the weights that were drawn.
        """
        roots, gradients = [], []
        for built, detached in self.pairs:
            for path, operator in built.items():
                for name, root in vars(operator).items():
                    leaf = getattr(detached[path], name)
                    if isinstance(leaf, Tensor) and leaf.grad is not None:
                        roots.append(root)
                        gradients.append(leaf.grad)
        if penalty.requires_grad:
            roots.append(penalty)
            gradients.append(torch.ones_like(penalty))
        if roots:
            torch.autograd.backward(roots, gradients)


class Interrupts:
    """Within it, the first Ctrl-C only sets ``seen``, so that a step is finished; a second is the usual one.

    A handler that is not Python's own is left alone, and so are threads, which signals do not reach.
    """

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        self.ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.ours:
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        if self.ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

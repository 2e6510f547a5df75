"""A training step of kilobayes against PEFT's LoRA with torch's AdamW.

    python benchmarks/training_step.py --quick
    python benchmarks/training_step.py --only epoch --data DIR/rte

kilobayes runs as it is used: ``train.fit`` under ``host.packed``, so batches, clipping, learning rates, the
posterior and the checks for divergence are in its time. PEFT runs forward, backward and ``AdamW.step``; for
an epoch it also clips, schedules and collates, as a Trainer does. Prints one JSON object; ratios are
processor time over PEFT's in float32, median, smallest and largest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import timing
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kilobayes import host, spec, train
from kilobayes.types import Progress

STEPS = 2  # of a call that is timed
SHAPES = {"encoder": (32, 64), "decoder": (4, 128)}
GOALS: dict[str, dict[str, float]] = {
    "encoder q,v": {"packed": 0.52, "bf16": 0.42},
    "encoder all linear": {"packed": 0.60},
    "decoder q,v": {"packed": 0.75, "bf16": 0.65},
    "stack": {"a member of 8": 0.7},
    "epoch": {"kilobayes": 0.40},
    "swag": {"collection": 0.001},
}


class Fixed:
    """The same rows in every step, for each member of a stack, whichever the training loop asks for."""

    def __init__(self, kind: str, rows: int, length: int, steps: int = STEPS) -> None:
        self.kind, self.rows, self.steps = kind, rows, steps
        self.inputs = timing.tokens(rows, length)
        self.labels = torch.arange(rows) % 2

    def __len__(self) -> int:
        return self.rows * self.steps

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows = torch.arange(len(rows)) % self.rows
        inputs = {k: v[rows] for k, v in self.inputs.items()}
        return inputs, self.labels[rows] if self.kind == "encoder" else inputs["input_ids"]


def nll(output: Any, labels: Tensor) -> Tensor:
    """Nats of each label ``(S, B)``, or of each next token ``(S, B (T - 1))``."""
    stack, scores = labels.shape[0], output.logits.float()
    if scores.dim() == 3:
        given = labels.reshape(scores.shape[:2])
        following = given.roll(-1, dims=1)  # the last position has none: its loss is dropped, not its scores
        each = cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="none")
        return each.view(given.shape)[:, :-1].reshape(stack, -1)
    return cross_entropy(scores, labels.flatten(), reduction="none").reshape(stack, -1)


def ours(model: Any, data: Any, batch: int, stack: int = 1, loss: Any = nll) -> Callable[[], Tensor]:
    """``train.fit`` over the data once; returns the losses."""
    theta = {k: v.detach().clone() for k, v in host.read(model).items()}
    settings = train.Settings(lr=1e-4, epochs=1, batch_size=batch, seeds=tuple(range(stack)))
    point = spec.posterior("Point()")
    return lambda: train.fit(model, data, loss, point, theta, settings).losses


def theirs(model: Any, data: Fixed) -> Callable[[], float]:
    """Steps of PEFT on the same rows; returns the first loss."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    inputs, labels = data.batch(torch.arange(data.rows))

    def run() -> float:
        first = None
        for _ in range(data.steps):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            first = float(loss.detach()) if first is None else first
        return first or 0.0

    return run


def step(kind: str, targets: str, rounds: int, brief: bool) -> dict[str, Any]:
    """One shape: PEFT in float32 and on a bfloat16 base, kilobayes as it decides, packed, and in bfloat16."""
    rows, length = SHAPES[kind]
    data = Fixed(kind, rows, length)
    with ExitStack() as contexts:
        other = timing.peer(kind, targets)
        variants: dict[str, Callable[[], Any]] = {"PEFT": theirs(other, data)}
        for name, dtype, pack in timing.OURS:
            model = timing.hosted(kind, targets, dtype)
            with timing.packing(pack):
                contexts.enter_context(host.packed(model))
            contexts.enter_context(host.read_token(model))
            variants[name] = ours(model, data, rows)
        if not brief:
            variants["PEFT bf16"] = theirs(timing.peer(kind, targets, "bfloat16"), data)
        first = {name: float(torch.as_tensor(run()).flatten()[0]) for name, run in variants.items()}
        for name in ("kilobayes", "packed"):
            assert abs(first[name] - first["PEFT"]) < 1e-4, f"not the same work: {first}"
        found = timing.interleaved(variants, rounds, "PEFT")
        for name, run in variants.items():
            found[name]["ms"] = round(found[name]["ms"] / STEPS, 2)
            if not brief:
                found[name]["extra_peak_bytes"] = timing.extra_peak(run)
        leaves = host.read(model).values()
    adapter = sum(4 * leaf.numel() for leaf in leaves)
    return {"rows": rows, "tokens": length, "adapter_bytes": adapter, "variants": found}


def stacked(rounds: int) -> dict[str, Any]:
    """Eight members at 4 x 32 tokens each, in one step; the ratio is time per member over a member alone."""
    members, data = 8, Fixed("encoder", 4, 32)
    with ExitStack() as contexts:
        variants: dict[str, Callable[[], Any]] = {"PEFT": theirs(timing.peer("encoder"), data)}
        for name, stack in (("one alone", 1), ("a member of 8", members)):
            model = timing.hosted("encoder", stack=stack)
            contexts.enter_context(host.packed(model))
            contexts.enter_context(host.read_token(model))
            variants[name] = ours(model, data, 4, stack)
        found = timing.interleaved(variants, 3 * rounds, "one alone")
    whole = found["a member of 8"]
    whole["ratio"] = [round(r / members, 4) for r in whole["ratio"]]
    for name, entry in found.items():
        entry["ms"] = round(entry["ms"] / STEPS / (members if name == "a member of 8" else 1), 2)
    return {"rows": 4, "tokens": 32, "variants": found}


def epoch(folder: str, rounds: int, rows: int) -> dict[str, Any]:
    """Real padded rows, batches of 16, in ``rounds`` equal parts; ratios to PEFT in a Trainer's loop."""
    from kilobayes.models import load_base
    from kilobayes.predict import Rows, class_nll
    from kilobayes.tasks.classify import Classify
    from kilobayes.tasks.data import load_examples

    examples = load_examples(folder, "train", limit=rows, seed=0)
    task = Classify(load_base("minilm", ["no", "yes"]).tokenizer, tuple(examples.classes), 128)
    parts = [task.encode(examples.take(list(range(i, len(examples), rounds)))) for i in range(rounds)]
    calls: dict[str, int] = {}

    def part(name: str) -> Rows:
        calls[name] = calls.get(name, -1) + 1
        return Rows(task, parts[calls[name] % rounds])

    other = timing.peer("encoder")
    optimiser = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], 1e-4)

    def trainer() -> None:
        data = part("PEFT")
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, total_iters=len(data))
        for batch in torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).split(16):
            inputs, labels = data.batch(batch)
            other(**inputs, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()

    def fitting(name: str, model: Any, *contexts: Any) -> Callable[[], Any]:
        def run() -> None:
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context(model))
                ours(model, part(name), 16, loss=class_nll(task))()

        return run

    variants = {"PEFT": trainer}
    levers = (host.packed, host.read_token, host.real_tokens)
    for name, dtype, contexts in (
        ("kilobayes", "float32", levers), ("padded", "float32", levers[:2]), ("bf16", "bfloat16", levers)
    ):  # fmt: skip
        variants[name] = fitting(name, timing.hosted("encoder", dtype=dtype), *contexts)
    lengths = [len(ids) for p in parts for ids in p.ids]
    found = timing.interleaved(variants, rounds, "PEFT")
    return {"rows": len(examples), "mean_tokens": round(sum(lengths) / len(lengths), 1), "variants": found}


def swag(rounds: int) -> dict[str, Any]:
    """A SWAG snapshot's cost over a step's, and over training with the default 20 snapshots in 1000 steps."""
    model, data = timing.hosted("encoder"), Fixed("encoder", *SHAPES["encoder"], 1)
    posterior: Any = spec.posterior("SWAG(rank=10, start=0.5)")
    theta = {k: v.detach().clone() for k, v in host.read(model).items()}
    state = posterior.init(theta, torch.Generator().manual_seed(0))

    def collect() -> None:
        nonlocal state
        for at in range(501, 1000):
            state = posterior.observe(state, theta, Progress(at, 1000, 1000, 32000))

    found = timing.interleaved({"step": ours(model, data, data.rows), "collection": collect}, rounds, "step")
    entry = found["collection"]  # 499 calls, 19 of them snapshots: half of training
    taken = round(float(state.count[0]) / (rounds + 1))
    each = [round(r / taken, 6) for r in entry["ratio"]]
    found["one snapshot"] = {"ratio": each, "ms": round(entry["ms"] / taken, 3)}
    entry["ratio"] = [round(r / 1000, 7) for r in entry["ratio"]]
    entry["ms"] = round(entry["ms"] / 1000, 4)
    return {"snapshots_in_1000_steps": taken, "variants": found}


def main(argv: list[str] | None = None) -> None:
    parser = timing.arguments(__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of a data set with train.jsonl, for the epoch")
    parser.add_argument("--rows", type=int, help="rows of the epoch")
    parser.add_argument("--quick", action="store_true", help="few rounds of the main settings")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    rounds = a.rounds or (3 if a.quick else 7)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        f"{kind} {targets}": lambda k=kind, t=targets: step(k, t, rounds, a.quick)  # type: ignore[misc]
        for kind in SHAPES
        for targets in timing.TARGETS[kind]
    }
    jobs |= {"stack": lambda: stacked(rounds), "swag": lambda: swag(rounds)}
    if a.data:
        jobs["epoch"] = lambda: epoch(a.data, rounds, a.rows or (48 if a.quick else 160) * rounds)
    brief = [name for name in ("encoder q,v", "stack", "swag", "epoch") if name in jobs]
    chosen = a.only.split("+") if a.only else brief if a.quick else list(jobs)
    settings: dict[str, Any] = {}
    for name in chosen:
        if name not in jobs:
            parser.error(f"no setting called {name!r}; there are {', '.join(jobs)} (epoch with --data)")
        found = jobs[name]()
        settings[name] = found | {"targets": timing.judged(found["variants"], GOALS.get(name, {}))}
        timing.progress(name, found["variants"])
    timing.report(settings, rounds)


if __name__ == "__main__":
    main()

"""What each posterior costs: training against plain LoRA, fitting and predicting against plain passes.

    python benchmarks/posteriors.py --quick
    python benchmarks/posteriors.py --data DIR/rte --rows 200

``training`` is ``train.fit`` over the same steps under each posterior, over the point's. ``fitting`` is what is done
once after training; Laplace sees the training rows (its prior given) or as many calibration rows besides (prior
by validation), TFB what it says. ``prediction`` is of the same rows. Both are over plain passes of PEFT's kind:
batches of 8 in the order of the rows, padded, nothing left out. Where laplace-torch is installed it fits the same
model once. Prints one JSON object; ratios are processor time, median, smallest and largest.
"""

from __future__ import annotations

import importlib.util
import time
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import timing
import torch
from training_step import Fixed, nll

from kilobayes import host, spec, train
from kilobayes.energy import ModelEnergy
from kilobayes.models import load_base
from kilobayes.posteriors import ask
from kilobayes.predict import Rows, class_nll
from kilobayes.random import generator
from kilobayes.tasks.classify import Classify, Encoded
from kilobayes.types import Progress

TRAINED = {
    "LoRA": "Point()",
    "SWAG": "SWAG(rank=10)",
    "MC dropout": "MCDropout()",
    "BLoB, noise a row": "BLoB(noise='row')",
    "BLoB, flipout": "BLoB(noise='flipout')",
    "BLoB, noise a step": "BLoB(noise='step')",
    "MonteCLoRA": "MonteCLoRA()",
    "IVON": "IVON()",
}
FITTED = {
    "Laplace, last layer": "Laplace(over='head', structure='full', prior=1.0)",
    "Laplace, Kronecker": "Laplace(prior=1.0)",
    "Laplace, diagonal": "Laplace(structure='diag', prior=1.0)",
    "Laplace, Kronecker, validated": "Laplace()",
    "TFB": "TFB()",
}
GOALS = {
    "training": {"BLoB, flipout": 1.05, "BLoB, noise a row": 1.05, "MonteCLoRA": 1.05, "SWAG": 1.05},
    "fitting": {"Laplace, Kronecker": 0.45, "Laplace, diagonal": 0.45},
    "prediction": {"Laplace, linearised": 1.5},
}


def training(rounds: int, brief: bool) -> dict[str, Any]:
    """Two steps of 32 rows of 64 tokens (brief: 16 of 32) under each posterior."""
    data = Fixed("encoder", *((16, 32) if brief else (32, 64)))
    model = timing.hosted("encoder")
    with host.packed(model), host.read_token(model):
        variants = {name: fitting_of(model, data, text) for name, text in TRAINED.items()}
        found = timing.interleaved(variants, rounds, "LoRA")
        if not brief:
            for name, run in variants.items():
                found[name]["extra_peak_bytes"] = timing.extra_peak(run)
    return {"rows": data.rows, "variants": found}


def fitting_of(model: Any, data: Fixed, text: str) -> Callable[[], Any]:
    theta = {k: v.detach().clone() for k, v in host.read(model).items()}
    posterior = spec.posterior(text)
    settings = train.Settings(lr=1e-4, epochs=1, batch_size=data.rows)
    return lambda: train.fit(model, data, nll, posterior, theta, settings)


def rows_of(folder: str | None, count: int, tokenizer: Any) -> tuple[Classify, Encoded]:
    """Real rows of two classes, or random tokens in rows of 8 to 64."""
    if folder:
        from kilobayes.tasks.data import load_examples

        examples = load_examples(folder, "train", limit=count, seed=0)
        task = Classify(tokenizer, tuple(examples.classes), 128)
        return task, task.encode(examples)
    gen = generator(0)
    lengths = torch.randint(8, 65, (count,), generator=gen).tolist()
    ids = [torch.randint(1000, 30000, (n,), generator=gen).tolist() for n in lengths]
    return Classify(tokenizer, ("no", "yes"), 64), Encoded(ids, None, torch.arange(count) % 2, 0)


@contextmanager
def levers(model: Any) -> Iterator[None]:
    """What the library itself does while it trains."""
    with ExitStack() as stack:
        for lever in (host.packed, host.read_token, host.real_tokens):
            stack.enter_context(lever(model))
        yield


def after(folder: str | None, rounds: int, count: int) -> dict[str, Any]:
    """Fitting and prediction on the same rows."""
    base = load_base("minilm", ["no", "yes"])
    task, rows = rows_of(folder, count, base.tokenizer)
    model = timing.hosted("encoder", init_weights=False)
    model.requires_grad_(False)
    energy = ModelEnergy(model, task, rows)
    theta = {k: v.detach().clone() for k, v in host.read(model).items()}
    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    loss, data = class_nll(task), Rows(task, rows)
    plain = torch.arange(count).split(8)
    batches = torch.tensor([len(r) for r in rows.ids]).argsort().split(16)  # by length, as kilobayes' own

    def both(fast: bool) -> None:
        with levers(model) if fast else nullcontext():
            for batch in batches if fast else plain:
                host.install(model, host.build(model, leaves))
                inputs, labels = data.batch(batch)
                loss(model(**inputs), labels[None]).sum().backward()
        host.install(model, None)

    def forward() -> None:
        with torch.inference_mode():
            for batch in plain:
                model(**data.batch(batch)[0])

    passes: dict[str, Callable[[], Any]] = {
        "plain": lambda: both(False), "ours, forward and backward": lambda: both(True)
    }  # fmt: skip
    states: dict[str, Any] = {}

    def fit(name: str, text: str) -> None:
        posterior = spec.posterior(text)
        state = posterior.observe(posterior.init(theta, generator(1)), theta, Progress(1, 1, 1, count))
        states[name] = posterior, ask.fit(posterior, state, energy, generator(2))

    for name, text in FITTED.items():
        passes[name] = lambda n=name, t=text: fit(n, t)  # type: ignore[misc]
    found = {"fitting": timing.interleaved(passes, rounds, "plain")}
    posterior, state = states["Laplace, Kronecker"]
    ways: dict[str, Callable[[], Any]] = {
        "plain": forward,
        "ours, forward": lambda: energy.logits(theta),
        "Laplace, linearised": lambda: ask.predictive(posterior, state, energy, 100, generator(3)),
        "Laplace, 10 weight samples": lambda: energy.logits(posterior.sample(state, 10, generator(3))),
    }
    found["prediction"] = timing.interleaved(ways, rounds, "plain")
    sizes = {n: sum(t.numel() * 4 for t in tensors(s)) for n, (_, s) in states.items()}
    for name, size in sizes.items():
        found["fitting"][name]["state_bytes"] = size
    if importlib.util.find_spec("laplace"):
        found["fitting"]["laplace-torch"] = laplace_torch(energy, plain, found["fitting"]["plain"]["ms"])
    return {"rows": count, "found": found}


def tensors(state: Any) -> list[torch.Tensor]:
    from kilobayes.tree import flatten_state

    return list(flatten_state(state).values())


def laplace_torch(energy: ModelEnergy, plain: Any, reference: float) -> dict[str, Any]:
    """The peer's Kronecker fit of PEFT's LoRA and head on the same rows, once: it takes long.

    Args:
        reference: milliseconds of plain passes.
    """
    from laplace import Laplace as Peer

    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = timing.peer("encoder")

        def forward(self, inputs: Any) -> torch.Tensor:
            return self.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits

    class Loader(list):
        dataset = energy  # whose length the peer asks for

    loader = Loader(
        UserDict(energy.task.collate(energy.encoded, b), labels=energy.task.labels(energy.encoded, b))
        for b in plain
    )
    peer = Peer(Scores(), "classification", subset_of_weights="all", hessian_structure="kron")
    clock = time.process_time()
    peer.fit(loader)
    spent = 1000 * (time.process_time() - clock)
    return {"ratio": [round(spent / reference, 3)] * 3, "ms": round(spent, 1)}


def main(argv: list[str] | None = None) -> None:
    parser = timing.arguments(__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of a data set of two classes with train.jsonl")
    parser.add_argument("--rows", type=int, help="rows that are fitted on")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    rounds = a.rounds or (3 if a.quick else 7)
    chosen = a.only.split("+") if a.only else ["training", "after"]
    settings: dict[str, Any] = {}
    if "training" in chosen:
        settings["training"] = training(rounds, a.quick)
    if "after" in chosen:
        done = after(a.data, rounds, a.rows or (32 if a.quick else 200))
        settings |= {k: {"rows": done["rows"], "variants": v} for k, v in done["found"].items()}
    for name in settings:
        found = settings[name]["variants"]
        settings[name] = settings[name] | {"targets": timing.judged(found, GOALS[name])}
        timing.progress(name, found)
    timing.report(settings, rounds)


if __name__ == "__main__":
    main()

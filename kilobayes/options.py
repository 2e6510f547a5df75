"""The settings of a training run: flags of ``kilobayes train``, keys of ``run.yaml``, keywords in Python."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from kilobayes.errors import KilobayesError, nearest


def _o(default: Any, help: str, *aliases: str) -> Any:
    return field(default=default, metadata={"help": help, "aliases": aliases})


@dataclass(frozen=True)
class Options:
    """How to fine-tune; every field is a flag (``--batch-size``) and a key of run.yaml (``batch_size``)."""

    data: str = _o(
        "", "Training data: a folder, a CSV, JSONL(.gz) or Parquet file, or a hub id.", "dataset-name"
    )
    model: str = _o(
        "minilm", "Base model: a folder, a hub id, or minilm, of the extra demo.", "model-name-or-path"
    )
    out: str = _o("", "Folder of the run; default runs/DATA-POSTERIOR-SEED.", "output-dir")
    task: str = _o(
        "classify", "What to learn: classify, by a head; choice, by a decoder's next token; lm, to write."
    )
    template: str | None = _o(
        None, 'How --task choice puts a row, as "{question}\\n{choices}\\nAnswer:"; found if not given.'
    )
    answers: str | None = _o(
        None, "Of --task choice: a word for each class, as no,yes; or text, to score the options' own texts."
    )
    ood: str = _o("", "Out-of-distribution data for the report, of the same kinds as --data.")
    calibration: str = _o(
        "0.2", "Share, or number, of training rows held out for calibration; or a file or split; 0 none."
    )
    test: str = _o("", "Data to evaluate on; default the data's own test or validation split.")
    text_column: str | None = _o(None, "Column of the text; found if not named.")
    pair_column: str | None = _o(None, "Column of the second text of a pair; found if not named.")
    label_column: str | None = _o(None, "Column of the label; found if not named.")
    adapter: str = _o("LoRA(r=8)", "Adapter, as kilobayes list shows them.")
    posterior: str = _o("Temperature(SWAG(rank=10))", "Posterior, as kilobayes list shows them.")
    target_modules: str | None = _o(None, 'Modules to adapt, separated by commas, or "all-linear".')
    layers: str | None = _o(
        None, "Indices of the blocks to adapt, separated by commas, as in 3,4,5; default all."
    )
    samples: int = _o(10, "Posterior samples that predictions average over.")
    lr: float = _o(2e-3, "Peak learning rate.", "learning-rate")
    epochs: int = _o(8, "Passes over the training rows.", "num-train-epochs")
    batch_size: int = _o(16, "Rows of a member in an optimiser step.", "per-device-train-batch-size")
    at_once: int = _o(
        0, "Members of an ensemble trained at once; fewer need less memory; 0 trains all of them."
    )
    accumulate: int = _o(1, "Micro-batches of an optimiser step.", "gradient-accumulation-steps")
    max_length: int = _o(128, "Longest row in tokens; longer ones are cut, and counted.", "max-seq-length")
    weight_decay: float = _o(0.0, "Decoupled weight decay.")
    warmup: float = _o(0.06, "Fraction of training of the warm-up.", "warmup-ratio")
    clip: float = _o(1.0, "Largest gradient norm of a member; 0 never clips.", "max-grad-norm")
    seed: int = _o(0, "Seed of everything random.")
    limit_train: int | None = _o(
        None, "Use at most so many training rows, drawn by class.", "max-train-samples"
    )
    limit: int | None = _o(None, "Evaluate at most so many rows.", "max-eval-samples")
    max_minutes: float = _o(0.0, "Stop training after so many minutes; 0 never.")
    device: str = _o("auto", "cpu, cuda, cuda:0, ... or auto.")
    dtype: str = _o("float32", "Precision of the frozen base: float32, bfloat16 or float16.")
    autocast: str = _o("no", "bf16 runs forwards under autocast; no leaves precision alone.")
    packing: bool = _o(False, "Of --task lm: put short rows together, none of which sees another.")
    gradient_checkpointing: bool = _o(False, "Recompute blocks in the backward pass to save memory.")
    resume: bool = _o(False, "Go on with the run in --out, from its checkpoint and its settings.")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, typed(f.name, getattr(self, f.name), hints[f.name]))
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                allowed = f"at least {low}" if math.isinf(high) else f"between {low} and {high}"
                raise KilobayesError(f"{_flag(name)} must be {allowed}", f"found {value}")
        if not 0 < self.lr < math.inf:
            raise KilobayesError("--lr must be above 0", f"found {self.lr}", "as in --lr 0.001")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                found, guess = getattr(self, name), nearest(getattr(self, name), known)
                raise KilobayesError(
                    f"{_flag(name)} {found} is not known",
                    f"known: {', '.join(known)}",
                    f"did you mean {_flag(name)} {guess}?" if guess else f"leave {_flag(name)} out",
                )
        if self.layers is not None and not re.fullmatch(r"\d{1,6}(\s*,\s*\d{1,6})*", self.layers.strip()):
            raise KilobayesError(
                "--layers takes indices of blocks", f"found {self.layers!r:.80}", "as in --layers 3,4,5"
            )
        share = self.held_out()
        if share is not None and not (0 <= share < 1 or (share >= 1 and share.is_integer())):
            raise KilobayesError(
                "--calibration must be a share below 1, or a whole number of rows",
                f"found {self.calibration}",
                "as in --calibration 0.2",
            )

    def held_out(self) -> float | None:
        """``calibration`` as a number, a share below 1 or a count; None where it names a file or split."""
        try:
            share = float(self.calibration)
        except ValueError:
            return None
        return share if math.isfinite(share) else -1.0

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: everything but where it is written and what is evaluated."""
        apart = {"out", "resume", "ood", "test", "limit", "max_minutes", "samples", "device"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in apart}


_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("samples", "epochs", "batch_size", "accumulate", "limit", "limit_train"), (1, math.inf)),
    **dict.fromkeys(("weight_decay", "clip", "max_minutes", "at_once"), (0, math.inf)),
    "max_length": (4, math.inf),
    "warmup": (0, 1),
    "seed": (0, 2**63 - 1),
}
_CHOICES = {
    "task": ("classify", "choice", "lm"),
    "autocast": ("no", "bf16"),
    "dtype": ("float32", "bfloat16", "float16"),
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def typed(name: str, value: Any, hint: Any) -> Any:
    """The value in the field's type; YAML gives 8 for 8.0 and 1e-3 as text."""
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    if kind is str and isinstance(value, list | tuple) and all(type(v) in (str, int) for v in value):
        return ",".join(map(str, value))
    fits = {
        bool: isinstance(value, bool),
        str: isinstance(value, str | int | float | Path),
        int: isinstance(value, int | str) or (isinstance(value, float) and value.is_integer()),
        float: isinstance(value, int | float | str),
    }
    try:
        if not fits[kind] or (isinstance(value, bool) and kind in (int, float)):
            raise ValueError
        return kind(value)
    except (ValueError, OverflowError):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise KilobayesError(f"{_flag(name)} takes {words[kind]}", f"found {reprlib.repr(value)}") from None


def names() -> list[str]:
    return [f.name for f in dataclasses.fields(Options)]


def from_mapping(values: Mapping[str, Any], where: str, also: Sequence[str] = ()) -> dict[str, Any]:
    """Checked keys of a flat mapping; dashes and Hugging Face's spellings are understood.

    Args:
        also: keys that are known elsewhere, for the message.

    Raises:
        KilobayesError: an unknown key, with the nearest known one.
    """
    aliases = {
        a.replace("-", "_"): f.name for f in dataclasses.fields(Options) for a in f.metadata["aliases"]
    }
    out = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = aliases.get(name, name)
        if name not in names():
            shown = f"{key!s:.60}"
            guess = nearest(name, [*also, *names(), *aliases])
            raise KilobayesError(
                f"{where} has an unknown key {shown!r}",
                f"known: {', '.join([*also, *names()])}",
                f"did you mean {guess}?" if guess else "",
            )
        if name in out:
            raise KilobayesError(f"{where} sets {name} twice", f"the second time as {key}", "keep one")
        if value is not None:  # an empty value in YAML is the default
            out[name] = value
    return out

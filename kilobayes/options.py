"""The settings of a training run: flags of ``kilobayes train``, keys of ``run.yaml`` and keywords in Python alike."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from kilobayes.errors import KilobayesError, nearest


def _o(default: Any, help: str, *aliases: str) -> Any:
    return field(default=default, metadata={"help": help, "aliases": aliases})


@dataclass(frozen=True)
class Options:
    """How to fine-tune; every field is a flag (``--batch-size``) and a key of run.yaml (``batch_size``)."""

    data: str = _o("", "Training data: a folder, a CSV, JSONL(.gz) or Parquet file, or a hub id.", "dataset-name")
    model: str = _o("minilm", "Base model: a folder, a hub id, or minilm, which comes along.", "model-name-or-path")
    out: str = _o("", "Folder of the run; default runs/DATA-POSTERIOR-SEED.", "output-dir")
    task: str = _o("classify", "What to learn: classify.")
    ood: str = _o("", "Out-of-distribution data for the report, of the same kinds as --data.")
    calibration: str = _o("0.2", "Share of the training rows held out for calibration, or a file or split of its own.")
    test: str = _o("", "Data to evaluate on; default the data's own test or validation split.")
    text_column: str | None = _o(None, "Column of the text; found if not named.")
    pair_column: str | None = _o(None, "Column of the second text of a pair; found if not named.")
    label_column: str | None = _o(None, "Column of the label; found if not named.")
    adapter: str = _o("LoRA(r=8)", "Adapter, as kilobayes list shows them.")
    posterior: str = _o("Temperature(SWAG(rank=10))", "Posterior, as kilobayes list shows them.")
    target_modules: str | None = _o(None, 'Modules to adapt, separated by commas, or "all-linear".')
    layers: str | None = _o(None, "Indices of the blocks to adapt, separated by commas, as in 3,4,5; default all.")
    samples: int = _o(10, "Posterior samples that predictions average over.")
    lr: float = _o(1e-3, "Peak learning rate.", "learning-rate")
    epochs: int = _o(8, "Passes over the training rows.", "num-train-epochs")
    batch_size: int = _o(16, "Rows of a member in an optimiser step.", "per-device-train-batch-size")
    accumulate: int = _o(1, "Micro-batches of an optimiser step.", "gradient-accumulation-steps")
    max_length: int = _o(128, "Longest row in tokens; longer ones are cut, and counted.", "max-seq-length")
    weight_decay: float = _o(0.0, "Decoupled weight decay.")
    warmup: float = _o(0.06, "Fraction of training of the warm-up.", "warmup-ratio")
    clip: float = _o(1.0, "Largest gradient norm of a member; 0 never clips.", "max-grad-norm")
    seed: int = _o(0, "Seed of everything random.")
    limit_train: int | None = _o(None, "Use at most so many training rows, drawn by class.", "max-train-samples")
    limit: int | None = _o(None, "Evaluate at most so many rows.", "max-eval-samples")
    max_minutes: float = _o(0.0, "Stop training after so many minutes; 0 never.")
    device: str = _o("auto", "cpu, cuda, cuda:0, ... or auto.")
    dtype: str = _o("float32", "Precision of the frozen base: float32, bfloat16 or float16.")
    autocast: str = _o("no", "bf16 runs forwards under autocast; no leaves precision alone.")
    gradient_checkpointing: bool = _o(False, "Recompute blocks in the backward pass to save memory.")
    resume: bool = _o(False, "Go on from the run's checkpoint.")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _typed(f.name, getattr(self, f.name), hints[f.name]))
        for name, least in (("samples", 1), ("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("max_length", 4)):
            if getattr(self, name) < least:
                raise KilobayesError(f"--{name.replace('_', '-')} must be at least {least}", f"found {getattr(self, name)}")
        if not self.lr > 0:
            raise KilobayesError("--lr must be above 0", f"found {self.lr}", "try --lr 0.001")
        if self.task != "classify":
            raise KilobayesError(f"there is no task called {self.task!r}", "known: classify", "leave --task out")
        if self.autocast not in ("no", "bf16"):
            raise KilobayesError(f"--autocast {self.autocast} is not known", "known: no, bf16")

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: everything but where it is written and what is evaluated."""
        apart = {"out", "resume", "ood", "test", "limit", "max_minutes", "samples", "device"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in apart}


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value in the field's type; YAML gives 8 for 8.0 and 1e-3 as text."""
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    try:
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is int and isinstance(value, bool | float) and value != int(value):
            raise ValueError
        if kind is str and isinstance(value, list | tuple):
            return ",".join(str(v) for v in value)
        return kind(value)
    except (TypeError, ValueError):
        raise KilobayesError(
            f"--{name.replace('_', '-')} takes {'true or false' if kind is bool else f'a value of type {kind.__name__}'}",
            f"found {value!r}",
        ) from None


def names() -> list[str]:
    return [f.name for f in dataclasses.fields(Options)]


def from_mapping(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checked keys of a flat mapping; dashes and Hugging Face's spellings are understood.

    Raises:
        KilobayesError: an unknown key, with the nearest known one.
    """
    aliases = {a.replace("-", "_"): f.name for f in dataclasses.fields(Options) for a in f.metadata["aliases"]}
    out = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = aliases.get(name, name)
        if name not in names():
            guess = nearest(name, [*names(), *aliases])
            raise KilobayesError(
                f"{where} has an unknown key {key!r}",
                f"known: {', '.join(names())}",
                f"did you mean {guess}?" if guess else "",
            )
        out[name] = value
    return out


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a flat run.yaml.

    Raises:
        KilobayesError: no such file, no valid YAML, or not flat keys and values.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise KilobayesError(f"{path} does not exist", remedy="name a run.yaml, or leave --config out") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        line = str(error).splitlines()[0]
        raise KilobayesError(f"{path} is not valid YAML", line, "write lines such as lr: 0.001") from None
    if not isinstance(found, Mapping):
        raise KilobayesError(f"{path} holds no settings", f"a {type(found).__name__}", "write lines such as lr: 0.001")
    return from_mapping(found, str(path))


def write_yaml(path: Path, options: Options) -> None:
    """The resolved settings, one key a line, so that ``--config`` repeats the run."""
    import yaml

    from kilobayes.files import write_text_atomically

    kept = {k: v for k, v in dataclasses.asdict(options).items() if k != "resume"}
    write_text_atomically(path, yaml.safe_dump(kept, sort_keys=False))

"""``check``, ``list`` and ``env``: nothing here imports torch unless a model's sizes are asked for."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kilobayes import __version__, spec
from kilobayes.catalog import ADAPTERS, POSTERIORS, catalog
from kilobayes.commands import console
from kilobayes.errors import KilobayesError
from kilobayes.model_files import model_folder
from kilobayes.options import Options

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "scikit-learn",
    "datasets",
    "matplotlib",
)


def check(options: Options, *, as_json: bool) -> None:
    """What training would read and do, without torch; raises KilobayesError as training would."""
    from kilobayes.workflows.data import load_splits
    from kilobayes.workflows.folder import place

    spec.check(options.adapter, ADAPTERS)
    spec.check(options.posterior, POSTERIORS)
    if options.task == "lm":
        from kilobayes.commands import language

        language.check(options, as_json=as_json)
        return
    options = place(options)
    splits = load_splits(options)
    folder = model_folder(options.model)
    steps = -(-len(splits.train) // options.batch_size) * options.epochs
    facts: dict[str, Any] = {
        "model": str(folder),
        "adapter": options.adapter,
        "posterior": options.posterior,
        "classes": splits.train.classes,
        **({} if splits.train.prompt is None else {"template": splits.train.prompt.shown}),
        "training_rows": len(splits.train),
        "calibration_rows": len(splits.calibration or []),
        "test_rows": len(splits.test),
        "test_split": splits.test_name,
        "ood_rows": len(splits.ood or []),
        "optimiser_steps": steps,
        "out": options.out,
        "notes": splits.notes,
    }
    if as_json:
        console.result({"ok": True} | facts | {"options": dataclasses.asdict(options)})
    else:
        for key, value in facts.items():
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            console.say(f"{key.replace('_', ' ')}: {shown}")
        console.say("all good; kilobayes train with the same flags trains")


def list_methods(model: str | None, targets: str | None, *, as_json: bool) -> None:
    """Every adapter and posterior; with a model, the bytes of each adapter on it."""
    sizes = _sizes(model, targets) if model else {}
    rows: list[dict[str, Any]] = [
        {"kind": kind[:-1], "name": e.name, "summary": e.summary, "arxiv": e.paper, "options": e.defaults}
        | sizes.get(e.name, {})
        for kind in (ADAPTERS, POSTERIORS)
        for e in catalog(kind).values()
    ]
    if as_json:
        console.result({"methods": rows, "model": model})
        return
    from rich.padding import Padding
    from rich.text import Text

    out = console.Console(highlight=False)
    if model:
        out.print(_size_table([row for row in rows if row["name"] in sizes], model))
        return
    for row in rows:
        shown = ", ".join(f"{k}={v}" if v else k for k, v in row["options"].items())
        title = Text.assemble(
            (f"{row['kind']} ", "dim"), (f"{row['name']}({shown})", "bold"), overflow="fold"
        )
        out.print(title)
        told = " ".join([row["summary"], *([f"arXiv:{row['arxiv']}"] if row["arxiv"] else [])])
        out.print(Padding(Text(told), (0, 0, 1, 4)))


def _size_table(rows: list[dict[str, Any]], model: str) -> Any:
    """What each adapter trains and stores on a model, from the smallest file up."""
    from rich.table import Table

    lora = next((row["bytes"] for row in rows if row["name"] == "LoRA" and "bytes" in row), None)
    out = Table("adapter", title=f"{model}: heads apart, float32, at the defaults", title_justify="left")
    for column in ("numbers trained", "bytes stored", "of LoRA's"):
        out.add_column(column, justify="right")
    for row in sorted(rows, key=lambda row: row.get("bytes", float("inf"))):
        if "error" in row:
            out.add_row(row["name"], "does not fit:", row["error"], "")
        else:
            share = f"{row['bytes'] / lora:.1%}" if lora else ""
            bound = "at most " if row["name"] == "BLoRA" else ""
            out.add_row(row["name"], f"{row['trained']:,}", f"{bound}{row['bytes']:,}", share)
    return out


def _sizes(model: str, targets: str | None) -> dict[str, dict[str, Any]]:
    """Numbers trained and bytes of the compact file's tensors, in float32, of each adapter at its defaults.

    Heads are left out; no weights are loaded. An adapter that the model's widths do not suit has an error.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from kilobayes import host, parametrise, tree

    out: dict[str, dict[str, Any]] = {}
    for name in catalog(ADAPTERS):
        config = AutoConfig.from_pretrained(model_folder(model))
        with torch.device("meta"):
            base = AutoModelForSequenceClassification.from_config(config)
        chosen: Any = (
            [t.strip() for t in targets.split(",")] if targets and targets != "all-linear" else targets
        )
        wanted = host.KilobayesConfig(adapter=name, target_modules=chosen, task_type="SEQ_CLS")
        try:
            hosted = get_peft_model(base, wanted)
        except ValueError as error:
            if chosen and "target" in str(error).lower():
                raise  # the choice of modules, not the adapter
            out[name] = {"error": str(error)}
            continue
        heads = {f"{path}/" for path in host.heads(hosted)}
        leaves = {k: v for k, v in host.read(hosted).items() if not any(k.startswith(h) for h in heads)}
        size = parametrise.stored(wanted.method, host.sites(hosted), leaves)
        out[name] = {"trained": tree.numbers(leaves), "bytes": size}
    return out


def env(*, as_json: bool) -> None:
    """Versions and hardware."""
    facts: dict[str, Any] = {
        "kilobayes": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    try:
        import torch

        facts["cuda"] = torch.version.cuda or "none"
        facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        facts["threads"] = torch.get_num_threads()
    except ImportError:
        raise KilobayesError("torch is not installed", remedy="pip install torch", exit_code=3) from None
    if as_json:
        console.result(facts)
    else:
        for key, value in facts.items():
            sys.stdout.write(f"{key}: {value}\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""A small Trainer run with a plain PEFT LoRA, and what its weights were after every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from .. import small

NAMES = dict(enumerate(small.LABELS))


def base(**options: Any) -> Any:
    """The tiny BERT with a head of three named classes, its head from a fixed seed."""
    options = {"num_labels": 3, "id2label": NAMES, "ignore_mismatched_sizes": True} | options
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return AutoModelForSequenceClassification.from_pretrained(small.base(), **options)


def lora(**options: Any) -> LoraConfig:
    options = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | options
    return LoraConfig(**options)


def plain(**options: Any) -> Any:
    """The same start every time: PEFT draws it from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return get_peft_model(base(), lora(**options))


def tokens(count: int, seed: int = 1) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(small.base())
    found = small.rows(count, seed)
    return [dict(tokenizer(row["text"])) | {"labels": small.LABELS.index(row["label"])} for row in found]


def flat(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT trains, under kilobayes' names: read from PEFT's own, for layers of scale 2."""
    out = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", "/")
            name = name.replace(".lora_A.default.weight", "/A").replace(".lora_B.default.weight", "/B")
            out[name] = value.detach().clone()
    return out


class Recorder(TrainerCallback):
    """Weights after every step and learning rates of every step; may stop training early."""

    def __init__(self, stop: int = 0) -> None:
        self.stop = stop
        self.weights: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []
        self.scheduled: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])
        self.scheduled.append(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(flat(kwargs["model"]))
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop


def train(
    model: Any,
    folder: Path,
    *callbacks: Any,
    rows: int = 24,
    resume: Any = None,
    optimizers: Any = (None, None),
    **options: Any,
) -> Any:
    """A trainer that has trained, by default 12 steps of 8 rows in 4 epochs."""
    common = {
        "per_device_train_batch_size": 8, "num_train_epochs": 4, "learning_rate": 1e-2, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 3, "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **common | options)
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(small.base()))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=tokens(rows),
        data_collator=collator,
        callbacks=list(callbacks),
        optimizers=optimizers,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer

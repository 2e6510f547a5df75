"""A LoRA that PEFT trained and saved: what its folder says, and the model with it, hosted."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from kilobayes import host
from kilobayes.card import read_card
from kilobayes.checkpoint import read_tensors
from kilobayes.errors import KilobayesError
from kilobayes.host.peft_folder import CONVERTED, KNOWN, load_peft
from kilobayes.hub import first_line
from kilobayes.model_files import model_folder
from kilobayes.models import Base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEADS = ("classifier", "score")
TASK_TYPES = {"classify": "SEQ_CLS", "lm": "CAUSAL_LM"}


@dataclass(frozen=True, eq=False)
class Described:
    """What a folder says of an adapter.

    Attributes:
        base: name of the base model.
        count: number of classes, from the shape of the trained head or the base's configuration; 0 where
            neither tells.
        classes: their names in index order, where somebody gave them names.
    """

    folder: Path
    base: str
    count: int
    classes: list[str] | None
    tensors: dict[str, Tensor]


def task_of(folder: Path) -> str:
    """What an adapter or a run does: lm where it says that it continues texts, classify where it does not.

    Raises:
        KilobayesError: a damaged configuration.
    """
    if (folder / "posterior.json").is_file():
        return read_card(folder, "").task
    config = _json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return "lm" if config.get("task_type") == "CAUSAL_LM" else "classify"


def describe(folder: Path, model: str | None = None, task: str = "classify") -> Described:
    """What is known of an adapter before its base is loaded.

    Args:
        model: the base model, if not the one that the adapter names.
        task: what it is taken for: classify, or lm.

    Raises:
        KilobayesError: no folder of an adapter, one that only unpickling reads, another method than LoRA, an
            adapter for another task, or a base that is not there.
    """
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise KilobayesError(
            f"{folder} is no folder of an adapter", found, f"name a folder that holds {CONFIG}"
        )
    if not (folder / CONFIG).is_file():
        whole = (folder / "config.json").is_file()
        raise KilobayesError(
            f"{folder} holds no adapter",
            f"there is no {CONFIG}" + (", but a whole model" if whole else ""),
            "kilobayes calibrates adapters: name the folder that PEFT's save_pretrained wrote",
        )
    config = _json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise KilobayesError(
            f"{folder} has no {WEIGHTS}",
            "found only adapter_model.bin, which is read by unpickling" if pickled else "no weights found",
            "convert it where you trust it: PeftModel.from_pretrained(...).save_pretrained(DIR)"
            if pickled
            else "copy the folder whole",
        )
    kind, own = config.get("peft_type"), config.get("task_type")
    if kind not in KNOWN:
        found = f"peft_type in {folder / CONFIG}; known: {', '.join(KNOWN)}"
        raise KilobayesError(f"adapters of the method {kind} cannot be calibrated", found)
    if own not in (None, TASK_TYPES[task]):
        raise KilobayesError(
            f"the adapter is not for --task {task}",
            f"task_type {own} in {folder / CONFIG}",
            "adapters that classify texts (SEQ_CLS) or continue them (CAUSAL_LM) are calibrated",
        )
    name = model or config.get("base_model_name_or_path")
    if not name:
        raise KilobayesError(f"{folder} names no base model", remedy="name it with --model")
    tensors, _ = read_tensors(folder / WEIGHTS)
    where = Path(model_folder(str(name)))
    count, named = _classes(folder, where, tensors) if task == "classify" else (0, None)
    return Described(folder, str(name), count, named, tensors)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise KilobayesError(f"{path} is damaged", str(error)[:200], "copy the folder whole") from None
    return found


def _classes(folder: Path, base: Path, tensors: dict[str, Tensor]) -> tuple[int, list[str] | None]:
    """How many classes, and their names: of the first configuration that names so many."""
    configs = [_json(f / "config.json") for f in (folder, base) if (f / "config.json").is_file()]
    sizes = [
        value.shape[-2]  # a kilobayes checkpoint has a stack of heads
        for key, value in sorted(tensors.items())
        if key.endswith(".weight") and "lora_" not in key and set(key.split(".")) & set(HEADS)
    ]
    named = [list(map(str, (c.get("id2label") or {}).values())) for c in configs]
    counts = [len(n) for n in named if n]
    count = sizes[-1] if sizes else (counts[0] if counts else 0)
    for names in named:
        if len(names) == count == len(set(names)) and names != [f"LABEL_{i}" for i in range(count)]:
            return count, names
    return count, None


def chosen_classes(known: Described, given: Sequence[str] | None, found: Sequence[str]) -> list[str]:
    """Class names in index order: those given, those stored, or those of the data in their order.

    Args:
        found: sorted labels of the data.

    Raises:
        KilobayesError: another number of classes than the adapter has.
    """
    names = list(given) if given is not None else known.classes
    if names is None:
        whole = [str(i) for i in range(known.count)]
        names = whole if set(found) <= set(whole) else list(found)
    if known.count and len(names) != known.count:
        shown = ", ".join(names[:10])
        raise KilobayesError(
            f"the adapter has {known.count} classes", f"{len(names)}: {shown}",
            "name them in the order it was trained in, as in --classes negative,positive",
        )  # fmt: skip
    return names


def hosted(known: Described, base: Base) -> Any:
    """The adapter on its base, as a stack of one.

    Raises:
        KilobayesError: it does not fit the base, needs weights that neither holds, or is no plain LoRA.
    """
    stored = {key.removeprefix("base_model.model.") for key in known.tensors}
    lost = [name for name in base.fresh if name not in stored]
    if lost:
        raise KilobayesError(
            f"{known.folder} lacks weights that {base.name} lacks too",
            ", ".join(lost[:3]),
            "save the adapter with them: LoraConfig(task_type='SEQ_CLS', modules_to_save=[...])",
        )
    try:
        if _json(known.folder / CONFIG).get("peft_type") in CONVERTED:
            return load_peft(base.model, known.folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that do not fit, which is checked below
            model: Any = PeftModel.from_pretrained(base.model, str(known.folder))  # type: ignore[arg-type]
        ours = get_peft_model_state_dict(model, save_embedding_layers=False)
    except Exception as error:  # another shape, another module, an option of another PEFT
        raise KilobayesError(
            f"the adapter in {known.folder} does not fit {base.name}",
            first_line(error),
            "name the base it was trained on with --model",
        ) from None
    odd = sorted(set(ours) ^ set(known.tensors))
    if odd:
        raise KilobayesError(
            f"the adapter in {known.folder} does not fit {base.name}",
            f"weights on one side only: {', '.join(odd[:2])}",
            "name the base it was trained on with --model",
        )
    model.eval()
    return (
        model
        if any(isinstance(m, host.KilobayesConfig) for m in model.peft_config.values())
        else host.adopt(model)
    )

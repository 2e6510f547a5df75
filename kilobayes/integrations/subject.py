"""What another library trains: which base, for which classes, and what a run must say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from kilobayes import host, store
from kilobayes.errors import KilobayesError
from kilobayes.host.live import twin
from kilobayes.models import fingerprint, load_base
from kilobayes.tasks.classify import Classify, Encoded
from kilobayes.tasks.data import load_examples
from kilobayes.types import Posterior
from kilobayes.workflows.finetune import fingerprint_of

KINDS = {"classify": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
LENGTH = 512  # tokens, where neither tokenizer nor model has a limit


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in training.

    Attributes:
        task: ``classify`` or ``lm``.
        classify: how rows are read; None for a language model.
        base, fingerprint, classes, dtype: as :class:`kilobayes.card.Card` has them.
    """

    task: str
    classify: Classify | None
    base: str
    fingerprint: str
    classes: list[str]
    max_length: int
    dtype: str
    label_kind: str

    def card(
        self, model: nn.Module, posterior: Posterior, samples: int, seed: int, paired: bool
    ) -> store.Card:
        """The card of a hosted model with a posterior of it."""
        return store.Card(
            posterior=repr(posterior),
            adapter=repr(host.method(model)),
            base=self.base,
            fingerprint=self.fingerprint,
            classes=self.classes,
            max_length=self.max_length,
            samples=samples,
            seed=seed,
            target_modules=[site.name for site in host.sites(model)],
            dtype=self.dtype,
            paired=paired,
            label_kind=self.label_kind,
            task=self.task,
        )

    def encode(self, rows: Any) -> Encoded:
        """Tokens of rows: a tokenised data set's own, or those of texts.

        Args:
            rows: a data set with ``input_ids``, or what :func:`kilobayes.tasks.data.load_examples` reads.
        """
        assert self.classify is not None
        if tokenised(rows):
            return as_encoded(rows)
        return self.classify.encode(load_examples(rows, classes=self.classes))


def subject(model: Any, base: str, classes: Sequence[str] | None, max_length: int | None) -> Subject:
    """What is in training, checked against the base that a saved run would load.

    Args:
        model: a PeftModel.
        base: name of its base; "" for the name that it was loaded by.
        classes: names in index order; None for those of its configuration.
        max_length: longest row in tokens at prediction; None for the model's own limit.

    Raises:
        KilobayesError: neither a classifier nor a causal language model; trained biases of the base; a base
            that cannot be found, or that differs from the one in training; random weights that are neither
            trained nor saved.
    """
    inner = model.get_base_model()
    known = [kind for kind, names in KINDS.items() if _listed(type(inner).__name__, names)]
    if not known:
        raise KilobayesError(
            "only classifiers and causal language models can be watched", f"a {type(inner).__name__}"
        )
    biases = next((c.bias for c in model.peft_config.values() if getattr(c, "bias", "none") != "none"), None)
    if biases:
        raise KilobayesError(
            "biases of the base that are trained have no posterior", f"bias={biases!r}", "as in bias='none'"
        )
    base = base or getattr(inner, "name_or_path", "")
    if not base:
        raise KilobayesError(
            "the base model has no name to load it by again", remedy='name it, as in base="path/to/it"'
        )
    copied: Any = twin(model)
    wrapped = [n for n, m in host.base_of(copied).named_modules() if isinstance(m, ModulesToSaveWrapper)]
    dtype = str(next(p for p in inner.parameters() if not p.requires_grad).dtype).removeprefix("torch.")
    bare = copied.unload()
    if known == ["lm"]:
        own = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
        return Subject("lm", None, base, fingerprint(bare), [], max_length or own or LENGTH, dtype, "str")
    names, kind = _classes(inner, classes)
    loaded = load_base(base, names, dtype=dtype)
    lost = [n for n in loaded.fresh if not any(n.startswith(f"{path}.") for path in wrapped)]
    if lost:
        prefix = f"{getattr(inner, 'base_model_prefix', '')}."
        part = lost[0].removeprefix(prefix).split(".")[0]  # such as pooler
        raise KilobayesError(
            "some weights are random, and neither trained nor saved with the adapter",
            ", ".join(lost[:3]),
            f"as in LoraConfig(modules_to_save=[{part!r}])",
        )
    ours, theirs = fingerprint(bare, (*loaded.fresh, "classifier", "score")), fingerprint_of(loaded)
    if ours != theirs:
        raise KilobayesError(
            "the model in training is not what its name loads",
            f"{base} has fingerprint {theirs[:12]}, the model {ours[:12]}",
            'name the right one, as in base="path/to/it"',
        )
    longest = min(max_length or LENGTH, loaded.longest or LENGTH)
    task = Classify(loaded.tokenizer, tuple(names), longest)
    return Subject("classify", task, base, theirs, names, longest, dtype, kind)


def _listed(name: str, names: Any) -> bool:
    return any(name == entry or name in entry for entry in names.values() if entry)


def _classes(model: Any, given: Sequence[str] | None) -> tuple[list[str], str]:
    """Names in index order, and the kind of label that they are."""
    config = model.config
    problem = getattr(config, "problem_type", None) or ""
    if config.num_labels < 2 or problem in ("regression", "multi_label_classification"):
        raise KilobayesError(
            "only the choice of one of several classes has a posterior here",
            f"num_labels={config.num_labels}, problem_type={problem or None}",
        )
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if given is not None:
        if len(given) != len(names) or len(set(map(str, given))) != len(names):
            raise KilobayesError(
                f"the model has {len(names)} classes", f"named are {', '.join(map(str, given))}"
            )
        return [str(name) for name in given], "str"
    if names == [f"LABEL_{i}" for i in range(len(names))]:  # transformers' own, where nobody named them
        return [str(i) for i in range(len(names))], "int"
    return names, "str"


def tokenised(rows: Any) -> bool:
    """Whether rows are token ids already."""
    try:
        return "input_ids" in rows[0]
    except (TypeError, KeyError, IndexError):
        return False


def as_encoded(rows: Any) -> Encoded:
    """A tokenised data set without its padding.

    Raises:
        KilobayesError: rows without a label.
    """
    ids, types, labels = [], [], []
    for number in range(len(rows)):
        row = rows[number]
        label = row.get("labels", row.get("label"))
        if label is None:
            raise KilobayesError(f"row {number + 1} has no label", f"columns: {', '.join(row)}")
        mask = torch.as_tensor(row.get("attention_mask", [1] * len(row["input_ids"]))).bool()
        ids.append(torch.as_tensor(row["input_ids"])[mask].tolist())
        if "token_type_ids" in row:
            types.append(torch.as_tensor(row["token_type_ids"])[mask].tolist())
        labels.append(int(label))
    return Encoded(ids, types or None, torch.tensor(labels), 0)


def host_run(folder: str | Path, model: Any) -> tuple[Any, Posterior, Any]:
    """A language model's run on its base: the hosted mean, the posterior and its state.

    ``kb.write(model, posterior.sample(state, 1, generator))`` makes the model a draw.

    Args:
        model: the base that the run was trained on, as transformers loads it; it is changed.

    Raises:
        KilobayesError: no such run, damaged files, or another base.
    """
    folder = Path(folder)
    card = store.read_card(folder, "lm")
    store.check_fingerprint(card, fingerprint(model))
    hosted = store.read_adapter(folder, model, card)
    posterior, state = store.read_state(folder, card, host.read(hosted))
    return hosted, posterior, state

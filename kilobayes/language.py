"""A language model with its posterior: texts in, texts out, and how sure it is of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from kilobayes import host, parametrise, store
from kilobayes.errors import KilobayesError
from kilobayes.host.compact import FILE, load_compact
from kilobayes.hub import first_line
from kilobayes.lm.decode import generate
from kilobayes.lm.prompts import check, encode, listed, padded
from kilobayes.lm.replies import Reply, after, completion
from kilobayes.lm.sampling import Sampling
from kilobayes.metrics.agreement import agreement
from kilobayes.models import Base, load_causal
from kilobayes.posteriors import ask
from kilobayes.random import generator
from kilobayes.types import Params, Posterior
from kilobayes.workflows.attach import device_of
from kilobayes.workflows.language import FittedLanguage
from kilobayes.workflows.language import load as load_run

SAMPLES = 10


@dataclass(frozen=True, eq=False)
class Allowed:
    """What a model's adapter keeps of a draw, as :func:`kilobayes.posteriors.ask.draws` asks for it."""

    model: nn.Module

    def restrict(self, draws: Params, around: Params) -> Params:
        return parametrise.restrict(host.method(self.model), draws, around)


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model that continues texts under its posterior.

    Attributes:
        model: hosted, or any causal language model where there is no posterior.
        tokenizer: a Hugging Face tokenizer; never changed.
        posterior, state: None where there is no posterior; then the model speaks for itself.
        samples: draws that probabilities are averaged over, unless asked otherwise.
        seed: of the draws.
        longest: tokens that the model takes, or None.
        card: what is saved beside the posterior.
    """

    model: nn.Module
    tokenizer: Any
    posterior: Posterior | None = None
    state: Any = None
    samples: int = SAMPLES
    seed: int = 0
    longest: int | None = None
    card: store.Card | None = None

    @classmethod
    def around(cls, fitted: FittedLanguage) -> LanguageModel:
        """A language model that a workflow gave its posterior."""
        tokenizer = fitted.task.tokenizer
        longest = Base(host.base_of(fitted.model), tokenizer, fitted.card.base, ()).longest
        about = (fitted.posterior, fitted.state, fitted.card.samples, fitted.card.seed, longest, fitted.card)
        return cls(fitted.model.eval(), tokenizer, *about)

    def save(self, folder: str | Path) -> dict[str, int]:
        """Write a run that the command line and :func:`kilobayes.load` read; returns bytes by part.

        Raises:
            KilobayesError: there is no posterior to save.
        """
        if self.card is None:
            raise KilobayesError(
                "this language model has no posterior to save", remedy="kilobayes train --task lm"
            )
        return store.save(Path(folder), self.model, self.posterior, self.state, self.card)  # type: ignore[arg-type]

    @classmethod
    def load(
        cls, name: str | Path, *, model: str | None = None, device: str = "auto", dtype: str = "float32"
    ) -> LanguageModel:
        """A run of a language model, an adapter that PEFT saved, or a base model alone.

        Args:
            name: folder of a run or adapter, folder or hub id of a base.
            model: where the base is now, if not where it was.
            dtype: of the base, where a run does not say.

        Raises:
            KilobayesError: nothing of that name, a classifier, damaged files, or another base than the run
                was trained on.
        """
        folder, place = Path(name), device_of(device)
        if (folder / "posterior.json").exists():
            return cls.around(load_run(folder, model=model, device=device))
        if (folder / "adapter_config.json").exists():
            base, adapted = _adapter(folder, model, dtype, place)
            return cls(adapted, base.tokenizer, longest=base.longest)
        base = load_causal(str(name), dtype=dtype, device=place)
        return cls(base.model, base.tokenizer, longest=base.longest)

    def draws(self, samples: int | None = None) -> Params | None:
        """Draws of the posterior from the run's own seed, so they repeat; None where there is none.

        Raises:
            KilobayesError: fewer than one, or a posterior that predicts by derivatives instead of draws.
        """
        if samples is not None and samples < 1:
            raise KilobayesError("samples must be at least 1", f"found {samples}")
        if self.posterior is None:
            return None
        for part in ask.chain(self.posterior):
            if getattr(part, "linearised", False):
                raise KilobayesError(
                    "a linearised posterior does not generate", repr(part), "fit it with linearised=False"
                )
        count = ask.count(self.posterior, self.state, samples or self.samples)
        energy: Any = Allowed(self.model)
        return ask.draws(self.posterior, self.state, energy, count, generator(self.seed, 7))

    def generate(
        self,
        prompts: Any,
        sampling: Sampling | None = None,
        *,
        completions: int = 1,
        samples: int | None = None,
        stop: Sequence[str] = (),
        overlap: float | None = 0.8,
        batch_size: int = 16,
        seed: int = 0,
        **settings: Any,
    ) -> list[Reply]:
        """Replies to every prompt, in order; each depends on the seed and its place alone, not on its batch.

        Args:
            prompts: a text, or a list of texts; a conversation (a list of ``{"role": ..., "content": ...}``),
                or a list of conversations, which are put into the model's chat template.
            sampling: how tokens are chosen; or its fields as keywords, as in ``temperature=0.7``.
            completions: of each prompt, different ones at a temperature above 0.
            samples: draws to average over; None for the run's own number.
            stop: strings that end a text.
            overlap: as :func:`kilobayes.metrics.agreement.agreement` takes it.
            batch_size: sequences at once.
            seed: of the choice of tokens.

        Raises:
            KilobayesError: a prompt that is empty or too long, a conversation without a template, settings
                out of range.
        """
        sampling = Sampling(**settings) if sampling is None else sampling
        if completions < 1 or batch_size < 1:
            raise KilobayesError("--completions and the size of batches must be at least 1")
        if completions > 1 and sampling.temperature == 0:
            raise KilobayesError(
                f"{completions} completions would be the same", "temperature 0", "as in --temperature 0.7"
            )
        given = [encode(self.tokenizer, prompt) for prompt in listed(prompts)]
        check(given, self.longest)
        theta = self.draws(samples)
        out: dict[int, Reply] = {}
        order = sorted(range(len(given)), key=lambda i: len(given[i][1]))
        size = max(1, batch_size // completions)
        for some in (order[at : at + size] for at in range(0, len(order), size)):
            gens = [generator(seed, 9, row, c) for row in some for c in range(completions)]
            ids, mask = padded(self.tokenizer, [given[row][1] for row in some])

            def stopped(tokens: list[int]) -> bool:
                return any(word in after(self.tokenizer, [], tokens) for word in stop)

            found = generate(
                self.model, theta, ids, mask, sampling,
                gen=gens, completions=completions, stop_ids=self.stop_ids(), longest=self.longest,
                stopped=stopped if stop else None, transform=self._transform(),
            )  # fmt: skip
            for at, row in enumerate(some):
                text, tokens = given[row]
                own = found[at * completions : (at + 1) * completions]
                done = [completion(self.tokenizer, tokens, each, stop) for each in own]
                agree = agreement([c.text for c in done], overlap) if completions > 1 else None
                out[row] = Reply(text, done, agree)
        return [out[row] for row in range(len(given))]

    def stop_ids(self) -> set[int]:
        """Tokens that end a text: those of the model's generation settings and the tokenizer's own."""
        settings = getattr(host.base_of(self.model), "generation_config", None)
        named = getattr(settings, "eos_token_id", None)
        found = list(named) if isinstance(named, list | tuple) else [named]
        return {int(i) for i in (*found, self.tokenizer.eos_token_id) if i is not None}

    def _transform(self) -> Any:
        posterior = self.posterior
        return None if posterior is None else (lambda z: ask.transform(posterior, self.state, z))


def _adapter(folder: Path, model: str | None, dtype: str, device: str) -> tuple[Base, nn.Module]:
    """An adapter that PEFT saved, on its base."""
    path = folder / "adapter_config.json"
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise KilobayesError(f"{path} is damaged", str(error)[:200], "copy the folder whole") from None
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise KilobayesError(
            f"{folder} does not continue texts", f"task_type {config['task_type']}", "name a language model's"
        )
    compact = (folder / FILE).is_file() and not (folder / "adapter_model.safetensors").is_file()
    if not compact and not (folder / "adapter_model.safetensors").is_file():
        raise KilobayesError(f"{folder} has no adapter_model.safetensors", remedy="copy the folder whole")
    name = model or config.get("base_model_name_or_path")
    if not name:
        raise KilobayesError(f"{folder} names no base model", remedy="name it with --model")
    base = load_causal(str(name), dtype=dtype, device=device)
    if compact:
        return base, load_compact(base.model, folder).eval()
    try:
        return base, PeftModel.from_pretrained(base.model, str(folder)).eval()  # type: ignore[arg-type]
    except Exception as error:
        raise KilobayesError(
            f"the adapter in {folder} does not fit {name}", first_line(error), "name its base with --model"
        ) from None

"""A posterior of what transformers' ``Trainer``, or TRL's, trains: collected by a callback, kept as a run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from kilobayes import spec, store
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.energy import ModelEnergy
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json
from kilobayes.host.live import is_hosted, live, twin
from kilobayes.integrations.adapter import AdapterCallback
from kilobayes.integrations.places import STATE, extent, kept
from kilobayes.integrations.subject import Subject, as_encoded, subject, tokenised
from kilobayes.posteriors import ask
from kilobayes.posteriors.wrapping import Wrapping
from kilobayes.random import generator
from kilobayes.tree import flatten_state, map_params, map_state, unflatten_state
from kilobayes.types import Params, Progress
from kilobayes.workflows.evaluate import versions


class PosteriorCallback(TrainerCallback):
    """Collects a posterior while a ``Trainer`` trains, and writes it as a run when training ends.

    The model is any PeftModel with one plain LoRA, or one that kilobayes hosts. Posteriors that only watch
    training will do (SWA, SWAG, ASWA, Point), those fitted afterwards, and what wraps them; others change the
    loss, which is the trainer's own.

    Args:
        posterior: an object or a specification.
        out: folder of the run; it must not hold one.
        hold_rate: set the learning rate that the posterior asks for in the tail of training. False leaves
            training exactly as it is without the callback; then choose a schedule that does not end at zero.
        calibration: labelled rows that are not trained on, for posteriors that need them: texts in any form
            that ``load_examples`` reads, or a tokenised data set.
        base: name of the base model, if not the one it was loaded by.
        classes: class names in index order, if not those of the model's configuration.
        max_length: longest row in tokens at prediction; by default what the model takes, at most 512.
        paired: whether rows are pairs of texts.
        samples: draws that predictions average over.

    Raises:
        KilobayesError: a posterior that cannot be collected so, or needs calibration rows and gets none.
    """

    def __init__(
        self,
        posterior: Any,
        out: str | Path,
        *,
        hold_rate: bool = True,
        calibration: Any = None,
        base: str = "",
        classes: Sequence[str] | None = None,
        max_length: int | None = None,
        paired: bool = False,
        samples: int = 10,
    ) -> None:
        self.posterior = spec.posterior(posterior)
        self.out = Path(out)
        self.hold_rate = hold_rate
        self.calibration = calibration
        self.named = (base, classes, max_length)
        self.paired = paired
        self.samples = samples
        self.seed = 0
        self.state: Any = None
        self._before: Any = None
        self._last: Params = {}
        self._rates: list[list[float]] = []
        self._own: list[float] = []
        self._subject: Subject | None = None
        self._adapter: AdapterCallback | None = None
        check_watches(self.posterior)
        if self._looks() and calibration is None:
            raise KilobayesError(
                f"{self.posterior!r} needs rows to calibrate on", "none", "as in calibration=rows"
            )

    def _looks(self) -> bool:
        return ask.needs_calibration(self.posterior) or ask.validates(self.posterior)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds what is trained, and goes on with what a checkpoint holds."""
        loader = kwargs["train_dataloader"]
        self.seed, self._rates, self._before = args.seed, [], None
        self._per_epoch, self._rows = extent(loader, args, state)
        if state.global_step:
            self._resume(kept(args, state, STATE))
        if is_hosted(kwargs["model"]):
            self._adapter = AdapterCallback()
            self._adapter.on_train_begin(args, state, control, **kwargs)
        if not state.is_world_process_zero:
            return
        if (self.out / "posterior.json").exists():
            raise KilobayesError(f"{self.out} holds a run already", remedy="name another folder as out")
        self._read = live(kwargs["model"])
        self._subject = subject(kwargs["model"], *self.named)
        if self._subject.task == "lm" and (self._looks() or _fits(self.posterior)):
            raise KilobayesError(
                f"{self.posterior!r} is fitted on class scores", "a language model", "as in SWAG(rank=10)"
            )
        theta = self._theta()
        if not state.global_step:
            self.state = self.posterior.init(theta, generator(self.seed, 3))
        moved = map_params(lambda t: t + 1.0, theta)
        if ask.penalty(self.posterior, self.state, moved, self._progress(state, 1)).any():
            raise _takes_part(self.posterior)  # a prior, which the trainer's loss does not have

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the posterior's learning rate in the place of the schedule's, for this step alone."""
        if self._adapter is not None:
            self._adapter.on_pre_optimizer_step(args, state, control, **kwargs)
        groups = kwargs["optimizer"].param_groups
        self._own = [group["lr"] for group in groups]
        peaks = [float(group.get("initial_lr", args.learning_rate)) for group in groups]
        self._rates.append([float(lr) / peak if peak else 0.0 for lr, peak in zip(self._own, peaks)])
        progress = self._progress(state, state.global_step + 1)
        for index, (group, peak) in enumerate(zip(groups, peaks)):

            def own(step: int, index: int = index) -> float:
                return self._rates[step - 1][index]

            wanted = ask.rate(self.posterior, progress, own)
            if self.hold_rate and wanted != own(progress.step):  # else not a bit is touched
                group["lr"] = wanted * peak

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives the schedule its learning rate back, which may be made of the one before."""
        if self._adapter is not None:
            self._adapter.on_optimizer_step(args, state, control, **kwargs)
        for group, lr in zip(kwargs["optimizer"].param_groups, self._own):
            group["lr"] = lr

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows the posterior the weights after an optimiser step."""
        if not state.is_world_process_zero:
            return
        progress = self._progress(state, state.global_step)
        self._last, self._before = self._theta(), self.state
        self.state = self.posterior.observe(self.state, self._last, progress)
        if progress.epoch_ended and ask.validates(self.posterior):
            energy = self._energy(kwargs["model"], None)
            self.state = ask.validate(self.posterior, self.state, self._last, progress, energy)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps what was collected beside the trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            tensors = {f"state|{key}": value for key, value in flatten_state(self.state).items()}
            tensors["rates"] = torch.tensor(self._rates, dtype=torch.float64)
            write_atomically(folder / STATE, tensors, {"posterior": repr(self.posterior)})
        if self._adapter is not None:
            self._adapter.on_save(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fits what is fitted after training, and writes the run."""
        if self._adapter is not None:
            self._adapter.on_train_end(args, state, control, **kwargs)
        if not state.is_world_process_zero or self._subject is None:
            return
        if state.global_step < state.max_steps and self._before is not None:
            warnings.warn(
                f"training ended at step {state.global_step} of {state.max_steps}: the posterior is of what "
                "was collected until then",
                stacklevel=2,
            )
            progress = replace(self._progress(state, state.global_step), steps=state.global_step)
            self.state = self.posterior.observe(self._before, self._theta(), progress)
        self.state = map_state(Tensor.cpu, self.state)
        model: Any = twin(kwargs["model"])
        if _fits(self.posterior):
            energy = self._energy(kwargs["model"], kwargs["train_dataloader"].dataset)
            self.state = ask.fit(self.posterior, self.state, energy, generator(self.seed, 6))
        card = self._subject.card(model, self.posterior, self.samples, self.seed, self.paired)
        store.save(self.out, model, self.posterior, self.state, card)
        write_json(self.out / "env.json", versions())

    def _theta(self) -> Params:
        """The live leaves, copied; off a device that lacks the float64 of running averages."""
        theta = self._read()
        return map_params(Tensor.cpu, theta) if next(iter(theta.values())).device.type == "mps" else theta

    def _progress(self, state: Any, step: int) -> Progress:
        return Progress(step, state.max_steps, self._per_epoch, self._rows)

    def _energy(self, model: Any, trained: Any) -> ModelEnergy:
        known = self._subject
        assert known is not None
        assert known.classify is not None
        rows = as_encoded(trained) if trained is not None and tokenised(trained) else None
        held = rows if self.calibration is None else known.encode(self.calibration)
        if held is None:
            raise KilobayesError(
                f"{self.posterior!r} is fitted on rows",
                "a training set without token ids",
                "calibration=rows",
            )
        return ModelEnergy(twin(model), known.classify, held, trained=rows)

    def _resume(self, path: Path) -> None:
        tensors, metadata = read_tensors(path)
        theirs = metadata.get("posterior", "")
        if theirs != repr(self.posterior):
            raise KilobayesError(
                f"{path} was collected for {theirs}", f"this is {self.posterior!r}", "resume with the same"
            )
        self._rates = tensors.pop("rates").tolist()
        kept = {key.removeprefix("state|"): value for key, value in tensors.items()}
        self.state = unflatten_state(self.posterior, kept)


def check_watches(posterior: Any) -> None:
    """Refuse a posterior that takes part in training, which a callback cannot.

    Raises:
        KilobayesError: it draws, adds leaves, moves the weights, or has several members.
    """
    for part in ask.chain(posterior):
        own = any(_offers(part, name) for name in ("extend", "perturb", "update"))
        if own or ask.members(posterior) > 1:
            raise _takes_part(part)


def _takes_part(posterior: Any) -> KilobayesError:
    return KilobayesError(
        f"{posterior!r} takes part in training, so it cannot be collected by a callback",
        remedy="use SWA, SWAG or ASWA here, or train with kilobayes",
    )


def _fits(posterior: Any) -> bool:
    return any(_offers(part, "fit") for part in ask.chain(posterior))


def _offers(part: Any, protocol: str) -> bool:
    """Whether a posterior does this itself, not only for one that it wraps."""
    return getattr(type(part), protocol, None) not in (None, getattr(Wrapping, protocol))

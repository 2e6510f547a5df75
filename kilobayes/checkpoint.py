"""Checkpoints of a run: one file, replaced atomically, from which a killed run goes on to the same result."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kilobayes.errors import KilobayesError
from kilobayes.files import replacing
from kilobayes.optim import AdamWState
from kilobayes.random import Streams
from kilobayes.tree import flatten_state, unflatten_state
from kilobayes.types import Params, Posterior, Progress


def write_atomically(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file that is there whole or not at all: written beside it, flushed, then renamed."""
    whole = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with replacing(path) as temporary:
        save_file(whole, temporary, dict(metadata or {}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        KilobayesError: the file is missing, truncated or not of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise KilobayesError(
            f"{path} is missing", "a run's folder holds it", "train again, or name another run"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise KilobayesError(
            f"{path} is damaged or is no safetensors file", str(error), "copy it again from where it was made"
        ) from None


@dataclass(frozen=True, eq=False)
class Found:
    """A checkpoint's content."""

    state: Any
    step: int
    losses: Tensor
    alive: Tensor
    memo: Params


@dataclass
class Checkpoint:
    """Where and how often a run keeps its state.

    Args:
        path: the file, such as ``run/checkpoints/latest.safetensors``.
        identity: what the run is (settings, data, base); a checkpoint of another is refused.
        resume: load it if it is there.
        seconds: write when so many have passed since the last, and at the end of training.
    """

    path: Path
    identity: dict[str, Any]
    resume: bool = False
    seconds: float = 20.0
    last: float = field(default_factory=time.monotonic)

    def due(self, progress: Progress) -> bool:
        return progress.done or time.monotonic() - self.last > self.seconds

    def write(
        self,
        step: int,
        state: Any,
        theta: Params,
        moments: AdamWState,
        streams: Streams,
        losses: Tensor,
        alive: Tensor,
        memo: Params,
    ) -> None:
        tensors = {f"theta|{k}": v for k, v in theta.items()}
        tensors |= {f"first|{k}": v for k, v in moments.first.items()}
        tensors |= {f"second|{k}": v for k, v in moments.second.items()}
        tensors |= {f"state|{k}": v for k, v in flatten_state(state).items()}
        tensors |= {f"memo|{k}": v for k, v in memo.items()}
        tensors |= {"streams": streams.state(), "losses": losses, "alive": alive, "step": torch.tensor(step)}
        write_atomically(self.path, tensors, {"identity": json.dumps(self.identity, sort_keys=True)})
        self.last = time.monotonic()

    def load(
        self, posterior: Posterior, state: Any, theta: Params, moments: AdamWState, streams: Streams
    ) -> Found | None:
        """Put a checkpoint's weights, moments and random states back in place.

        Raises:
            KilobayesError: the checkpoint is of another run, damaged, or not of these weights.
        """
        if not self.resume or not self.path.exists():
            return None
        try:
            return self._restore(self.read(), posterior, theta, moments, streams)
        except (KeyError, RuntimeError) as error:
            raise KilobayesError(
                f"{self.path} does not fit this run", f"{error}", "delete it, or train without --resume"
            ) from None

    def read(self) -> dict[str, Tensor]:
        """What is in the file, under names such as ``theta|site/leaf``, ``state|...``, ``step``, ``losses``.

        Raises:
            KilobayesError: the checkpoint is of another run, missing or damaged.
        """
        tensors, metadata = read_tensors(self.path)
        theirs, ours = json.loads(metadata.get("identity", "{}")), json.loads(json.dumps(self.identity))
        odd = sorted(k for k in set(theirs) | set(ours) if theirs.get(k) != ours.get(k))
        if odd:
            raise KilobayesError(
                f"{self.path} belongs to another run",
                "; ".join(f"{k}: {theirs.get(k)} there, {ours.get(k)} here" for k in odd[:3]),
                "resume with the same settings, or name another --out",
            )
        return tensors

    def change(self, changed: Mapping[str, Tensor]) -> None:
        """Put other tensors in the place of some, under names as :meth:`read` gives them, or beside them.

        What is beside them is gone with the next :meth:`write`.
        """
        metadata = {"identity": json.dumps(self.identity, sort_keys=True)}
        write_atomically(self.path, self.read() | dict(changed), metadata)

    def _restore(
        self,
        tensors: dict[str, Tensor],
        posterior: Posterior,
        theta: Params,
        moments: AdamWState,
        streams: Streams,
    ) -> Found:
        with torch.no_grad():
            for name, params in (("theta", theta), ("first", moments.first), ("second", moments.second)):
                for key, value in params.items():
                    if (saved := tensors[f"{name}|{key}"]).shape != value.shape:  # copy_ would broadcast
                        raise RuntimeError(f"{key} is {tuple(saved.shape)} there, {tuple(value.shape)} here")
                    value.copy_(saved)
        streams.restore(tensors["streams"])
        device = next(iter(theta.values())).device

        def part(name: str) -> Params:
            return {k[len(name) :]: v.to(device) for k, v in tensors.items() if k.startswith(name)}

        return Found(
            unflatten_state(posterior, part("state|")),
            int(tensors["step"]),
            tensors["losses"],
            tensors["alive"],
            part("memo|"),
        )

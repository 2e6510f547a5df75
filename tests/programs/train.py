"""``kilobayes train`` in a process of its own that kills or interrupts itself at a chosen moment.

Arguments: the moment, the signal's name, and then those of the command line. Moments: ``step:N`` (after the
N-th optimiser step), ``replace:N`` (before the N-th file is renamed into its place), ``renamed:N`` (after).
Checkpoints are written at every third step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from kilobayes import checkpoint, cli
from kilobayes.workflows import folder

torch.set_num_threads(1)
kind, _, number = sys.argv[1].partition(":")
wanted = int(number or 0)
name = getattr(signal, sys.argv[2])
replace, add = os.replace, folder.Log.add
count = 0


def die() -> None:
    os.kill(os.getpid(), name)


def counted(function: Callable[..., Any], before: bool) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        global count
        count += 1
        if before and count == wanted:
            die()
        out = function(*args)
        if not before and count == wanted:
            die()
        return out

    return call


def due(self: checkpoint.Checkpoint, progress: Any) -> bool:
    return progress.done or progress.step % 3 == 0


checkpoint.Checkpoint.due = due  # type: ignore[method-assign]
if kind == "step":
    folder.Log.add = counted(add, before=False)  # type: ignore[method-assign]
elif kind in ("replace", "renamed"):
    os.replace = counted(replace, before=kind == "replace")
sys.exit(cli.run(sys.argv[3:]))

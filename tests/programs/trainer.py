"""A posterior collected under ``torchrun``, and each process's weights after its steps; a test runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

import kilobayes as kb
from tests.integrations.training import Recorder, plain, train

torch.set_num_threads(1)


def main(folder: Path) -> None:
    callback, seen = (
        kb.PosteriorCallback("SWAG(rank=2, start=0.5, rate_held=0.2)", folder / "run"),
        Recorder(),
    )
    train(plain(), folder / "trainer", callback, seen, per_device_train_batch_size=4)
    process = PartialState()
    tensors = {f"{step}|{key}": v for step, w in enumerate(seen.weights, 1) for key, v in w.items()}
    tensors["rates"] = torch.tensor(seen.rates)
    save_file(tensors, folder / f"process-{process.process_index}.safetensors")
    process.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

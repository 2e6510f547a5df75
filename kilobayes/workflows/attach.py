"""An adapter on its base, and where its training starts."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from kilobayes import host
from kilobayes.card import Card
from kilobayes.errors import KilobayesError
from kilobayes.hub import first_line
from kilobayes.models import Base
from kilobayes.options import Options
from kilobayes.random import generator
from kilobayes.types import Params, Posterior

HEAD_DEVIATION = 0.02  # of a new head's weights, as BERT's and most of its successors' initialisers


def device_of(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def attach(base: Base, options: Options) -> PeftModel:
    """The base with the adapter hosted on it, a stack of one."""
    targets: Any = options.target_modules
    if targets and targets != "all-linear":
        targets = [t.strip() for t in targets.split(",")]
    layers = [int(i) for i in options.layers.split(",")] if options.layers else None
    bare: Any = base.model
    blocks = getattr(bare.config, "num_hidden_layers", None)
    if layers and blocks is not None and max(layers) >= blocks:
        raise KilobayesError(f"--layers: there is no block {max(layers)}", f"found blocks 0 to {blocks - 1}")
    if layers and targets is None:
        kind, known = bare.config.model_type, host.KilobayesModel.target_module_mapping
        if kind not in known:
            raise KilobayesError("--layers needs --target-modules here", f"no defaults are known for {kind}")
        targets = list(known[kind])
    elsewhere = sorted(
        {n.rpartition(".")[0] for n in base.fresh if n.split(".")[0] not in ("classifier", "score")}
    )
    config = host.KilobayesConfig(
        adapter=options.adapter,
        target_modules=targets,
        layers_to_transform=layers,
        modules_to_save=elsewhere or None,
        seed=options.seed,
        task_type="SEQ_CLS" if options.task == "classify" else "CAUSAL_LM",
    )
    try:
        return get_peft_model(bare, config)  # type: ignore[return-value]
    except ValueError as error:  # PEFT's own, where the choice of modules leaves none
        raise KilobayesError(
            "the adapter does not fit this model",
            first_line(error).removeprefix("ValueError: "),
            "check --adapter, --target-modules and --layers",
        ) from None


def start(model: nn.Module, base: Base, seeds: list[int]) -> Params:
    """Initial leaves of a stack, member s from ``seeds[s]`` alone; a new head has a start for each."""
    theta, _ = host.initial(host.method(model), host.sites(model), seeds, host.constants(model))
    for key, value in host.read(model).items():
        if key in theta:
            continue
        path, _, leaf = key.rpartition("/")
        stack = value.detach().cpu().float().repeat(len(seeds), *[1] * (value.dim() - 1))
        if leaf == "weight" and f"{path}.weight" in base.fresh:
            draws = [torch.randn(value.shape[1:], generator=generator(seed, 4)) for seed in seeds]
            stack = HEAD_DEVIATION * torch.stack(draws)
        theta[key] = stack
    return theta


def card_of(
    options: Options, model: nn.Module, posterior: Posterior, print_: str, max_length: int, **more: Any
) -> Card:
    """What is saved beside a posterior that these options led to.

    Args:
        model: hosts the adapter.
        print_: fingerprint of the base.
        max_length: longest row in tokens.
        more: of the task: classes, paired, how rows are put to a language model.
    """
    return Card(
        posterior=repr(posterior),
        adapter=repr(host.method(model)),
        base=options.model,
        fingerprint=print_,
        max_length=max_length,
        samples=options.samples,
        seed=options.seed,
        target_modules=[site.name for site in host.sites(model)],
        dtype=options.dtype,
        task=options.task,
        **{"classes": [], **more},
    )


def member_seeds(seed: int, members: int) -> list[int]:
    """Seeds of an ensemble's members, apart from those of other runs' seeds."""
    return [1000 * seed + member for member in range(members)]

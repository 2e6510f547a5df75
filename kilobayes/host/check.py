"""A checkpoint's memory of the base that its adapter was made on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.errors import KilobayesError
from kilobayes.types import Params

TOLERANCE = 1e-2  # other processors round a decomposition of a bfloat16 base differently


class BaseCheck(nn.Module):
    """One number of four bytes for a site whose update depends on the base's weight, as LoRA-XS's does.

    It travels in the checkpoint, and loading one on another base raises an error instead of giving other
    predictions. Its bits are held as an integer, which ``model.to(dtype)`` does not round.

    Args:
        path: the site.
        constants: the adapter's constants there.

    Raises:
        KilobayesError: on loading, the checkpoint's number is another.
    """

    fingerprint: Tensor

    def __init__(self, path: str, constants: Params) -> None:
        super().__init__()
        self.path = path
        parts = [digest(value) for _, value in sorted(constants.items()) if not value.is_meta]
        total = torch.stack(parts).sum() if parts else torch.zeros(())
        self.register_buffer("fingerprint", total.float().reshape(1).view(torch.int32))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        theirs = state_dict.get(f"{prefix}fingerprint")
        if theirs is not None and not theirs.is_meta and not self.fingerprint.is_meta:
            found, wanted = (t.cpu().view(torch.float32).item() for t in (self.fingerprint, theirs))
            if wanted and found and abs(found - wanted) > TOLERANCE:
                raise KilobayesError(
                    "the adapter was trained on another base model",
                    f"{self.path} has the check value {found:.6g}, the checkpoint {wanted:.6g}",
                    "load the base that adapter_config.json names",
                )
        # the number stays that of the base at hand, whatever the checkpoint says
        ours = {**state_dict, f"{prefix}fingerprint": self.fingerprint}
        super()._load_from_state_dict(ours, prefix, *args, **kwargs)


def digest(value: Tensor) -> Tensor:
    """log of the norm, plus the correlation with cos(1), cos(2), ...: another matrix has another."""
    flat = value.detach().cpu().double().flatten()
    norm = flat.norm().clamp(min=1e-30)
    return norm.log() + (flat / norm) @ torch.arange(1, len(flat) + 1, dtype=torch.float64).cos()

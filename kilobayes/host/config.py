"""The configuration of the one PEFT method that hosts every adapter, and its place among PEFT's methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from kilobayes import spec
from kilobayes.errors import KilobayesError
from kilobayes.types import Adapter

NAME = "KILOBAYES"


def _add_member() -> PeftType:
    """Our member of PEFT's enumeration of methods, which has no public door for others.

    PEFT and transformers read ``peft_type.value``, so a plain string would not do. The prefix of parameters
    must be the name in lower case and an underscore: transformers rebuilds it that way.
    """
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    type.__setattr__(PeftType, NAME, member)
    return member


KILOBAYES = _add_member()


@dataclass
class KilobayesConfig(PeftConfig):
    """PEFT configuration of an adapter: ``get_peft_model(model, KilobayesConfig(adapter=LoRA(r=8)))``.

    Args:
        adapter: an adapter or its specification; kept as text, since PEFT writes it to
            ``adapter_config.json``.
        stack: S, how many adapters share the base. With S > 1 block s of the rows goes to member s, so the
            rows of a batch must divide by S; :func:`kilobayes.host.outer` shows every row to every member
            instead.
        target_modules: names or a regular expression of the modules to adapt, ``"all-linear"``, or None for
            PEFT's default of the architecture.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in PEFT's ``LoraConfig``.
        bias: "none", "all" or "kilobayes_only": biases of the base to train too, as PEFT does; they have no
            stack.
        init_weights: False draws a random non-zero update, for tests, as PEFT's own methods do.
        seed: member s starts from the numbers of seed + s.

    Raises:
        KilobayesError: an unknown adapter, or options that contradict each other.
    """

    adapter: Any = "LoRA()"
    stack: int = 1
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    init_weights: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = KILOBAYES
        self.adapter = repr(spec.adapter(self.adapter))
        if self.stack < 1:
            raise KilobayesError("stack must be at least 1", f"found {self.stack}")
        if self.bias not in ("none", "all", "kilobayes_only"):
            raise KilobayesError("bias must be none, all or kilobayes_only", f"found {self.bias!r}")
        if self.bias != "none" and self.stack > 1:
            raise KilobayesError(
                "biases of the base are shared by all members, so a stack cannot train them",
                f"bias={self.bias!r}, stack={self.stack}",
                'take bias="none" or stack=1',
            )
        # Sets, as in PEFT's own configurations.
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise KilobayesError(
                "layers_to_transform needs target_modules to be a list of names",
                f"found {self.target_modules!r}",
                "name the layers in the regular expression instead",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise KilobayesError(
                "layers_pattern says where layers_to_transform counts", "layers_to_transform is None"
            )

    @property
    def method(self) -> Adapter:
        return spec.adapter(self.adapter)

"""Into the host: a folder that PEFT saved, of a method that both know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from kilobayes.checkpoint import read_tensors
from kilobayes.errors import KilobayesError
from kilobayes.host import peft_vblora, peft_vera
from kilobayes.host.adopt import adopt
from kilobayes.host.config import KilobayesConfig
from kilobayes.host.stack import write

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONVERTED: dict[str, Any] = {"VBLORA": peft_vblora.from_peft, "VERA": peft_vera.from_peft}
KNOWN = ("LORA", "KILOBAYES", *CONVERTED)
KEPT = ("task_type", "base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "modules_to_save")  # fmt: skip


def load_peft(base: nn.Module, folder: str | Path) -> PeftModel:
    """The base with the adapter of PEFT's folder hosted on it as a stack of one, with the same logits.

    LoRA, VeRA and VB-LoRA (full and compact files, bfloat16 ones too) become ours; kilobayes' own load as
    they are. Nothing is unpickled.

    Args:
        base: the transformers model that the adapter was trained on, with the same head.

    Raises:
        KilobayesError: no such folder, another method, or what the method's converter refuses.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():  # PEFT would look for a pickle, then ask the hub
            raise KilobayesError(
                f"{folder / name} is missing", remedy="name a folder that save_pretrained wrote"
            )
    config: Any = PeftConfig.from_pretrained(str(folder))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in KNOWN:
        raise KilobayesError(f"adapters of the method {kind} cannot be read", f"known: {', '.join(KNOWN)}")
    if kind not in CONVERTED:
        model: Any = PeftModel.from_pretrained(base, str(folder))  # type: ignore[arg-type]
        return adopt(model) if kind == "LORA" else model
    tensors, _ = read_tensors(folder / WEIGHTS)
    adapter, theta = CONVERTED[kind](tensors, config)
    kept = {key: getattr(config, key, None) for key in KEPT}
    model = get_peft_model(base, KilobayesConfig(adapter=adapter, **kept))  # type: ignore[arg-type]
    write(model, theta)
    return model.eval()  # type: ignore[no-any-return]

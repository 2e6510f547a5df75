"""Base models: found by name, checked, loaded from safetensors alone, with a head of the right classes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kilobayes.errors import KilobayesError, nearest
from kilobayes.hub import first_line
from kilobayes.model_files import check_minilm, model_folder, resolve

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Base", "fingerprint", "load_base", "load_causal", "resolve"]

HEAD_SEED = 0


@dataclass(frozen=True, eq=False)
class Base:
    """A pretrained model with a classification head, or one that continues text, in evaluation mode.

    Attributes:
        model: a sequence-classification or causal model of transformers.
        tokenizer: its tokenizer, with a pad token.
        name: the name it was asked for by.
        fresh: names of the parameters that the files did not hold and that are therefore random: the head,
            and in some encoders the pooler. They must be trained and saved with the adapter.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    fresh: tuple[str, ...]

    @property
    def longest(self) -> int | None:
        """Longest row in tokens that both tokenizer and model take, or None where neither states a limit."""
        positions = getattr(_text_config(self.model), "max_position_embeddings", None)
        limits = [
            n for n in (positions, self.tokenizer.model_max_length) if isinstance(n, int) and 0 < n < 10**9
        ]
        return min(limits, default=None)


def load_base(name: str, classes: Sequence[str], *, dtype: str = "float32", device: str = "cpu") -> Base:
    """Loads a model for C classes.

    A head that the files lack, or hold for another number of classes, starts at random from a fixed seed; the
    global generators are left as they were. Only safetensors are read and no code from the repository is run.

    Args:
        name: ``"minilm"`` (all-MiniLM-L6-v2 from the extra ``demo``, its weights checked by SHA-256), a
            directory, or a hub id.
        classes: class names in index order; they go into the configuration as ``id2label``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: as torch names it.

    Raises:
        KilobayesError: what is wrong with the name, the directory, the architecture, the weights or the
            device; fewer than two classes, or one named twice.
    """
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise KilobayesError(
            "a classifier needs two or more classes of different names",
            f"found: {', '.join(classes) or 'none'}",
            "name them in index order",
        )
    labels = dict(enumerate(classes))
    auto = "AutoModelForSequenceClassification"
    return _load(
        *(auto, name, dtype, device),
        num_labels=len(labels),
        id2label=labels,
        label2id={label: i for i, label in labels.items()},
        ignore_mismatched_sizes=True,  # a head for other classes; anything else is refused below
    )


def load_causal(name: str, *, dtype: str = "float32", device: str = "cpu") -> Base:
    """Loads a model that continues text, as :func:`load_base` loads one that classifies.

    Raises:
        KilobayesError: as :func:`load_base`; weights that the files do not hold.
    """
    base = _load("AutoModelForCausalLM", name, dtype, device)
    if base.fresh:
        raise KilobayesError(
            f"{name} is no language model that continues text",
            f"its files do not hold {base.fresh[0]}",
            "take a causal language model, or --task classify",
        )
    return base


def _load(auto: str, name: str, dtype: str, device: str, **keywords: Any) -> Base:
    """A model by one of transformers' automatic classes, and its tokenizer."""
    folder = model_folder(name)
    kind, place = _dtype(dtype), _device(device)
    if name == "minilm":
        check_minilm(Path(folder))
    import torch
    import transformers

    local = {"trust_remote_code": False, "local_files_only": True}
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(HEAD_SEED)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
            model, info = getattr(transformers, auto).from_pretrained(
                folder, dtype=kind, use_safetensors=True, output_loading_info=True, **local, **keywords
            )
    except Exception as error:  # files can be wrong in many ways, each with another library's exception
        raise _explained(name, error) from None
    fresh = _fresh(name, model, info)
    _set_pad(tokenizer, model)
    if kind is torch.bfloat16 and place.type == "cpu":
        # torch's fused attention on the CPU takes 60% of a bfloat16 training step in its backward pass
        model.set_attn_implementation("eager")
    return Base(model.to(place).eval(), tokenizer, name, fresh)


def _dtype(name: str) -> torch.dtype:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        guess = nearest(name, known)
        raise KilobayesError(
            f'unknown dtype "{name}"', f"known: {', '.join(known)}", f"did you mean {guess}?" if guess else ""
        )
    return known[name]


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise KilobayesError(
            f'the device "{name}" cannot be used', first_line(error), "use cpu or cuda"
        ) from None
    return device


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No loading reports and bars from transformers; the user's settings come back afterwards."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _explained(name: str, error: Exception) -> KilobayesError:
    text = first_line(error)
    if type(error).__name__ == "SafetensorError":
        return KilobayesError(f"the weights of {name} are damaged", text, "copy or download them again")
    if "custom code" in text:
        return KilobayesError(
            f"{name} wants to run code of its own", "its config.json has auto_map", "use another model"
        )
    if "architecture" in text or "Unrecognized" in text or "model_type" in text:
        return KilobayesError(
            f"{name} is of no architecture that can do this task here",
            text,
            "check model_type in its config.json",
        )
    return KilobayesError(f"{name} cannot be loaded", text, "check that the directory is complete")


def _fresh(name: str, model: nn.Module, info: dict[str, Any]) -> tuple[str, ...]:
    """Names that start at random; an error if the backbone itself did not come out of the files."""
    within = f"{getattr(model, 'base_model_prefix', '')}."
    misfits = [entry for entry in info["mismatched_keys"] if entry[0].startswith(within)]
    if misfits:
        key, stored, wanted = misfits[0]
        raise KilobayesError(
            f"the weights of {name} do not fit its config.json",
            f"{key} is {tuple(stored)} in the file and {tuple(wanted)} in the configuration",
        )
    fresh = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    sizes = {key: value.numel() for key, value in model.state_dict().items() if key.startswith(within)}
    missing = sum(size for key, size in sizes.items() if key in fresh)
    if 2 * missing > sum(sizes.values()):
        raise KilobayesError(
            f"the weights of {name} are not those of its architecture",
            f"{missing:,} of {sum(sizes.values()):,} base parameters are not in the files",
            "check model_type in its config.json",
        )
    return tuple(sorted(fresh))


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _set_pad(tokenizer: Any, model: nn.Module) -> None:
    """Decoders find the last token of a row by the pad id, so model and tokenizer must agree on one."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise KilobayesError("the tokenizer has neither a pad token nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    whole: Any = model.config
    for config in (whole, _text_config(model)):
        config.pad_token_id = tokenizer.pad_token_id
        if hasattr(config, "use_cache"):
            config.use_cache = False  # nothing is generated; a cache would only take memory


def fingerprint(model: nn.Module, exclude: Iterable[str] = ()) -> str:
    """SHA-256 over the name, shape and up to 4096 evenly strided values of every saved tensor of a model.

    A check against mixing up base models, not against malice: values between the strides are not seen. Take
    it before anything wraps the model, since names count. Values are compared as float32, so a copy rounded
    to bfloat16 has another fingerprint than its original (its outputs differ too), while widening it again
    keeps the fingerprint.

    Args:
        model: the base; buffers that its files do not hold are left out.
        exclude: names of tensors or modules to leave out, such as a head that is trained.
    """
    import torch

    left_out = tuple(exclude)
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if any(key == name or key.startswith(f"{name}.") for name in left_out):
            continue
        flat = value.detach().reshape(-1)
        step = max(1, -(-flat.numel() // 4096))
        digest.update(f"{key} {tuple(value.shape)}\n".encode())
        digest.update(flat[::step].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()

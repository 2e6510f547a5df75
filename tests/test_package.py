"""The package as it is shipped: cheap to import, whole in its wheel, free of one machine's paths."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import kilobayes

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "sklearn", "scipy", "pandas", "datasets", "matplotlib")
RUN = """
import resource, sys
{body}
used = resource.getrusage(resource.RUSAGE_SELF)
print("loaded:", *sorted(sys.modules), file=sys.stderr)
print(f"cpu: {{used.ru_utime + used.ru_stime:.2f}} s", file=sys.stderr)
"""


def loaded(body: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after some code; its processor time is printed."""
    command = [sys.executable, "-c", RUN.format(body=body)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = dict(re.findall("^(loaded|cpu): (.*)$", done.stderr, re.MULTILINE))
    print(f"{body.splitlines()[-1]!r}: {lines['cpu']} of processor time")
    return {name.split(".")[0] for name in lines["loaded"].split()}


def cli(*arguments: str) -> str:
    return f"""
from kilobayes.cli import app
app({list(arguments)!r}, standalone_mode=False)"""


def test_importing_it_imports_nothing_heavy() -> None:
    found = loaded("import kilobayes; kilobayes.__version__, dir(kilobayes)")
    assert not found & {*HEAVY, "numpy", "typer", "rich", "yaml"}


@pytest.mark.parametrize(
    "line", ["--help", "list", "list --json", "train --help", "predict --help", "demo --help"]
)
def test_commands_that_only_tell_import_nothing_heavy(line: str) -> None:
    assert not loaded(cli(*line.split())) & {*HEAVY, "numpy"}


def test_the_check_sees_what_is_heavy() -> None:
    assert {"torch", "numpy"} <= loaded("import kilobayes; kilobayes.Point")


@pytest.mark.parametrize("name", kilobayes.__all__)
def test_public_names_are_there(name: str) -> None:
    value = getattr(kilobayes, name)
    assert name.startswith("__") or value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Classifer"):
        kilobayes.Classifer  # noqa: B018


def test_version_is_that_of_the_installation() -> None:
    assert version("kilobayes") == kilobayes.__version__
    assert f"## [{kilobayes.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_wheel_holds_all_that_the_package_reads(tmp_path: Path) -> None:
    tracked = [p for p in (ROOT / "kilobayes").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and re.search(r"hatchling|connection|resolve", done.stderr, re.IGNORECASE):
        pytest.skip("the build backend cannot be fetched")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"kilobayes-{kilobayes.__version__}.dist-info/METADATA").decode()
    assert {p.relative_to(ROOT).as_posix() for p in tracked} <= names
    assert {"kilobayes/py.typed", "kilobayes/report/page.html", "kilobayes/report/page.css"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("kilobayes/", "kilobayes-"))]
    assert f"Version: {kilobayes.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata


def tracked_files() -> list[Path]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run([git, "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git cannot list the files: {done.stderr.strip()}")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """The file's text, or nothing where it is binary."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_no_paths_of_one_machine() -> None:
    # written in pieces, or this file would be among those found
    folders = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/[a-z]", "/Us" + "ers/[a-z]", "/t" + "mp/dev"]
    beside = "../sha" + "red"
    pattern = re.compile("|".join([*folders, "work" + "place", re.escape(beside)]))
    found = {
        path.relative_to(ROOT).as_posix(): set(pattern.findall(text_of(path))) for path in tracked_files()
    }
    found[".ci/run"].remove(beside)  # the one file that may say where such a folder is looked for
    assert not {name: words for name, words in found.items() if words}


def test_pre_commit_reads_its_configuration() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_constraints_pin_every_requirement() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {normal(line.split("==")[0]) for line in lines if "==" in line and not line.startswith("#")}
    extras = [r for extra in settings["optional-dependencies"].values() for r in extra]
    wanted = [*settings["dependencies"], *extras]
    assert {normal(re.split(r"[<>=!~\[ ;]", requirement)[0]) for requirement in wanted} <= pins
    assert all("==" in line or line.startswith("#") for line in lines if line)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

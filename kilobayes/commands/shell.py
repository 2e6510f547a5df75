"""Between a command and the shell: silence, exit codes, and errors in a few lines."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import Any

from kilobayes.errors import explained


def quiet() -> None:
    """No chatter of other libraries, at the command line alone; ``PYTHONWARNINGS`` brings it back."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run(app: Any, arguments: list[str]) -> int:
    """A command line of an application, without the program's name; returns the exit code."""
    try:
        code: int = app(arguments or ["--help"], prog_name="kilobayes", standalone_mode=False) or 0
        if code == 130:  # what typer makes of Ctrl-C
            sys.stderr.write("stopped\n")
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except Exception as error:
        told = explained(error)
        if told is None:
            raise
        found = told.found.removeprefix("found").lstrip(": ")
        if "--json" in arguments:
            parts = {"error": told.wrong, "found": found, "remedy": told.remedy}
            sys.stdout.write(json.dumps(parts) + "\n")
        lines = [f"error: {told.wrong}", found and f"found: {found}", told.remedy and f"try:   {told.remedy}"]
        sys.stderr.write("\n".join(line for line in lines if line) + "\n")
        return told.exit_code

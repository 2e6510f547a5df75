"""A command line in a process forked where all is imported; ``words`` and ``log`` are given to it."""

import os
import sys
from typing import Any

import torch

from kilobayes import cli

given: Any = globals()
torch.set_num_threads(1)
talk = os.open(given["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(talk, 1)
os.dup2(talk, 2)
sys.exit(cli.run(given["words"]))

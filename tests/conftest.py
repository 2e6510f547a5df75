"""One thread for every test; warnings of other libraries about each other are not ours to mend."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # PEFT 0.21 asks transformers 5.23 for an attribute under its old name
    config.addinivalue_line("filterwarnings", "ignore:.*is_gradient_checkpointing.*:FutureWarning")
    torch.set_num_threads(1)

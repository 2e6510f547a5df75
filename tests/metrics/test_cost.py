import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from kilobayes.metrics import measure


def test_sleeping_takes_wall_time_but_no_processor_time():
    with measure() as cost:
        time.sleep(0.2)
    assert 0.2 <= cost["seconds"] < 5
    assert cost["cpu_seconds"] < cost["seconds"] / 2


def test_working_takes_processor_time():
    with measure() as cost:
        start = time.process_time()
        while time.process_time() - start < 0.1:
            pass
    assert cost["cpu_seconds"] >= 0.1


def test_peak_is_a_high_water_mark():
    pytest.importorskip("resource")
    # In a process of its own, where nothing large came before; what this process ever held must not count.
    held = bytearray(b"1") * 300_000_000
    code = """
from kilobayes.metrics import measure
with measure() as small:
    pass
with measure() as large:
    bytearray(b"1") * 64_000_000
with measure() as after:
    pass
print(*(int(cost["peak_bytes"]) for cost in (small, large, after)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    small, large, after = map(int, done.stdout.split())
    assert len(held) > small > 5_000_000  # bytes, not KiB
    assert large - small > 50_000_000
    assert after >= large


def test_filled_also_when_the_block_raises():
    cost = {}

    def fail():
        nonlocal cost
        with measure() as cost:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert cost["seconds"] >= 0


def test_does_not_import_pytorch():
    code = (
        "import sys; from kilobayes.metrics import measure\nwith measure() as cost: pass\n"
        "print('torch' in sys.modules, 'cuda_peak_bytes' in cost)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_cuda_peaks_are_reset_then_summed_over_devices(monkeypatch):
    calls = []
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        synchronize=lambda device: calls.append(("synchronize", device)),
        reset_peak_memory_stats=lambda device: calls.append(("reset", device)),
        max_memory_allocated=lambda device: [1000, 24][device],
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with measure() as cost:
        calls.append(("block", 0))
    assert cost["cuda_peak_bytes"] == 1024
    start = calls.index(("block", 0))
    assert {("reset", 0), ("reset", 1)} <= set(calls[:start])
    assert calls[start + 1 :] == [("synchronize", 0), ("synchronize", 1)]


def test_cuda_that_is_not_in_use_is_not_started(monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with measure() as cost:
        pass
    assert "cuda_peak_bytes" not in cost

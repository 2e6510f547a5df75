"""What a block of code costs: seconds and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def measure() -> Iterator[dict[str, float]]:
    """Measures a block; the dictionary it yields is filled when the block ends, also when it raises.

    ``seconds``: wall time. ``cpu_seconds``: processor time of all threads of this process, not of its
    children.

    ``peak_bytes``: the most memory the process ever had resident, *since its program started* (a high-water
    mark that never falls). It is not the block's own use: earlier peaks and the interpreter count. To compare
    runs, give each a process of its own. Left out where the system does not tell (Windows).

    ``cuda_peak_bytes``: the most memory PyTorch had allocated for tensors during the block, summed over CUDA
    devices; only if PyTorch was already using CUDA when the block ended. It is the allocator's count: not
    what it keeps reserved, nor the CUDA context, so less than ``nvidia-smi`` shows. Entering resets PyTorch's
    peak counter, so of two nested blocks the outer one only sees the peak since the inner one began. The wall
    time waits for CUDA.

    Example:
        >>> with measure() as cost:
        ...     total = sum(range(1000))
        >>> cost["seconds"] >= 0
        True
    """
    cuda = _cuda()
    for device in range(cuda.device_count() if cuda else 0):
        cuda.synchronize(device)
        cuda.reset_peak_memory_stats(device)
    cost: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield cost
    finally:
        cuda = _cuda()
        devices = range(cuda.device_count() if cuda else 0)
        for device in devices:
            cuda.synchronize(device)
        cost["seconds"] = time.perf_counter() - wall
        cost["cpu_seconds"] = time.process_time() - cpu
        if (peak := peak_resident_bytes()) is not None:
            cost["peak_bytes"] = float(peak)
        if devices:
            cost["cuda_peak_bytes"] = float(sum(cuda.max_memory_allocated(device) for device in devices))


def peak_resident_bytes() -> int | None:
    """The process's high-water mark of resident memory, or None where the system does not tell.

    On Linux this is ``VmHWM``. ``ru_maxrss`` is only the fallback, because a child process starts with its
    parent's: a small job started by a large one would look large.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # "VmHWM:  8740 kB", in KiB
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def _cuda() -> Any:
    """``torch.cuda`` if it is already in use; asking must neither import PyTorch nor start CUDA."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_available() and cuda.is_initialized() else None

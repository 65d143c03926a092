"""The memory of a device: what is free, how it is let go, and how sizes are printed."""

from __future__ import annotations

import gc
import os

import torch


def free_memory(device: torch.device) -> int:
    """Memory that could still be taken on a device.

    Args:
        device: CPU or CUDA.

    Returns:
        Bytes; on CUDA with what torch's allocator keeps for later; on Linux MemAvailable, lowered by a control group's limit; elsewhere
        the free physical pages, or 4 GiB.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = 4 << 30
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as now,
        ):
            free = min(free, int(limit.read()) - int(now.read()) + _cached_files())
    except (OSError, ValueError):
        pass  # no control group, or "max"
    return max(free, 1)


def _cached_files() -> int:
    """Bytes that a control group counts as used, and gives up when asked."""
    try:
        with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as lines:
            return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
    except (OSError, ValueError):
        return 0


def release(device: torch.device) -> None:
    """Give back what is no longer used; call it outside of an exception's handler, whose frames hold graphs.

    Args:
        device: Where memory is short.

    Cost: one collection of cycles, about 0.1 s.
    """
    gc.collect()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def megabytes(number: float) -> str:
    """A number of bytes for people.

    Args:
        number: Bytes.

    Returns:
        In MiB, with decimals where it is less than one.

    Example:
        >>> megabytes(3 << 20)
        '3 MiB'
    """
    return f"{number / 2**20:,.0f} MiB" if number >= 2**20 else f"{number / 2**20:.2f} MiB"

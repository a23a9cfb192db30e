"""What a process takes of the memory."""

from pathlib import Path


def resident_kilobytes(pid: int) -> int:
    """Return a process's resident memory, from /proc."""
    return _kilobytes(pid, "VmRSS:")


def most_resident_kilobytes(pid: int) -> int:
    """Return the most that a process's resident memory has been."""
    return _kilobytes(pid, "VmHWM:")


def _kilobytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

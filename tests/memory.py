"""What a process takes of the memory."""

from pathlib import Path

from collab_service import memory


def resident_kilobytes(pid: int) -> int:
    """Return a process's resident memory, from /proc."""
    return _kilobytes(pid, "VmRSS:")


def most_resident_kilobytes(pid: int) -> int:
    """Return the most that a process's resident memory has been."""
    return _kilobytes(pid, "VmHWM:")


def used_bytes() -> int:
    """Return this process's resident memory, without what is free."""
    memory.give_back()
    return memory.resident_bytes()


def _kilobytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

"""What a process takes of the memory."""

from pathlib import Path


def resident_kilobytes(pid: int) -> int:
    """Return a process's resident memory, from /proc."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

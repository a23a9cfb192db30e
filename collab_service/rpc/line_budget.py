"""Telling of what happens by the thousand without a line of the log for each."""

import time


class LineBudget:
    """Lets some lines a second through; each tells how many it stands for."""

    def __init__(self, lines: int) -> None:
        """Let at most so many lines a second through."""
        self._lines = lines
        self._left = lines
        self._second = 0
        self._untold = 0

    def take(self) -> int:
        """Count one more; return how many the line to be written tells of, or 0 when none is to be written now."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._left = second, self._lines
        self._untold += 1
        if not self._left:
            return 0
        self._left -= 1
        untold, self._untold = self._untold, 0
        return untold

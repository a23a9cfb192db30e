"""What the bench found: printed while it runs, then written as Markdown for people and as JSON for programs."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from collab_service.storage.embedded import Cluster
from tests.bench.pictures import Picture, draw

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


class Row(Struct, frozen=True):
    """A figure."""

    what: str
    figure: str
    """With its unit: `5,854/s`, or `1.52 / 2.80 ms`."""
    numbers: list[float]
    """Those in the figure."""
    ratio: float | None
    """To the reference that was measured beside it."""
    floor: str
    """What the figure or its ratio has to be; empty when it need not be anything."""
    holds: bool | None
    """Whether it is; None without a floor."""


class Section(Struct, frozen=True):
    """Figures that belong together."""

    title: str
    rows: list[Row]
    pictures: list[Picture]


class Report:
    """Collects figures and pictures by section."""

    def __init__(self, machine: Mapping[str, str], date: datetime) -> None:
        """Begin.

        Args:
            machine: What the figures depend on.
            date: When they were measured.
        """
        self._machine = machine
        self._date = date
        self._sections: list[Section] = []

    @property
    def failed(self) -> bool:
        """Whether a figure is below its floor."""
        return any(row.holds is False for section in self._sections for row in section.rows)

    def section(self, title: str) -> None:
        """Begin a section; what follows belongs to it."""
        print(f"\n{title}:", flush=True)
        self._sections.append(Section(title, [], []))

    def tell(
        self, what: str, figure: str, floor: str = "", holds: bool | None = None, *, ratio: float | None = None
    ) -> None:
        """Print a figure and keep it; see `Row`."""
        row = Row(what, figure, numbers_in(figure), ratio, floor, holds)
        ratio_text = "" if ratio is None else f"{ratio:.2f}"
        print(f"  {what:<58} {figure:>26} {ratio_text:>6}   {floor:<12} {_verdict(row)}".rstrip(), flush=True)
        self._sections[-1].rows.append(row)

    def show(self, picture: Picture) -> None:
        """Add a picture to the section."""
        self._sections[-1].pictures.append(picture)

    def write(self, directory: Path) -> None:
        """Write `results.md`, `results.json` and the pictures into a directory, which is made when it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        for section in self._sections:
            for picture in section.pictures:
                draw(picture, directory)
        date = self._date.isoformat(timespec="seconds")
        found = {"date": date, "machine": dict(self._machine), "failed": self.failed, "sections": self._sections}
        (directory / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
        lines = ["# What `make bench` found", "", f"* Date: {date}"]
        lines += [f"* {name}: {value}" for name, value in self._machine.items()]
        for section in self._sections:
            lines += ["", *_markdown(section)]
        (directory / "results.md").write_text("\n".join(lines) + "\n")


def machine(cluster: Cluster) -> dict[str, str]:
    """Return what the figures depend on: the machine and the programs."""
    postgres = subprocess.run([cluster.bin / "postgres", "--version"], capture_output=True, text=True, check=True)
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "CPU": models[0] if models else platform.machine(),
        "Cores": str(os.cpu_count()),
        "Memory": f"{memory:.0f} GiB",
        "Kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "Python": platform.python_version(),
        "PostgreSQL": postgres.stdout.split(") ")[-1].strip(),
    }


def numbers_in(figure: str) -> list[float]:
    """Return the numbers of a figure as it is printed: 1.52 and 2.8 of `1.52 / 2.80 ms`."""
    return [float(number.replace(",", "")) for number in _NUMBER.findall(figure)]


def _markdown(section: Section) -> list[str]:
    lines = [
        f"## {section.title}",
        "",
        "| what | figure | ratio to the reference | floor | |",
        "|---|---:|---:|---|---|",
    ]
    for row in section.rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.what} | {row.figure} | {ratio} | {row.floor} | {_verdict(row)} |")
    for picture in section.pictures:
        lines += ["", f"![{picture.title}]({picture.name}.svg)"]
    return lines


def _verdict(row: Row) -> str:
    if row.holds is None:
        return ""
    return "ok" if row.holds else "BELOW ITS FLOOR"

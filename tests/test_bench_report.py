"""What `make bench` leaves behind: a table for people, the same for programs, and pictures."""

import json
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.bench.pictures import Curve, Panel, Picture, draw
from tests.bench.report import Report, numbers_in

WRITERS = [1, 10, 100, 1_000]
PICTURE = Picture(
    "growth-writers",
    "Writers",
    [
        Panel("writers", "appends/s", [Curve("one session", WRITERS, [650, 3_000, 5_200, 5_100])]),
        Panel("payload", "ms", [Curve("p50", ["0 B", "1 MiB"], [0.9, 90]), Curve("p99", ["0 B", "1 MiB"], [1.4, 100])]),
    ],
)


def made_up_report() -> Report:
    """Return a report with a figure above its floor, one below, one without, and a picture."""
    report = Report({"CPU": "one of ours", "Cores": "2"}, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    report.section("Writers on one session")
    report.tell("64 writers", "5,854/s, 1.52 / 2.80 ms")
    report.tell("64 writers / pgbench", "4.0", ">= 5", False, ratio=4.0)
    report.show(PICTURE)
    report.section("Sessions")
    report.tell("10,000 sessions / one session", "5,332/s", ">= 0.7", True, ratio=0.94)
    return report


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`results.md` says where and when, and has a table for each section, with the verdicts and the pictures."""
    made_up_report().write(tmp_path / "bench-results")
    assert (
        (tmp_path / "bench-results" / "results.md").read_text()
        == """\
# What `make bench` found

* Date: 2026-01-02T03:04:05+00:00
* CPU: one of ours
* Cores: 2

## Writers on one session

| what | figure | ratio to the reference | floor | |
|---|---:|---:|---|---|
| 64 writers | 5,854/s, 1.52 / 2.80 ms |  |  |  |
| 64 writers / pgbench | 4.0 | 4.00 | >= 5 | BELOW ITS FLOOR |

![Writers](growth-writers.svg)

## Sessions

| what | figure | ratio to the reference | floor | |
|---|---:|---:|---|---|
| 10,000 sessions / one session | 5,332/s | 0.94 | >= 0.7 | ok |
"""
    )
    printed = capsys.readouterr().out
    assert printed.count("BELOW ITS FLOOR") == 1
    assert "5,854/s, 1.52 / 2.80 ms" in printed


def test_the_same_for_programs(tmp_path: Path) -> None:
    """`results.json` has every figure as numbers, every verdict, and the curves behind the pictures."""
    made_up_report().write(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["failed"] is True
    assert found["machine"] == {"CPU": "one of ours", "Cores": "2"}
    writers, sessions = found["sections"]
    assert writers["rows"][0]["numbers"] == [5854, 1.52, 2.8]
    assert [row["holds"] for row in writers["rows"] + sessions["rows"]] == [None, False, True]
    [curve] = writers["pictures"][0]["panels"][0]["curves"]
    assert curve == {"label": "one session", "x": WRITERS, "y": [650, 3_000, 5_200, 5_100]}


def test_pictures_are_the_same_for_the_same_figures(tmp_path: Path) -> None:
    """A picture is an SVG that needs no font, and is written byte for byte alike each time."""
    first = draw(PICTURE, tmp_path).read_bytes()
    assert ET.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"
    assert b"<text" not in first
    assert draw(PICTURE, tmp_path).read_bytes() == first


@pytest.mark.parametrize(
    ("figure", "numbers"),
    [("5,854/s", [5854]), ("1.52 / 2.80 ms", [1.52, 2.8]), ("0.85", [0.85]), ("65.6 MB/s", [65.6])],
)
def test_numbers_in_a_figure(figure: str, numbers: list[float]) -> None:
    """What is printed for people can be read by programs."""
    assert numbers_in(figure) == numbers

"""What was drilled, how each run ended and what was lost: the table of docs/guide/reliability.md.

With PROMA_RELIABILITY=docs/guide/reliability.md in the environment, the table between the two marks
of that file is replaced at the end of the session.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "PROMA_RELIABILITY"
BEGIN, END = "<!-- drills: begin -->", "<!-- drills: end -->"
_HEAD = "| what was done | when | layout | drills | how the run ended | what was lost |"
_LONGEST = 150  # characters of a sentence


@dataclass(frozen=True)
class Entry:
    """One drill; equal ones share a line."""

    order: int  # of the subject in the table
    what: str
    when: str
    layout: str
    ended: str  # exit code and sentence, shortened
    lost: str


DRILLS: list[Entry] = []
_ORDER = (
    "SIGKILL",
    "SIGUSR1",
    "SIGTERM",
    "trainer",
    "SIGSTOP",
    "reward",
    "disk",
    "run directory",
    "file",
    "clock",
)


def record(what: str, when: str, layout: str, code: int, said: str, lost: list[str]) -> None:
    """Note a drill; the test that calls this fails by itself if anything was lost."""
    order = next((i for i, word in enumerate(_ORDER) if word in what), len(_ORDER))
    ended = f"exit {code}: {shortened(said)}" if code else "exit 0"
    DRILLS.append(Entry(order, what, when, layout, ended, "; ".join(lost) or "nothing"))


def shortened(said: str) -> str:
    """A sentence without what differs from drill to drill."""
    said = said.removeprefix("error: ")
    said = re.sub(r"\S*/?runs/(\w+)", r"runs/\1", said)
    said = re.sub(r"rank \d", "rank r", said)
    said = re.sub(r"\d[\d,.]* (s|bytes|MiB)\b", r"n \1", said)
    said = re.sub(r"(step|warm_start)_\d{6}", r"\1_n", said)
    said = re.sub(r"after step \d+|before the first RL step", "after step n", said)
    said = re.sub(r"__\d_\d", "__r_n", said)
    said = said.replace("|", "\\|")
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST].rsplit(' ', 1)[0]} …"


def table(entries: list[Entry]) -> str:
    """Markdown; drills that differ in layout alone share a line."""
    layouts: dict[Entry, list[str]] = {}
    counts: Counter[Entry] = Counter()
    for entry in entries:
        key = Entry(entry.order, entry.what, entry.when, "", entry.ended, entry.lost)
        counts[key] += 1
        if entry.layout not in layouts.setdefault(key, []):
            layouts[key].append(entry.layout)
    lines = [_HEAD, "|---" * 6 + "|"]
    for key in sorted(layouts, key=lambda e: (e.order, e.what, e.when, e.ended)):
        where = ", ".join(sorted(layouts[key]))
        cells = (key.what, key.when, where, str(counts[key]), key.ended, key.lost)
        lines.append(f"| {' | '.join(cells)} |")
    lost = sum(entry.lost != "nothing" for entry in entries)
    lines += ["", f"{len(entries)} drills; {lost or 'none'} of them lost anything."]
    return "\n".join(lines)


def write() -> None:
    """Put the table into the file that the environment names, if it names one."""
    name = os.environ.get(VARIABLE)
    if not name or not DRILLS:
        return
    path = Path(name)
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n\n{table(DRILLS)}\n\n{END}{after}")

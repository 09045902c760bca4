"""The file of results: rows are added as they are finished, and may be kept by a later run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from benchmarks.cost.settings import Setting
from proma_megatron.config.fields import Section
from proma_megatron.errors import ConfigError
from proma_megatron.files import atomic_write

Row = dict[str, Any]


def setting_of(row: Row) -> Setting:
    return Setting.model_validate({key: row[key] for key in Setting.model_fields})


class Results:
    """A JSON document with ``rows``, one a setting, and ``notes`` about all of them."""

    kind: ClassVar[type[Section]] = Setting

    def __init__(self, path: Path, rows: Sequence[Row] = (), notes: Row | None = None) -> None:
        self.path = path
        self.rows = list(rows)
        self.notes = notes or {}

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            ConfigError: the file is missing, or no such document.
        """
        try:
            found = json.loads(path.read_text())
            return cls(path, found["rows"], {k: v for k, v in found.items() if k != "rows"})
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--json is {path}, which holds no results; measure first, without --draw or "
                "--resume"
            ) from None

    @classmethod
    def begin(cls, path: Path, *, resume: bool) -> Self:
        """The file that is there, to go on with, or an empty one in its place.

        Raises:
            ConfigError: the file that is there is no such document.
        """
        results = cls.read(path) if resume and path.exists() else cls(path)
        results.write()
        return results

    def setting(self, row: Row) -> Section:
        return self.kind.model_validate({key: row[key] for key in self.kind.model_fields})

    def row(self, setting: Section) -> Row | None:
        return next((row for row in self.rows if self.setting(row) == setting), None)

    def missing[Kind: Section](self, settings: Sequence[Kind]) -> list[Kind]:
        return [setting for setting in settings if self.row(setting) is None]

    def add(self, row: Row) -> None:
        """A row in place of an earlier one of its setting; the file is complete at any time."""
        kept = [found for found in self.rows if self.setting(found) != self.setting(row)]
        self.rows = [*kept, row]
        self.write()

    def note(self, notes: Mapping[str, Any]) -> None:
        self.notes.update(notes)
        self.write()

    def write(self) -> None:
        with atomic_write(self.path) as part:
            part.write_text(json.dumps({**self.notes, "rows": self.rows}, indent=1) + "\n")


def line(setting: Setting, row: Row) -> str:
    """What is shown of a row while the benchmark runs."""
    ratios = row["ratios"]
    shown = "   ".join(
        f"{name} {found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        for name, found in ratios.items()
    )
    peak = row["peak_bytes"]
    extra = ", ".join(
        f"{way} +{(found - peak['plain']) / 2**20:.0f} MiB"
        for way, found in peak.items()
        if way in row["seconds"] and way != "plain"
    )
    return (
        f"{setting.name}: plain {row['seconds']['plain']:7.3f} s, {row['rounds']:>2} rounds   "
        f"{shown}   {extra}"
    )

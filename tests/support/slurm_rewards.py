"""Reward functions of jobs; scoring processes import this, so it may load nothing slow."""

from __future__ import annotations

import os
import time
from pathlib import Path

import proma_megatron
from proma_megatron.observability.metrics import read_metrics

FOLDER = "PROMA_TEST_FOLDER"  # in the environment of a job: where the test tells it things


def varied(prompt: str, completion: str, reference: str) -> float:
    """One that differs between the completions of a policy that has learned next to nothing.

    After the step that a file `closed` names it does not come for as long as the file says so.
    """
    while _closed(Path(os.environ[FOLDER])):
        time.sleep(0.02)
    return sum(map(ord, completion)) % 7 / 6


def failing(prompt: str, completion: str, reference: str) -> float:
    raise ValueError("the answer key is lost")


def placed(prompt: str, completion: str, reference: str) -> float:
    """Leaves behind where the code is that the job runs."""
    place = Path(proma_megatron.__file__).resolve().parent
    (Path(os.environ[FOLDER]) / "place").write_text(str(place))
    return 0.0


def _closed(folder: Path) -> bool:
    try:
        after = int((folder / "closed").read_text())
    except FileNotFoundError:
        return False
    metrics = Path((folder / "metrics").read_text())
    rows = read_metrics(metrics) if metrics.exists() else []
    if max((row["step"] for row in rows if row["phase"] == "rl"), default=0) < after:
        return False
    (folder / f"reached_{after}").touch()
    return True

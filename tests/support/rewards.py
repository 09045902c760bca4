"""Reward functions of drills; scoring processes import this, so it may load nothing slow."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

MOOD = Path("mood")  # in the folder that the run was started from


def varied(prompt: str, completion: str, reference: str) -> float:
    """One that differs between the completions of an untrained policy."""
    return sum(map(ord, completion)) % 7 / 6


def moody(prompt: str, completion: str, reference: str) -> float:
    """The same, unless the file says that something goes wrong."""
    mood = MOOD.read_text() if MOOD.exists() else ""
    if mood == "raise":
        raise ValueError("no answer key")
    if mood == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    while mood == "hang":
        time.sleep(0.05)
    return varied(prompt, completion, reference)

"""Run directories as training leaves them, with metrics made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from proma_megatron.runs.checkpoint_folder import Marker, write_marker

Row = dict[str, Any]


def complete(path: Path, score: float | None = None, pending: Any = None) -> Path:
    """A checkpoint that holds nothing and says that it is complete."""
    path.mkdir(parents=True, exist_ok=True)
    phase, _, step = path.name.rpartition("_")
    marker = Marker(
        phase="rl" if phase == "step" else phase,
        step=int(step),
        state={"pending": pending},
        model={},
        layout={},
        score=score,
    )
    write_marker(path, marker)
    return path


def write_run(run: Path, rows: list[Row], **config: Any) -> Path:
    """``rows`` as the metrics of a run; ``config`` as its configuration if there is any."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config:
        tree = {"name": run.name, "root": str(run.parent), **config}
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
    return run


def rl_row(step: int, reward: float | None, **more: float) -> Row:
    return {"step": step, "phase": "rl", "reward/mean": reward, "seconds/step": 2.0, **more}


def noisy_rows(steps: int, seed: int, kl: bool = True) -> list[Row]:
    """A validation before the first step, then steps with every metric that is drawn."""
    random = np.random.default_rng(seed)
    rows: list[Row] = [{"step": 0, "phase": "rl", "validation/accuracy": 0.1}]
    for step in range(1, steps + 1):
        row = rl_row(step, float(random.uniform(0.2, 0.8)))
        row["policy/entropy"] = float(random.uniform(0.5, 1.0))
        row["projection/removed_energy"] = float(random.uniform(0, 0.4))
        row |= {"seconds/rollout": 1.0, "seconds/train": 0.5}
        if kl:
            row["policy/kl_initial"] = float(random.uniform(0, 0.1))
            row["policy/kl_lagged"] = float(random.uniform(0, 0.01))
        if step % 20 == 0:
            row["validation/accuracy"] = float(random.uniform(0.2, 0.8))
        rows.append(row)
    return rows

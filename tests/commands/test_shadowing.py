"""A user's own modules in the current folder don't stand in for the project's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ranks

CHECKOUT = Path(__file__).parents[2]
PROMA = str(Path(sys.executable).parent / "proma")
# Names that were top-level modules of the project, or that a user is likely to have.
NAMES = ("launch", "config", "data", "files")
TINY = (
    "model={hidden_size: 32, ffn_hidden_size: 64, layers: 2, head_dim: 8}",
    "data={train_problems: 200, validation_problems: 4, largest_number: 9, solution_steps: 1}",
    "rollout={prompts_per_step: 4, samples_per_prompt: 4, max_new_tokens: 6}",
    "batching={tokens_per_microbatch: 120}",
    "warm_start={steps: 1, sequences_per_step: 4}",
    "trainer={steps: 1, eval_every: 0, kl_every: 1, kl_lagged_every: 0}",
    "reward.function=gsm8k",
    "parallel.tensor=1",
    "device=cpu",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a user, with modules that end whoever imports them."""
    path = tmp_path / "of_a_user"
    path.mkdir()
    for name in NAMES:
        _add(path, name)
    return path


def _add(folder: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(f'raise SystemExit("the user\'s own {name} was imported")\n')


def _run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_modules_of_the_folder_would_be_imported(folder: Path) -> None:
    """Else the tests below could not fail."""
    for name in NAMES:
        done = _run(folder, sys.executable, "-c", f"import {name}")
        assert done.returncode == 1
        assert f"own {name} was imported" in done.stderr


def test_help_by_module(folder: Path) -> None:
    done = _run(folder, sys.executable, "-m", "proma_megatron.cli", "--help")
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_help_by_script(folder: Path) -> None:
    """Also beside a module named as one of the standard library."""
    _add(folder, "types")
    done = _run(folder, PROMA, "--help")
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.parametrize("name", ["slurm", "local"])
def test_launch_scripts_are_the_command(folder: Path, name: str) -> None:
    script = _run(folder, sys.executable, str(CHECKOUT / "launch" / f"{name}.py"), "nowhere")
    command = _run(folder, PROMA, "launch", name, "nowhere")
    assert script.returncode == command.returncode == 2
    assert command.stderr
    assert script.stderr.replace(f"{name}.py", "proma") == command.stderr


def test_training(folder: Path, tmp_path: Path) -> None:
    config = str(CHECKOUT / "configs" / "quickstart.yaml")
    command = (sys.executable, "-m", "proma_megatron.cli", "train", config)
    done = _run(folder, *command, *TINY, f"root={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, rows) if row["phase"] == "rl"] == [0, 1]

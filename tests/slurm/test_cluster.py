"""The cluster that the tests of this folder share does what they need of it."""

from pathlib import Path

import pytest
from support.slurm import SlurmCluster, until

pytestmark = pytest.mark.slurm


def test_a_job_runs_on_both_nodes(cluster: SlurmCluster, tmp_path: Path) -> None:
    output = tmp_path / "output"
    job = cluster.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--output={output}",
        "--wrap=srun sh -c 'echo $SLURM_NODEID $SLURMD_NODENAME'",
    )
    assert cluster.wait(job, ["COMPLETED", "FAILED"])["JobState"] == "COMPLETED"
    assert sorted(output.read_text().splitlines()) == ["0 node1", "1 node2"]


def test_a_requeued_job_runs_again(cluster: SlurmCluster, tmp_path: Path) -> None:
    output = tmp_path / "output"
    job = cluster.submit(
        "--nodes=1",
        "--requeue",
        "--open-mode=append",
        f"--output={output}",
        '--wrap=echo attempt ${SLURM_RESTART_COUNT:-0}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60',
    )
    cluster.wait(job, "RUNNING")
    assert until(lambda: output.exists() and "attempt 0" in output.read_text(), 10)
    cluster.run("scontrol", "requeue", job)
    cluster.start_again(job)
    assert cluster.wait(job, ["COMPLETED", "FAILED"], 40)["JobState"] == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1"
    assert "attempt 1" in output.read_text().splitlines()

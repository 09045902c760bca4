"""Complete scripts of the example clusters, as a dry run shows them.

Whoever changes them rewrites them with ``PROMA_GOLDEN=write`` and reads the difference.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from nemo_run.config import get_nemorun_home, set_nemorun_home
from support.launch import ROOT

from proma_megatron.config.loading import load_config
from proma_megatron.launching.cluster import load_cluster
from proma_megatron.launching.experiments import dry_run
from proma_megatron.launching.shipping import for_cluster
from proma_megatron.launching.stages import stages_of

GOLDEN = Path(__file__).parent / "golden"
# The configuration, its overrides, and what follows the training.
EXAMPLES: dict[str, tuple[str, Sequence[str], str | None, bool]] = {
    "containers": (
        "qwen3_32b_gsm8k",
        (
            "model.path=/lustre/models/Qwen3-32B",
            "data.train_file=/lustre/data/train.parquet",
            "data.validation_file=/lustre/data/test.parquet",
        ),
        "/lustre/data/test.parquet",
        True,
    ),
    "modules": (
        "qwen3_8b_gsm8k",
        (
            "model.path=/project/m1234/models/Qwen3-8B",
            "data.train_file=/project/m1234/gsm8k/train.jsonl",
            "data.validation_file=/project/m1234/gsm8k/test.jsonl",
        ),
        None,
        False,
    ),
    "workstation": ("quickstart", (), None, False),
}
STAGES = {
    "containers": ("train", "eval", "export"),
    "modules": ("train",),
    "workstation": ("train",),
}
ALL = [(example, stage) for example, names in STAGES.items() for stage in names]
HOME = "/home/ada/.nemo_run"


@pytest.fixture
def fixed_home() -> Iterator[None]:
    """Where NeMo-Run's records would be; a dry run makes no folder there."""
    before = get_nemorun_home()
    set_nemorun_home(HOME)
    yield
    set_nemorun_home(before)


def scripts(example: str, folder: Path) -> dict[str, str]:
    """Batch and node scripts of an example, by the names of their files."""
    name, overrides, evaluate, export = EXAMPLES[example]
    cluster = load_cluster(ROOT / "launch" / "clusters" / f"{example}.yaml")
    config = for_cluster(load_config(ROOT / "configs" / f"{name}.yaml", overrides), cluster)
    stages = stages_of([config], evaluate=evaluate, export="export" if export else None)
    made = {}
    for script in dry_run(name, stages, cluster, id=f"{name}_20261122-120000"):
        for kind, text in (("batch", script.batch), ("node", script.node)):
            found = text.replace(str(folder), "/home/ada/work")
            made[f"{example}.{script.stage.name}.{kind}.sh"] = found
        made[f"{example}.{script.stage.name}.command"] = script.command
    return made


@pytest.mark.parametrize("example", EXAMPLES)
def test_scripts_are_those_that_were_read_and_found_right(
    example: str,
    fixed_home: None,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # below which the workstation's runs would be
    made = scripts(example, tmp_path)
    commands = {name: made.pop(name) for name in list(made) if name.endswith(".command")}
    if os.environ.get("PROMA_GOLDEN") == "write":
        for name, text in made.items():
            (GOLDEN / name).write_text(text)
    assert sorted(made) == sorted(path.name for path in GOLDEN.glob(f"{example}.*.sh"))
    for name, text in made.items():
        assert text == (GOLDEN / name).read_text(), name
    title = EXAMPLES[example][0]
    jobs = "/lustre/users/ada/jobs" if example == "containers" else f"{HOME}/experiments"
    for stage in STAGES[example]:
        after = "" if stage == "train" else " --dependency=afterok:<id of train>"
        assert commands[f"{example}.{stage}.command"] == (
            f"sbatch --requeue --parsable{after} {jobs}/{title}/{title}_20261122-120000/"
            f"{stage}_sbatch.sh"
        )
    assert not Path(HOME).exists()


def test_every_golden_script_belongs_to_an_example() -> None:
    kinds = ("batch", "node")
    expected = {f"{example}.{stage}.{kind}.sh" for example, stage in ALL for kind in kinds}
    assert {path.name for path in GOLDEN.iterdir()} == expected


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sh")), ids=lambda path: path.name)
def test_bash_can_read_every_script(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def parameters(example: str, stage: str) -> dict[str, str]:
    """Those of sbatch, each of which may be given once."""
    text = (GOLDEN / f"{example}.{stage}.batch.sh").read_text()
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len(found) == text.count("#SBATCH")
    names = [name for name, _ in found]
    assert len(set(names)) == len(names)
    return {name: " ".join(shlex.split(value)) for name, value in found}


@pytest.mark.parametrize(("example", "stage"), ALL)
def test_each_parameter_of_sbatch_is_given_once(example: str, stage: str) -> None:
    assert parameters(example, stage)


@pytest.mark.parametrize(
    ("example", "stage", "nodes", "asked"),
    [
        ("containers", "train", "2", {"gpus-per-node": "8", "exclusive": "", "mem": "0"}),
        ("containers", "export", "2", {"gpus-per-node": "8", "qos": "normal"}),
        (
            "modules",
            "train",
            "2",
            {"gres": "gpu:4", "constraint": "a100&80gb", "reservation": "rl_week"},
        ),
        ("modules", "train", "2", {"cpus-per-task": "64", "signal": "USR1@600"}),
        ("workstation", "train", "1", {"gpus-per-node": "2", "signal": "USR1@300"}),
    ],
)
def test_what_is_asked_for_follows_from_layout_and_cluster_file(
    example: str, stage: str, nodes: str, asked: dict[str, str]
) -> None:
    found = parameters(example, stage)
    assert found["nodes"] == nodes
    assert found["ntasks-per-node"] == "1"
    assert found["kill-on-invalid-dep"] == "yes"
    assert asked.items() <= found.items()
    assert ("gpus-per-node" in found) != ("gres" in found)


@pytest.mark.parametrize(("example", "stage"), ALL)
def test_as_many_ranks_are_started_as_gpus_are_asked_for(example: str, stage: str) -> None:
    found = parameters(example, stage)
    node = (GOLDEN / f"{example}.{stage}.node.sh").read_text()
    gpus = found.get("gpus-per-node") or found["gres"].removeprefix("gpu:")
    assert f" --nnodes={found['nodes']} " in node
    assert f" --nproc-per-node={gpus} " in node


@pytest.mark.parametrize("stage", STAGES["containers"])
def test_a_container_gets_its_mounts_and_the_variables_that_an_image_may_set(stage: str) -> None:
    batch = (GOLDEN / f"containers.{stage}.batch.sh").read_text()
    (line,) = re.findall(r"^srun .*", batch, re.MULTILINE)
    (names,) = re.findall(r"--container-env (\S+)", line)
    exported = set(re.findall(r"^export ([A-Z_]+)=", batch, re.MULTILINE))
    given = exported - {"PYTHONUNBUFFERED", "SLURM_UNBUFFEREDIO", "TORCHX_MAX_RETRIES"}
    secrets = {"HF_TOKEN", "WANDB_API_KEY"}
    assert set(names.split(",")) == given | secrets | {"MASTER_ADDR", "MASTER_PORT"}
    assert not exported & secrets
    (mounts,) = re.findall(r"--container-mounts (\S+)", line)
    jobs = "/lustre/users/ada/jobs/qwen3_32b_gsm8k/qwen3_32b_gsm8k_20261122-120000"
    assert mounts.split(",") == [
        "/lustre/users/ada:/lustre/users/ada",
        "/lustre/models:/lustre/models:ro",
        "/lustre/data:/lustre/data:ro",
        f"{jobs}/{stage}:/nemo_run",
    ]

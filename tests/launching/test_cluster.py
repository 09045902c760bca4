"""What a cluster file accepts, and the sentences in which it refuses."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.launch import CLUSTERS, CONFIGS, CONTAINER, ROOT, SSH, cluster_file, site, tree

from proma_megatron.config.loading import read_tree
from proma_megatron.config.model import ParallelConfig
from proma_megatron.errors import ConfigError
from proma_megatron.launching.cluster import Cluster, load_cluster
from proma_megatron.launching.environment import DEFAULTS, variables
from proma_megatron.launching.executors import slurm_executor
from proma_megatron.launching.nodes import Nodes, nodes_for

WORD = "it should have no spaces and no characters that a shell interprets"
PATH = (
    "it should be an absolute path on the cluster, of letters, digits and _ . / @ + = -, without .."
)
NODES = "it should be features or nodes as sbatch takes them, without spaces"
NAME = "it should consist of letters, digits and . _ -"
LINE = "it should be one line of printable characters"
VARIABLE = "it should be the name of an environment variable, such as HF_TOKEN"
TIME = 'it should be a time limit such as "04:00:00" or "1-12:00:00"'
NUMBER = 'it should be text such as "04:00:00", in quotes, without which YAML reads a number'
SECRET = (
    "looks like a secret, whose value must not be in a file; list its name under secrets, and set "
    "it where sbatch runs"
)
MOUNT = "should be two absolute paths with a colon between them, such as /lustre/data:/data"
NOT_HELD = (
    "which no mount of the container holds for writing, so that checkpoints would be lost with it"
)


def refusal(folder: Path, **changes: Any) -> str:
    path = cluster_file(folder, **changes)
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    file, _, sentence = str(caught.value).partition(": ")
    assert file == str(path)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"acount": "x"}, "unknown key 'acount'; did you mean 'account'?"),
        ({"ssh": {**SSH, "prot": 22}}, "unknown key 'ssh.prot'; did you mean 'ssh.port'?"),
        (
            {"container": {**CONTAINER, "xyzzy": 1}, "runs": "/lustre"},
            "unknown key 'container.xyzzy'; known keys of container are image, mounts",
        ),
        ({"account": None}, "'account' is missing; add it"),
        ({"time": None}, "'time' is missing; add it"),
        ({"gpus_per_node": None}, "'gpus_per_node' is missing; add it"),
        (
            {"ssh": {"host": "x", "user": "y"}},
            "'ssh.job_dir' is missing; add it",
        ),
        *(
            ({key: value}, f"{key} is {value!r}, but {WORD}")
            for key in ("account", "partition", "qos", "reservation", "mem")
            for value in ("a b", "a;rm", "$(x)", "a`b`", "a'b", "a\nb", "")
        ),
        ({"constraint": "a b"}, f"constraint is 'a b', but {NODES}"),
        ({"constraint": "a;b"}, f"constraint is 'a;b', but {NODES}"),
        ({"exclude": "$(x)"}, f"exclude is '$(x)', but {NODES}"),
        ({"srun": ["--mpi=pmix -l"]}, f"srun.0 is '--mpi=pmix -l', but {WORD}"),
        (
            {"environment": {"A": None}},
            "environment.A is None, but it should be a text or a number",
        ),
        ({"environment": {"A": "x\ny"}}, f"environment.A is 'x\\ny', but {LINE}"),
        ({"sbatch": {"comment": "a\nb"}}, f"sbatch.comment is 'a\\nb', but {LINE}"),
        (
            {"environment": {"MASTER_PORT": 1}},
            "environment.MASTER_PORT follows from the job itself; leave it out",
        ),
        (
            {"sbatch": {"gres": "gpu:1"}},
            "sbatch.gres is gpu:1 beside gpus_per_node=2, which asks for GPUs itself; leave it "
            "out, or set gpu_request: none",
        ),
        (
            {"sbatch": {"cpus-per-task": 8}},
            "sbatch is {'cpus-per-task': 8}, but 'cpus_per_task' is set by proma itself; leave it "
            "out",
        ),
        ({"setup": "x"}, "setup is 'x', expected a list"),
        *(
            (
                {key: [line]},
                "a line sets HF_TOKEN, a secret, whose value must not be in a file; "
                "list its name under secrets, and set it where sbatch runs",
            )
            for key, line in (
                ("setup", "export HF_TOKEN=hf_abc"),
                ("setup", "true; HF_TOKEN='hf_abc' x"),
                ("srun", "--x=HF_TOKEN=abc"),
            )
        ),
        *(
            (
                {"srun": [argument]},
                f"srun is ['{argument}'], but '{argument}' is set by proma "
                "itself, or no option in full; leave it out",
            )
            for argument in ("--export=NONE", "--output=x", "--kill-on-bad-exit=0", "bash")
        ),
        *(
            (
                {"environment": {"HF_HOME": value}},
                f"environment is {{'HF_HOME': '{value}'}}, but "
                f"HF_HOME is '{value}', which no shell would expand; give it in full, or export "
                "it in setup",
            )
            for value in ("$HOME/hf", "~/hf")
        ),
        (
            {"container": {"image": "x", "mounts": ["/l:/l:ro"]}, "runs": "/l/runs"},
            "runs is /l/runs, which no mount of the container holds for writing, so that "
            "checkpoints would be lost with it; add a mount such as /l/runs:/l/runs",
        ),
        ({"ssh": {**SSH, "job_dir": "/a,b"}}, f"ssh.job_dir is '/a,b', but {PATH}"),
        ({"ssh": {**SSH, "job_dir": "/a/%u"}}, f"ssh.job_dir is '/a/%u', but {PATH}"),
        ({"ssh": "login"}, "ssh is 'login', expected a section of `name: value` lines"),
        ({"runs": "/lustre/../home"}, f"runs is '/lustre/../home', but {PATH}"),
        ({"time": 14400}, f"time is 14400, but {NUMBER}"),
        *(
            ({"time": value}, f"time is {value!r}, but {TIME}")
            for value in ("soon", "4h", "1-", "00:00:00", "UNLIMITED", "1:2:3:4", "")
        ),
        *(
            (
                {"time": time, "stop_minutes": 10},
                f"time is {time}, expected more than stop_minutes=10, which a run is given to save "
                "before the limit",
            )
            for time in ("00:10:00", "10", "9:59", "0-00:10")
        ),
        ({"environment": {"HF_TOKEN": "x"}}, f"environment.HF_TOKEN {SECRET}"),
        ({"environment": {"my_password": "x"}}, f"environment.my_password {SECRET}"),
        ({"environment": {"WANDB_API_KEY": "x"}}, f"environment.WANDB_API_KEY {SECRET}"),
        ({"environment": {"MINE": "x"}, "secrets": ["MINE"]}, f"environment.MINE {SECRET}"),
        ({"environment": {"A-B": "x"}}, f"environment.A-B is 'A-B', but {VARIABLE}"),
        ({"environment": {"1A": "x"}}, f"environment.1A is '1A', but {VARIABLE}"),
        ({"environment": {"$A": "x"}}, f"environment.$A is '$A', but {VARIABLE}"),
        ({"secrets": ["A", "$(x)"]}, f"secrets.1 is '$(x)', but {VARIABLE}"),
        ({"setup": ["true", "a\nb"]}, f"setup.1 is 'a\\nb', but {LINE}"),
        *(
            (
                {"sbatch": {key: 1}},
                f"sbatch is {{{key!r}: 1}}, but '{key.replace('-', '_')}' is set by proma itself; "
                "leave it out",
            )
            for key in ("nodes", "ntasks-per-node", "signal", "requeue", "no-requeue", "output")
        ),
        *(
            (
                {"sbatch": {key: 1}},
                f"sbatch is {{{key!r}: 1}}, but '{key}' is a key of the cluster file itself; give "
                "it there",
            )
            for key in ("account", "time", "gpus_per_node")
        ),
        (
            {"sbatch": {"export": "NONE"}},
            "sbatch is {'export': 'NONE'}, but 'export' is set by proma itself; leave it out",
        ),
        (
            {"sbatch": {"mail type": 1}},
            "sbatch is {'mail type': 1}, but 'mail type' should be a parameter of sbatch, such as "
            "mail_type",
        ),
        *(
            (
                {"container": {**CONTAINER, "mounts": [mount]}, "runs": "/lustre"},
                f"container.mounts is [{mount!r}], but '{mount}' {MOUNT}",
            )
            for mount in ("/lustre", "lustre:/lustre", "/lustre:lustre", "/a:/b:ro:x")
        ),
        (
            {"container": {**CONTAINER, "mounts": ["/a b:/c"]}, "runs": "/lustre"},
            f"container.mounts.0 is '/a b:/c', but {WORD}",
        ),
        (
            {"container": CONTAINER},
            "runs is missing, without which run directories would be lost with the container; add "
            "it, with a mount that holds it",
        ),
        (
            {"container": CONTAINER, "runs": "/lustre2/runs"},
            f"runs is /lustre2/runs, {NOT_HELD}; add a mount such as /lustre2/runs:/lustre2/runs",
        ),
        ({"runs": "runs"}, f"runs is 'runs', but {PATH}"),
        ({"runs": "/my runs"}, f"runs is '/my runs', but {PATH}"),
        ({"ssh": {**SSH, "job_dir": "~/jobs"}}, f"ssh.job_dir is '~/jobs', but {PATH}"),
        ({"ssh": {**SSH, "host": "-oX=y"}}, f"ssh.host is '-oX=y', but {NAME}"),
        ({"ssh": {**SSH, "user": "a;b"}}, f"ssh.user is 'a;b', but {WORD}"),
        (
            {"environment": {"TORCHX_MAX_RETRIES": 9}},
            "environment.TORCHX_MAX_RETRIES follows from the job itself; leave it out",
        ),
        (
            {"setup": ["if [ -f x ]; then"]},
            "setup is ['if [ -f x ]; then'], but 'if [ -f x ]; then' should be a whole command of "
            "the shell, on its line",
        ),
        (
            {
                "container": {"image": "x", "mounts": ["/l:/l", "/l/runs:/l/runs:ro+rprivate"]},
                "runs": "/l/runs",
            },
            "runs is /l/runs, which no mount of the container holds for writing, so that "
            "checkpoints would be lost with it; add a mount such as /l/runs:/l/runs",
        ),
        (
            {"ssh": {**SSH, "before": "export HF_TOKEN=hf_abc"}},
            "a line sets HF_TOKEN, a secret, whose value must not be in a file; list its name "
            "under secrets, and set it where sbatch runs",
        ),
        (
            {"gpus_per_node": 0},
            "gpus_per_node is 0, so ranks run on CPUs, but ranks_per_node does not say how many; "
            "add it",
        ),
        (
            {"ranks_per_node": 3},
            "ranks_per_node is 3, expected at most gpus_per_node=2, for NCCL gives each rank a GPU "
            "of its own",
        ),
        (
            {"gpu_request": "x"},
            "gpu_request is 'x', expected one of 'gpus_per_node', 'gres' or 'none'",
        ),
        ({"code": "all"}, "code is 'all', expected one of 'committed', 'working_tree' or 'image'"),
        ({"stop_minutes": 0}, "stop_minutes is 0, but it should be greater than 0"),
        ({"max_requeues": -1}, "max_requeues is -1, but it should be greater than or equal to 0"),
    ],
    ids=str,
)
def test_a_cluster_file_that_does_not_fit_is_refused_in_a_sentence(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    assert refusal(tmp_path, **changes) == sentence


def test_a_cluster_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert str(caught.value) == (f"config file {path} does not exist; give the path of a YAML file")


def test_a_time_without_quotes_is_refused_as_yaml_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("account: lab\ngpus_per_node: 2\ntime: 12:00:00\n")
    with pytest.raises(ConfigError, match="in quotes"):
        load_cluster(path)
    path.write_text('account: lab\ngpus_per_node: 2\ntime: "04:00:00"\n')
    assert load_cluster(path).minutes == 240


def test_a_cluster_file_builds_on_another(tmp_path: Path) -> None:
    cluster_file(tmp_path, ssh=SSH)
    path = tmp_path / "mine.yaml"
    path.write_text("base: cluster.yaml\naccount: mine\nssh: {user: eve}\n")
    cluster = load_cluster(path)
    assert cluster.ssh is not None
    assert (cluster.account, cluster.ssh.user, cluster.ssh.host) == ("mine", "eve", "login")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("30:30", 30.5),
        ("04:00:00", 240),
        ("100:00:30", 6000.5),
        ("1-12", 36 * 60),
        ("1-12:30", 36 * 60 + 30),
        ("2-00:00:30", 48 * 60 + 0.5),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, minutes: float) -> None:
    assert site(time=text).minutes == minutes


ODD = st.text(alphabet=" \t\n;&|$`'\"\\<>()*?!~{}^ü\0", min_size=1, max_size=3)
GOOD = st.text(alphabet="abcXYZ019_.", max_size=3)


@given(st.sampled_from(["account", "partition", "qos", "reservation"]), GOOD, ODD, GOOD)
def test_no_shell_character_gets_into_a_batch_script(
    key: str, before: str, odd: str, after: str
) -> None:
    with pytest.raises(ValidationError):
        Cluster.model_validate(tree(**{key: before + odd + after}))


@pytest.mark.parametrize(
    ("mounts", "runs"),
    [(["/a:/b"], "/b"), (["/a:/b:ro", "/c:/d"], "/d/e/f"), (["/:/"], "/x"), (["/a:/b/"], "/b/c")],
)
def test_run_directories_may_be_anywhere_in_a_mount(mounts: list[str], runs: str) -> None:
    container = {"image": "nvcr.io#nvidia/pytorch:26.11-py3", "mounts": mounts}
    assert site(container=container, runs=runs).runs == runs


def test_the_cluster_files_that_the_issue_names_are_there() -> None:
    assert [path.stem for path in CLUSTERS] == ["containers", "modules", "workstation"]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_shipped_cluster_file_loads(path: Path) -> None:
    cluster = load_cluster(path)
    keys = set(yaml.safe_load(path.read_text()))
    assert keys == cluster.model_fields_set


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_fits_nodes_of_an_example(path: Path) -> None:
    # Models that they name are not here, so only their layout is read.
    parallel = ParallelConfig.model_validate(read_tree(path).get("parallel", {}))
    fitting = []
    for example in CLUSTERS:
        cluster = load_cluster(example)
        try:
            nodes = nodes_for(parallel, cluster)
        except ConfigError:
            continue
        assert nodes.count * nodes.ranks == parallel.world_size
        fitting.append(example.stem)
    assert fitting


def test_shipped_configs_are_found() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("name", DEFAULTS)
def test_proma_s_own_variables_can_be_overridden(name: str) -> None:
    assert variables(site(environment={name: "x"}))[name] == "x"


def test_what_sbatch_and_shells_understand_is_taken() -> None:
    lines = ("[ ! -f x ] || source x", "git config credential=y")
    found = site(constraint="(a|b)&c", mem=0, setup=lines)
    assert (found.constraint, found.mem, found.setup) == ("(a|b)&c", "0", lines)


def test_values_are_what_a_shell_would_have() -> None:
    assert site(environment={"A": True, "B": 1, "C": 1.5}).environment == {
        "A": "true",
        "B": "1",
        "C": "1.5",
    }


def test_a_flag_is_given_or_left_out() -> None:
    cluster = site(sbatch={"overcommit": False, "contiguous": True}, code="image")
    executor = slurm_executor(cluster, Nodes(1, 2, 2))
    assert executor.additional_parameters == {"kill_on_invalid_dep": "yes", "contiguous": True}


def test_a_secret_that_a_command_fetches_is_no_value_in_a_file() -> None:
    lines = ("export HF_TOKEN=$(cat ~/.hf_token)", 'HF_TOKEN="$(pass hf)"; export HF_TOKEN')
    assert site(setup=lines).setup == lines

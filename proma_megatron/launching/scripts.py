"""The shell of a job: what the batch script does on its first node, and what each node runs.

NeMo-Run writes the batch script around both. Its own torchrun launcher is not used, because

- torchrun dies of SIGUSR1, by which Slurm announces the time limit, before ranks have saved;
- it exits with 1 whatever code ranks leave with, so a run that stopped would count as failed;
- the node's rank would expand in the batch shell, to 0 on every node, which leaves to chance
  whether the node that the address belongs to becomes the first;
- that address comes from ``hostname --ip-address``, on many systems 127.0.1.1, and its port is
  the same for all jobs on a node.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from proma_megatron.config.constants import EXIT_STOPPED, STOP_CODE
from proma_megatron.launching.nodes import Nodes

SIGNAL = "USR1"  # asks ranks to save and stop
SETUP_FAILED = "proma: setup failed at"  # begins what a batch script says
SUCCEEDED, FAILED = "succeeded", "failed"  # files of a local stage
ASKED_TO_STOP = "stopped"  # a file of local stages


def setup_lines(
    site: Sequence[str],
    variables: Mapping[str, str],
    *,
    max_requeues: int,
    requeue_failures: int,
) -> str:
    """Write what the batch script does before it starts the nodes, on the first of them.

    Args:
        site: the cluster file's own lines.
        variables: exported as they are.
        max_requeues: requeues of a job whose run stopped.
        requeue_failures: requeues of one that failed.
    """
    lines = [
        "# The trace that this script began would print what lines of the site export.",
        "set +vx",
        "# It would give ranks terminals to draw on; Python's own buffers are off already.",
        "unset SLURM_UNBUFFEREDIO",
        "",
        f"# A run that stopped with everything saved ({EXIT_STOPPED}), or met the time limit, goes",
        "# on in the next attempt; a job that was cancelled stays so.",
        "proma_ends() {",
        "  code=$? limit=0 attempt=${SLURM_RESTART_COUNT:-0}",
        '  case $(scontrol -o show job "$SLURM_JOB_ID"):$code in',
        '    *" JobState=RUNNING "*:0) ;;',
        f'    *" JobState=RUNNING "*:{EXIT_STOPPED}) limit={max_requeues} ;;',
        f'    *" JobState=RUNNING "*) limit={requeue_failures} ;;',
        f'    *" Reason=TimeLimit "*) limit={max_requeues} ;;',
        "  esac",
        '  if [ "$attempt" -lt "$limit" ]; then',
        '    scontrol requeue "$SLURM_JOB_ID" &&',
        '      echo "proma: attempt $attempt ended with code $code and is queued again"',
        f"  elif [ $code -eq {EXIT_STOPPED} ]; then",
        '    echo "proma: stopped in attempt $attempt; max_requeues allows no more, submit again"',
        "  fi",
        "  exit $code",
        "}",
        "trap proma_ends EXIT",
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *(_checked(line) for line in site),
        "",
        "# Ranks meet at the first node, to which Slurm gives rank 0, by the address that Slurm",
        "# reaches it at; at a port of this job and attempt, below those that systems hand out:",
        "# the next job's first attempt may run beside this one's second.",
        'proma_first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        'MASTER_ADDR=$(scontrol -o show node "$proma_first" | grep -o "NodeAddr=[^ ]*")',
        "MASTER_ADDR=${MASTER_ADDR#NodeAddr=}; MASTER_ADDR=${MASTER_ADDR:-$proma_first}",
        "MASTER_PORT=$((20000 + (101 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 10000))",
        "export MASTER_ADDR MASTER_PORT",
    ]
    return "\n".join(lines)


def _checked(line: str) -> str:
    """Return a line of the site that ends the job if it fails, and says so."""
    said = shlex.quote(f"{SETUP_FAILED}: {line}")
    return f"{{ :\n{line}\n}} || {{ echo {said}; exit 1; }}"  # it may be a comment, or end in one


def node_script(arguments: Sequence[str], nodes: Nodes, *, stopped: PurePosixPath | None) -> str:
    """Write what each node of a Slurm job runs: its ranks, under torchrun.

    Args:
        arguments: of `proma`.
        stopped: the file that ranks leave which were stopped and can go on; None: they can't.
    """
    meeting = (
        f"--nnodes={nodes.count}",
        '--node-rank="$SLURM_NODEID"',
        '--master-addr="$MASTER_ADDR"',
        '--master-port="$MASTER_PORT"',
    )
    lines = []
    if stopped is not None:
        lines += [
            f"stopped={shlex.quote(str(stopped))}",
            '[ "$SLURM_NODEID" -ne 0 ] || rm -f "$stopped"  # of the attempt before',
        ]
    lines += [*_ranks(arguments, meeting, nodes.ranks, stopped), "exit $code"]
    return "\n".join(lines) + "\n"


def local_script(
    arguments: Sequence[str],
    nodes: Nodes,
    *,
    stopped: PurePosixPath | None,
    after: str | None,
) -> str:
    """Write the same for this machine; without Slurm, stages look themselves whether one succeeded.

    Args:
        after: the stage that must have.
    """
    lines = [
        'stages=$(dirname "$0")/../..',
        'here=$(dirname "$0")/..',
        f'not_started() {{ echo "not started$1"; touch "$here"/{FAILED}; exit 1; }}',
        f'[ ! -e "$stages"/{ASKED_TO_STOP} ] || not_started',
    ]
    if after is not None:
        lines.append(
            f'[ -e "$stages"/{shlex.quote(after)}/{SUCCEEDED} ] || '
            f'not_started ", for {after} has not succeeded"'
        )
    if stopped is not None:
        lines += [f"stopped={shlex.quote(str(stopped))}", 'rm -f "$stopped"']
    lines += [
        *_ranks(arguments, ("--standalone",), nodes.ranks, stopped),
        f'if [ $code -eq 0 ]; then touch "$here"/{SUCCEEDED}; else touch "$here"/{FAILED}; fi',
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def _ranks(
    arguments: Sequence[str],
    meeting: Sequence[str],
    ranks: int,
    stopped: PurePosixPath | None,
) -> list[str]:
    torchrun = [
        "torchrun",
        *meeting,
        f"--nproc-per-node={ranks}",
        "--signals-to-handle=SIGHUP,SIGQUIT",
        "-m proma_megatron.cli",
        shlex.join(arguments),
    ]
    if stopped is None:  # it can't save: the time limit's warning passes it by
        ignored = f"(trap '' {SIGNAL}; exec {' '.join(torchrun)})"
        return [f"trap : TERM {SIGNAL}", ignored, "code=$?"]
    return [
        "# Signals to a job reach each of its processes. Ranks save and stop; this shell outlives",
        "# them, to tell; torchrun ignores signals, and gets 0 from ranks that stopped, since it",
        "# would report anything else as a failure.",
        f"trap : TERM {SIGNAL}",
        f"(trap '' TERM {SIGNAL}; export {STOP_CODE}=0; exec {' '.join(torchrun)})",
        "code=$?",
        # Only the first node, which removed it: others may be shown an old one by their cache.
        f'if [ "${{SLURM_NODEID:-0}}" -eq 0 ] && [ -e "$stopped" ]; then code={EXIT_STOPPED}; fi',
    ]

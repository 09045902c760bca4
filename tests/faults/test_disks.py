"""Disks that are full, read-only or gone, and checkpoints that are no longer what was written."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.drills import LAYOUTS, TINY, Drill, Fault, sentence
from support.ledger import record
from support.losses import differences

from proma_megatron.checkpoints.integrity import INDEX
from proma_megatron.files import size_and_checksum
from proma_megatron.runs.checkpoint_folder import (
    MARKER,
    is_complete,
    newest,
    read_marker,
    write_marker,
)

Undisturbed = Callable[..., Drill]
RUN = Path("runs/run")  # from where the run was started


def mount(*arguments: str) -> str:
    """What keeps it from working, "" if nothing."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[None]:
    """A small disk; skips where none can be mounted."""
    folder.mkdir(parents=True)
    problem = mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    if problem:
        pytest.skip(f"needs a disk of its own, which only root can mount: {problem}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--recursive", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of runs, on a small disk."""
    with mounted(tmp_path / "runs", megabytes=24):
        yield tmp_path / "runs"


def fill() -> None:
    """Leave no room on the disk of the run; what is there of the last pages is not to be had."""
    with (RUN.parent / "ballast").open("wb", buffering=0) as ballast:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    ballast.write(bytes(size))
            except OSError:
                continue


def make_read_only() -> None:
    """From now on the folder of checkpoints is on a disk that takes nothing."""
    folder = str(RUN / "checkpoints")
    assert not mount("--bind", folder, folder)
    assert not mount("-o", "remount,bind,ro", folder)


def vanish() -> None:
    RUN.rename(RUN.parent / "elsewhere")


FULL, READ_ONLY, GONE = "No space left on device", "Read-only file system", ""
DISKS = [
    pytest.param("TP2", "write", 3, fill, FULL),
    pytest.param("DP2", "report", 6, fill, FULL),
    pytest.param("PP2", "index", 5, make_read_only, READ_ONLY),
    pytest.param("TP2", "train", 2, vanish, GONE),
    *(
        pytest.param(layout, phase, time, action, words, marks=pytest.mark.slow)
        for layout in LAYOUTS
        for phase, time, action, words in (
            ("write", 4, fill, FULL),
            ("index", 5, fill, FULL),
            ("marker", 3, fill, FULL),
            ("validation", 2, fill, FULL),
            ("write", 3, make_read_only, READ_ONLY),
            ("marker", 3, make_read_only, READ_ONLY),
            ("removal", 1, make_read_only, READ_ONLY),
            ("train", 1, vanish, GONE),
            ("validation", 2, vanish, GONE),
            ("write", 3, vanish, GONE),
        )
    ),
]
WORDS = {fill: "disk full", make_read_only: "disk read-only", vanish: "run directory moved away"}


@pytest.mark.parametrize(("layout", "phase", "time", "action", "words"), DISKS)
def test_a_disk_that_takes_nothing_ends_the_run_with_a_sentence(
    layout: str,
    phase: str,
    time: int,
    action: Callable[[], None],
    words: str,
    disk: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:
    drill = Drill(tmp_path, (*TINY, *LAYOUTS[layout]))
    done = drill.go(Fault(phase, 0, time, 0.0, action))
    said = sentence(done)
    assert done.returncode == 1, done.stdout
    assert words in said
    if action is vanish:
        assert "is gone, expected" in said or "No such file or directory" in said
    assert "runs/run/" in said
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    _mend(disk)
    kept = newest(drill.run_dir.checkpoints)
    assert kept is not None
    drill.finish()
    lost = differences(undisturbed(layout).run_dir, drill.run_dir)
    record(WORDS[action], phase, layout, 1, said, lost)
    assert not lost


def _mend(disk: Path) -> None:
    """Make room, let it be written, bring back what had gone."""
    (disk / "ballast").unlink(missing_ok=True)
    subprocess.run(["umount", str(disk / "run" / "checkpoints")], capture_output=True, check=False)
    if (disk / "elsewhere").exists():
        shutil.rmtree(disk / "run", ignore_errors=True)
        (disk / "elsewhere").rename(disk / "run")


def test_a_disk_that_is_full_or_read_only_from_the_start(
    disk: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    drill = Drill(tmp_path, (*TINY, *LAYOUTS["TP2"]))
    assert drill.go(Fault("train", 1, 2)).returncode == 1
    assert not mount("-o", "remount,ro", str(disk))
    done = drill.go(flag="--resume")
    assert done.returncode == 2
    assert "can't be written (Read-only file system)" in sentence(done)
    assert not mount("-o", "remount,rw", str(disk))
    drill.finish()
    lost = differences(undisturbed("TP2").run_dir, drill.run_dir)
    record("disk read-only", "start", "TP2", 2, sentence(done), lost)
    assert not lost


# --------------------------------------------------------------------------- damaged checkpoints


class Runs:
    """What a pickle can do to its reader."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, ("ran",)


def truncate(checkpoint: Path) -> Path:
    file = checkpoint / "__0_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    return file


def flip(checkpoint: Path) -> Path:
    file = checkpoint / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    return file


def lose(checkpoint: Path) -> Path:
    file = checkpoint / "__1_0.distcp"
    file.unlink()
    return file


def scribble(checkpoint: Path) -> Path:
    file = checkpoint / MARKER
    os.truncate(file, 30)
    return file


def forge(checkpoint: Path) -> Path:
    """With the right checksum, as whoever can write there can make it."""
    file = checkpoint / INDEX
    file.write_bytes(pickle.dumps(Runs()))
    marker = read_marker(checkpoint)
    files = {**marker.files, INDEX: size_and_checksum(file)}
    write_marker(checkpoint, replace(marker, files=files))
    return file


Damage = Callable[[Path], Path]
DAMAGES: dict[Damage, tuple[str, str]] = {
    truncate: ("truncated shard", "bytes, expected"),
    lose: ("missing shard", "is missing, expected"),
    scribble: ("damaged marker", "can't be read"),
    flip: ("flipped bit in a shard", "is damaged: its checksum is wrong"),
    forge: (".metadata that runs a command", "it names posix.mkdir"),
}


def damaged(drill: Drill, layout: str, damage: Damage) -> tuple[str, int]:
    """How a run ends whose newest checkpoint is damaged: sentence and exit code."""
    checkpoint = newest(drill.run_dir.checkpoints)
    assert checkpoint is not None
    rows = drill.run_dir.metrics.read_bytes()
    file = damage(checkpoint)
    done = drill.go(flag="--resume")
    said = sentence(done)
    assert done.returncode == 1, done.stdout
    assert f"{checkpoint.name}/{file.name}" in said
    assert DAMAGES[damage][1] in said
    assert drill.run_dir.metrics.read_bytes() == rows
    assert not (drill.folder / "ran").exists()
    return said, done.returncode


@pytest.fixture
def killed(tmp_path: Path) -> Callable[[str], Drill]:
    """A run of this layout that has been killed in its last step."""

    def begin(layout: str) -> Drill:
        drill = Drill(tmp_path, (*TINY, *LAYOUTS[layout]))
        assert drill.go(Fault("train", 0, 3)).returncode == 1
        assert newest(drill.run_dir.checkpoints) is not None
        return drill

    return begin


def test_whatever_is_damaged_is_named_and_the_checkpoint_before_goes_on(
    undisturbed: Undisturbed, killed: Callable[[str], Drill], tmp_path: Path
) -> None:
    drill = killed("TP2")
    checkpoint = newest(drill.run_dir.checkpoints)
    assert checkpoint is not None
    good = shutil.copytree(checkpoint, tmp_path / "good")
    ends = []
    for damage in DAMAGES:
        ends.append((DAMAGES[damage][0], *damaged(drill, "TP2", damage)))
        shutil.rmtree(checkpoint)
        shutil.copytree(good, checkpoint)
    damaged(drill, "TP2", flip)
    shutil.rmtree(checkpoint)
    drill.finish()
    lost = differences(undisturbed("TP2").run_dir, drill.run_dir)
    for what, said, code in ends:
        record(f"file of a checkpoint: {what}", "resume", "TP2", code, said, lost)
    assert not lost


def test_the_policy_that_rl_started_from_is_to_be_brought_back(
    undisturbed: Undisturbed, killed: Callable[[str], Drill], tmp_path: Path
) -> None:
    drill = killed("DP2")
    first = drill.run_dir.checkpoint(0)
    shutil.copytree(first, tmp_path / "copy")
    file = flip(first)
    done = drill.go(flag="--resume")
    said = sentence(done)
    assert done.returncode == 1
    assert f"{first.name}/{file.name} is damaged" in said
    assert "bring step_000000 back from a copy" in said
    shutil.rmtree(first)
    shutil.copytree(tmp_path / "copy", first)
    drill.finish()
    lost = differences(undisturbed("DP2").run_dir, drill.run_dir)
    what = "file of a checkpoint: step_000000 damaged, then brought back"
    record(what, "resume", "DP2", 1, said, lost)
    assert not lost


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_damaged_checkpoint_the_one_before_goes_on(
    layout: str,
    damage: Damage,
    undisturbed: Undisturbed,
    killed: Callable[[str], Drill],
) -> None:
    drill = killed(layout)
    checkpoint = newest(drill.run_dir.checkpoints)
    assert checkpoint is not None
    said, code = damaged(drill, layout, damage)
    shutil.rmtree(checkpoint)
    drill.finish()
    lost = differences(undisturbed(layout).run_dir, drill.run_dir)
    record(f"file of a checkpoint: {DAMAGES[damage][0]}", "resume", layout, code, said, lost)
    assert not lost


def test_a_checkpoint_of_another_model_is_refused_and_untouched(
    undisturbed: Undisturbed, killed: Callable[[str], Drill]
) -> None:
    drill = killed("PP2")
    checkpoint = newest(drill.run_dir.checkpoints)
    done = drill.go(overrides=["model.ffn_hidden_size=96"], flag="--resume")
    said = sentence(done)
    assert done.returncode == 2
    assert "is a checkpoint of another model: its model.ffn_hidden_size is 64" in said
    assert newest(drill.run_dir.checkpoints) == checkpoint
    drill.finish()
    lost = differences(undisturbed("PP2").run_dir, drill.run_dir)
    record("file of a checkpoint: of another model", "resume", "PP2", 2, said, lost)
    assert not lost


def test_what_is_half_written_is_removed(
    undisturbed: Undisturbed, killed: Callable[[str], Drill]
) -> None:
    drill = killed("DP2")
    half = drill.run_dir.checkpoint(9)  # of a step that the run never saves, to replace it
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    assert not is_complete(half)
    drill.finish()
    assert not half.exists()
    lost = differences(undisturbed("DP2").run_dir, drill.run_dir)
    record("file of a checkpoint: no marker", "resume", "DP2", 0, "", lost)
    assert not lost

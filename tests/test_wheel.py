"""What the wheel holds, and that it finds its own files where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from proma_megatron import __version__

CHECKOUT = Path(__file__).parents[1]
SHIPPED = "proma_megatron/shipped"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `uv build` does, without an environment of its own and so without a network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def _files(folder: str) -> set[Path]:
    """What is in a folder of the checkout, relative to it."""
    paths = (CHECKOUT / folder).rglob("*")
    return {path.relative_to(CHECKOUT / folder) for path in paths if path.is_file()}


@pytest.mark.ranks
def test_it_has_two_top_level_names(names: set[str]) -> None:
    info = f"proma_megatron-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"proma_megatron", info}
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.parametrize(
    ("folder", "copy"), [("configs", "configs"), ("launch/clusters", "clusters")]
)
@pytest.mark.ranks
def test_it_has_the_shipped_files(names: set[str], folder: str, copy: str) -> None:
    found = {name for name in names if name.startswith(f"{SHIPPED}/{copy}/")}
    assert found == {f"{SHIPPED}/{copy}/{path.as_posix()}" for path in _files(folder)}
    assert found


@pytest.mark.ranks
def test_it_has_every_file_of_the_package(names: set[str]) -> None:
    """Not only the modules: a page's style sheet, published shapes, the marker of typed code."""
    expected = {
        f"proma_megatron/{path.as_posix()}"
        for path in _files("proma_megatron")
        if "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("proma_megatron/")} - {
        name for name in names if name.startswith(f"{SHIPPED}/")
    } == expected
    assert "proma_megatron/py.typed" in expected


@pytest.mark.ranks
def test_a_plan_by_name_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Unpacked ahead of the checkout on the path, and started from another folder."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import sys, proma_megatron; from proma_megatron.cli import main; "
        "print(proma_megatron.__file__, file=sys.stderr); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "quickstart"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert str(site / "proma_megatron" / "__init__.py") in done.stderr
    assert "Fits:" in done.stdout


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())
    assert citation["version"] == __version__

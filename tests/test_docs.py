"""The pages of docs/: what is generated is current."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from proma_megatron.config.run import GradientsConfig, RunConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """Return `docs/generate.py`, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["configuration.md", "config.schema.json", "cli.md"])
def test_generated_pages_are_current(name: str, generate: ModuleType) -> None:
    text = (ROOT / "docs" / "reference" / name).read_text()
    assert text == generate.pages()[name], "run `uv run python docs/generate.py`"


@pytest.mark.parametrize("root", [RunConfig, GradientsConfig])
def test_every_key_has_a_description(root: type[BaseModel]) -> None:
    assert not list(undescribed(root))


def undescribed(section: type[BaseModel]) -> Iterator[str]:
    """Yield the keys of a section, and of those within it, that say nothing of themselves."""
    for name, field in section.model_fields.items():
        if not field.description and section is not GradientsConfig:
            yield f"{section.__name__}.{name}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from undescribed(kind)


def editor_schema() -> dict:
    return json.loads((ROOT / "docs" / "reference" / "config.schema.json").read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_fit_the_editors_schema(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), editor_schema())


@pytest.mark.parametrize(
    "tree",
    [
        {"trainer": {"steps": 1}},
        {"name": "x", "trainer": {"stepz": 1}},
        {"name": "x", "loss": {"kind": "cisp"}},
        {"name": "x", "projection": {"bound": -1}},
        {"name": "x", "model": {"layers": None}},
    ],
)
def test_the_editors_schema_refuses_what_the_command_refuses(tree: dict) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, editor_schema())


@pytest.mark.parametrize("bound", [None, 0, 0.5])
def test_the_editors_schema_takes_null_and_whole_numbers(bound: float | None) -> None:
    tree = {"name": "x", "projection": {"bound": bound}, "model": {"path": None}, "root": "~/runs"}
    jsonschema.validate(tree, editor_schema())

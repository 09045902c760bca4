"""The README and the pages of docs/: links lead somewhere, what is generated is current."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from proma_megatron.config.run import GradientsConfig, RunConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")


def script(path: str) -> ModuleType:
    """Return a file of the repository that is in no package as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return script("docs/generate.py")


def links(page: Path) -> Iterator[str]:
    """Yield what a page links to and which images it shows, code left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for match in LINK.finditer(text):
        yield match.group(1) or match.group(2)


def anchors(page: Path) -> set[str]:
    """Return the names of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Of the repository, or of the package, whose name may be left out."""
    named = re.findall(r"`((?:[\w.]+/)+[\w.]+\.(?:py|yaml))`", page.read_text())
    places = (ROOT, ROOT / "proma_megatron")
    assert not [name for name in named if not any((place / name).exists() for place in places)]


def test_the_readme_has_a_line_for_each_room_in_their_order() -> None:
    tree = (ROOT / "README.md").read_text().partition("## What is where")[2].split("```")[1]
    rooms = [
        line.split()[0].removesuffix("/").removesuffix(".py") for line in tree.split("\n")[1:-1]
    ]
    assert tuple(rooms) == script("tests/test_import_order.py").ORDER


def test_links_of_pages_stay_within_docs() -> None:
    """A site has nothing else; files of the code are named, not linked."""
    outside = {
        f"{page.name}: {link}"
        for page in PAGES
        if page.name != "README.md" or page.parent != ROOT
        for link in links(page)
        if not re.match(r"[a-z]+:|#", link)
        and not (page.parent / link.partition("#")[0]).resolve().is_relative_to(ROOT / "docs")
    }
    assert not outside


@pytest.mark.parametrize("name", ["configuration.md", "config.schema.json", "cli.md"])
def test_generated_pages_are_current(name: str, generate: ModuleType) -> None:
    text = (ROOT / "docs" / "reference" / name).read_text()
    assert text == generate.pages()[name], "run `uv run python docs/generate.py`"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


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

"""Pages that are written from the code: ``python docs/generate.py``.

``reference/configuration.md`` and ``reference/config.schema.json`` come from the sections of a
configuration, ``reference/cli.md`` from the commands. `tests/test_docs.py` holds them current.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from proma_megatron.cli import app
from proma_megatron.config.run import RunConfig

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py; change the code, not this page. -->\n"
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}

Schema = dict[str, Any]


def main() -> None:
    """Write every generated page."""
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text)


def pages() -> dict[str, str]:
    """Return the text of each generated page by its file's name."""
    return {
        "configuration.md": configuration_page(),
        "config.schema.json": json.dumps(editor_schema(), indent=2) + "\n",
        "cli.md": command_page(),
    }


# ----------------------------------------------------------------------------- configuration


def editor_schema() -> Schema:
    """Return the JSON schema of a configuration file, for editors.

    Beside the keys of a run a file may have ``base``, the file that it builds on, and then need not
    repeat the name. Defaults of whole sections are left out: those of their keys say the same.
    """
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Configuration of proma_megatron"
    for value in schema["properties"].values():
        _drop_section_default(value)
    for section in schema["$defs"].values():
        for value in section["properties"].values():
            _drop_section_default(value)
    base = {"type": "string", "description": "File that this one builds on, relative to it."}
    schema["properties"] = {"base": base, **schema["properties"]}
    del schema["required"]
    schema["anyOf"] = [{"required": ["name"]}, {"required": ["base"]}]
    return schema


def _drop_section_default(value: Schema) -> None:
    if "$ref" in value:
        value.pop("default", None)


def configuration_page() -> str:
    """Return the page with every key: type, default, description."""
    schema = RunConfig.model_json_schema()
    loose = {key: value for key, value in schema["properties"].items() if "$ref" not in value}
    text = [NOTE, CONFIGURATION_HEAD, "## The run itself\n", *_key_table(loose)]
    for name, value in schema["properties"].items():
        if "$ref" in value:
            text += _section(name, value, schema["$defs"])
    return "\n".join(text)


def _section(name: str, value: Schema, sections: Schema) -> Iterator[str]:
    """Yield the lines of a section, and of those within it."""
    section = sections[value["$ref"].rpartition("/")[2]]
    yield f"## `{name}`\n"
    yield f"{value['description']}\n"
    keys = {key: value for key, value in section["properties"].items() if "$ref" not in value}
    if own := section.get("description"):
        yield f"{_markdown(own.replace('``', '`'))}\n"
    yield from _key_table(keys, f"{name}.")
    for key, inner in section["properties"].items():
        if "$ref" in inner:
            yield from _section(f"{name}.{key}", inner, sections)


def _key_table(keys: Schema, prefix: str = "") -> Iterator[str]:
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    for key, value in keys.items():
        default = f"`{_yaml(value['default'])}`" if "default" in value else "required"
        description = _cell(value["description"])
        yield f"| `{prefix}{key}` | {_cell(_type(value))} | {default} | {description} |"
    yield ""


def _type(value: Schema) -> str:
    """Return what a key takes, in words."""
    if "anyOf" in value:
        return " or ".join(_type(one) for one in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{_yaml(one)}`" for one in value["enum"])
    if "const" in value:
        return f"`{_yaml(value['const'])}`"
    if value["type"] == "null":
        return "`null`"
    if value.get("format") == "path":
        return "path"
    bounds = " and ".join(f"{sign} {value[key]:g}" for key, sign in BOUNDS.items() if key in value)
    pattern = f" that matches `{value['pattern']}`" if "pattern" in value else ""
    return f"{TYPES[value['type']]}{' ' if bounds else ''}{bounds}{pattern}"


def _yaml(value: object) -> str:
    """Return a plain value as a YAML file would have it."""
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    """Return text that a table's cell can hold."""
    return _markdown(text).replace("|", "\\|")


def _markdown(text: str) -> str:
    return text.replace(" * ", " \\* ")


CONFIGURATION_HEAD = """# Configuration

A run is one YAML file, changed by `key=value` on the command line. Sections are mappings; on the
command line their keys have dots: `trainer.steps=10`. A file may name another by the key `base`,
relative to itself, and then says only what differs. A shipped file is found by its name:
`proma train quickstart`. What an algorithm decides by itself where a key is `null` is in
[Algorithms](../guide/algorithms.md).

A wrong key, type or value ends the command with one sentence and exit code 2. YAML reads a bare
`on` or `off` as a truth value: write `"on"` and `"off"`, in a shell `'loss.importance="off"'`.

**In an editor.** [config.schema.json](config.schema.json) is the JSON schema of such a file. An
editor with the YAML language server completes keys, shows these descriptions and underlines what
doesn't fit, if the file's first line names the schema, by a path relative to the file or a URL:

```yaml
# yaml-language-server: $schema=../docs/reference/config.schema.json
name: mine
```
"""


# ----------------------------------------------------------------------------- command line


def command_page() -> str:
    """Return the page with every command, its arguments and its options."""
    text = [NOTE, "# Command line\n", *_commands(app, "proma")]
    return "\n".join(text)


def _commands(group: typer.Typer, path: str) -> Iterator[str]:
    """Yield the lines of the commands of a group, in the order of its help."""
    built: Any = typer.main.get_command(group)
    callbacks = {_name(info): info.callback for info in group.registered_commands}
    groups = {info.name: info.typer_instance for info in group.registered_groups}
    yield f"{built.help}\n" if built.help else ""
    if group.registered_callback is not None:
        hints = get_type_hints(group.registered_callback.callback)
        options = [one for one in built.params if one.name in hints]
        yield f"Of every command, before its name, as in `{path} --quiet train`:\n"
        yield from _option_table(options, hints)
    for name, command in built.commands.items():
        if (inner := groups.get(name)) is not None:
            yield f"## `{path} {name}`\n"
            yield from _commands(inner, f"{path} {name}")
        else:
            yield from _command(command, f"{path} {name}", get_type_hints(callbacks[name]))


def _name(info: Any) -> str:
    return info.name or info.callback.__name__.replace("_", "-")


def _command(command: Any, path: str, hints: dict[str, Any]) -> Iterator[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    shown = " ".join(
        [path, *(_shown(one) for one in arguments), *("[OPTIONS]" for _ in options[:1])]
    )
    yield f"{'#' * len(path.split())} `{path}`\n"
    yield f"```\n{shown}\n```\n"
    yield f"{' '.join(command.help.split()) if command.help else ''}\n"
    if arguments:
        yield "| argument | value | meaning |\n|---|---|---|"
        for one in arguments:
            yield f"| `{_shown(one)}` | {_value(hints[one.name], one)} | {_cell(one.help or '')} |"
        yield ""
    if options:
        yield from _option_table(options, hints)


def _option_table(options: Sequence[Any], hints: dict[str, Any]) -> Iterator[str]:
    yield "| option | value | default | meaning |\n|---|---|---|---|"
    for one in options:
        names = ", ".join(f"`{name}`" for name in one.opts)
        value = _value(hints[one.name], one)
        yield f"| {names} | {value} | {_option_default(one)} | {_cell(one.help or '')} |"
    yield ""


def _shown(argument: Any) -> str:
    """Return an argument as a line of usage has it."""
    if argument.metavar:
        return argument.metavar
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _value(hint: Any, param: Any) -> str:
    """Return what a parameter takes, in words."""
    if get_origin(hint) in (UnionType, Union):
        return _value(next(one for one in get_args(hint) if one is not type(None)), param)
    if get_origin(hint) is Literal:
        return ", ".join(f"`{one}`" for one in get_args(hint))
    if get_origin(hint) is list:
        return f"{_value(get_args(hint)[0], param)}, several"
    if hint is bool:
        return "flag"
    least = f" >= {param.min:g}" if getattr(param, "min", None) is not None else ""
    return {Path: "path", str: "text", int: "integer", float: "number"}[hint] + least


def _option_default(option: Any) -> str:
    if option.required:
        return "required"
    return "" if option.default in (None, False) else f"`{option.default}`"


if __name__ == "__main__":
    main()

"""From a YAML file and dotted overrides to a validated configuration, and back.

OmegaConf merges ``key=value`` overrides, pydantic checks the result against the tree in `config`,
and each fault becomes one sentence of a `ConfigError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from proma_megatron.config.fields import Section
from proma_megatron.config.pretrained import SHAPE, planned_shape
from proma_megatron.config.run import TRAINING, GradientsConfig, RunConfig
from proma_megatron.config.shipped import find_config
from proma_megatron.errors import ConfigError

ABSENT = "not there"  # what a tree says of a key that it lacks


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply dotted ``key=value`` overrides, validate.

    Raises:
        ConfigError: the file is missing or no mapping, or a value does not fit.
    """
    return validate_config(apply_overrides(read_tree(path), overrides), training=True)


def read_tree(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the mapping in a YAML file, on top of that of the file that its key ``base`` names.

    ``base`` is relative to the file; what both have, the file itself decides.

    Raises:
        ConfigError: a file is missing, no mapping, or its own base.
    """
    path = path if within else find_config(path)
    if path.resolve() in within:
        raise ConfigError(f"{path} is its own base; remove the key 'base' from one of the files")
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; give the path of a YAML file")
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read as text: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path} is not valid YAML{where}: {getattr(error, 'problem', error)}"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, expected `key: value` lines")
    base = tree.pop("base", None)
    if base is None:
        return tree
    below = read_tree(path.parent / str(base), (*within, path.resolve()))
    return _merge(below, tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge both mappings, section by section; ``above`` wins."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Merge dotted overrides into ``tree``; values are parsed as YAML.

    Raises:
        ConfigError: an override is not ``key=value``, or its value is no YAML.
    """
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise ConfigError(
                f"override '{item}' has no '=', expected key=value such as trainer.steps=10"
            )
    try:
        merged = OmegaConf.merge(OmegaConf.create(tree), OmegaConf.from_dotlist(list(overrides)))
        container = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"overrides {list(overrides)} can't be applied: {first_line}") from None
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def validate_config(tree: dict[str, Any], *, training: bool = False) -> RunConfig:
    """Validate ``tree`` as a `RunConfig`.

    Args:
        training: whether its RL steps must be possible; a policy may also only be read.

    Raises:
        ConfigError: one sentence per fault, the first few of them.
    """
    return validate_section(_with_shape(tree), RunConfig, TRAINING if training else None)


def gradients_config(overrides: Sequence[str]) -> GradientsConfig:
    """Validate a `GradientsConfig` of defaults and overrides; raises as `validate_config`."""
    return validate_section(apply_overrides({}, overrides), GradientsConfig)


def _with_shape(tree: dict[str, Any]) -> dict[str, Any]:
    """Return ``tree`` with the shape of the Hugging Face model that it names, if it names one."""
    model = tree.get("model")
    if not isinstance(model, dict) or model.get("path") is None:
        return tree
    path = Path(str(model["path"])).expanduser()
    if not path.exists() and all(model.get(key) is not None for key in SHAPE):
        return tree  # resolved before, as a run's own configuration is
    shape = planned_shape(path)
    for key, value in shape.items():
        if model.get(key, value) != value:
            raise ConfigError(
                f"model.{key} is {model[key]!r}, but it is {value!r} in the config.json of "
                f"model.path={path}; leave the key out"
            )
    return {**tree, "model": {**model, **shape}}


def validate_section[Root: Section](
    tree: dict[str, Any], root: type[Root], context: dict[str, str] | None = None
) -> Root:
    """Validate ``tree`` as a section of this type.

    Raises:
        ConfigError: one sentence per fault, the first few of them.
    """
    try:
        return root.model_validate(tree, context=context)
    except ValidationError as error:
        sentences = [_sentence(fault, root) for fault in error.errors()[:3]]
        raise ConfigError("; ".join(sentences)) from None


def dump_config(config: RunConfig) -> str:
    """Dump the complete resolved configuration as YAML, readable by `load_config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted keys where two trees differ, with both values; `ABSENT` where one has none."""
    old, new = dict(_flat(there)), dict(_flat(wanted))
    for key in dict.fromkeys((*new, *old)):
        if old.get(key, ABSENT) != new.get(key, ABSENT):
            yield key, old.get(key, ABSENT), new.get(key, ABSENT)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _sentence(fault: Any, root: type[Section]) -> str:
    """Put one pydantic fault in words: the key, the value, what was expected, the fix."""
    key = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    kind, value, context = fault["type"], fault.get("input"), fault.get("ctx", {})
    if kind == "extra_forbidden":
        section: Any = root
        for part in fault["loc"][:-1]:
            section = _section_type(section, str(part))
        close = difflib.get_close_matches(
            str(fault["loc"][-1]), section.model_fields, n=1, cutoff=0.6
        )
        prefix = ".".join(str(part) for part in fault["loc"][:-1])
        known = ", ".join(section.model_fields)
        fix = (
            f"did you mean '{prefix + '.' if prefix else ''}{close[0]}'?"
            if close
            else f"known keys{' of ' + prefix if prefix else ''} are {known}"
        )
        return f"unknown key '{key}'; {fix}"
    if kind == "missing":
        return f"'{key}' is missing; add it"
    if kind == "literal_error":
        return f"{key} is {value!r}, expected one of {context['expected']}"
    if kind == "value_error":
        own = str(context["error"])
        return f"{key} is {value!r}, but {own}" if key else own
    if kind in ("tuple_type", "list_type"):
        return f"{key} is {value!r}, expected a list"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} is {value!r}, expected a section of `name: value` lines"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{key} is {value!r}, but {message.replace('input should', 'it should')}"


def _section_type(section: type[BaseModel], name: str) -> type[BaseModel]:
    annotation = section.model_fields[name].annotation
    candidates = [annotation, *get_args(annotation)]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))

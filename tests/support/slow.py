"""Cases that say again what others of their test say: only `-m slow` runs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def again(*cases: Any) -> list[Any]:
    """Return the cases of one parameter, marked as slow."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


def all_but(values: Iterable[Any], repeated: Sequence[Any]) -> list[Any]:
    """Return all values as parameters, those in ``repeated`` marked as slow.

    A tuple is one case of several parameters.

    Raises:
        ValueError: a repeated one is not among the values, so that a changed name is noticed.
    """
    values = list(values)
    for case in repeated:
        if case not in values:
            raise ValueError(f"{case!r} is not among the cases; name one of {values}")
    return [_case(value, slow=value in repeated) for value in values]


def _case(value: Any, *, slow: bool) -> Any:
    parameters = value if isinstance(value, tuple) else (value,)
    return pytest.param(*parameters, marks=pytest.mark.slow if slow else ())

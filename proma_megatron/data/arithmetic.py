"""The built-in task: arithmetic word problems in GSM8K's form.

The generator numbers every problem that a template can make, so that a problem is fully given by
its id, and walks those numbers in a seeded order without repetition. Whether a problem belongs to
"train" or "validation" is decided by a hash of its question alone: no question is in both splits,
whatever the seeds and counts.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from proma_megatron.data.answers import ANSWER_MARK
from proma_megatron.errors import ConfigError
from proma_megatron.types import Problem

Split = Literal["train", "validation"]
Numbers = tuple[int, ...]

NAMES = ("Tom", "Anna", "Ben", "Lily", "Sam", "Mia", "Max", "Eva")
ITEMS = ("apples", "books", "coins", "pens", "cards", "shells", "stamps", "eggs")
VALIDATION_SHARE = 10  # one question of this many belongs to validation


# --------------------------------------------------------------------------- templates


_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Template:
    """One kind of word problem over a finite set of numbers, names and items.

    ``text`` has the fields {name}, {item}, {a}, {b}, and {other} and {c} where it needs them; all
    that varies must appear in it, or two indices would give the same question. A step such as
    "r - c" is one line of the solution, with r the result of the step before; the last is the
    answer.
    """

    name: str
    text: str
    steps: tuple[str, ...]
    numbers: tuple[Numbers, ...]  # the values that (a, b) or (a, b, c) may take

    @property
    def people(self) -> tuple[tuple[str, str], ...]:
        """Ordered pairs of different people, or everyone with nobody where only one appears."""
        if "{other}" in self.text:
            return tuple(permutations(NAMES, 2))
        return tuple((name, "") for name in NAMES)

    @property
    def size(self) -> int:
        """How many different questions this template makes."""
        return len(self.numbers) * len(self.people) * len(ITEMS)

    def numbers_of(self, index: int) -> Numbers:
        """Return the numbers in the question of problem number ``index``."""
        return self.numbers[index // len(ITEMS) // len(self.people)]

    def problem(self, index: int) -> Problem:
        """Return problem number ``index``, 0 <= index < size."""
        index_without_item, item = divmod(index, len(ITEMS))
        pair = index_without_item % len(self.people)
        numbers = self.numbers_of(index)
        name, other = self.people[pair]
        values = dict(zip("abc", numbers, strict=False))  # one-step templates have no c
        question = self.text.format(name=name, other=other, item=ITEMS[item], **values)
        lines = []
        for step in self.steps:
            left, sign, right = step.split()
            x, y = values[left], values[right]
            values["r"] = _OPERATIONS[sign](x, y)
            lines.append(f"{x} {sign} {y} = {values['r']}")
        lines.append(f"{ANSWER_MARK} {values['r']}")
        return Problem(
            id=f"{self.name}-{index}",
            question=question,
            solution="\n".join(lines),
            answer=str(values["r"]),
        )


_TERM = range(2, 21)
_SMALL = range(2, 10)
_SUMS = tuple((a, b) for a in _TERM for b in _TERM)
_DIFFERENCES = tuple((a, b) for a in _TERM for b in range(2, a + 1))
_PRODUCTS = tuple((a, b) for a in _SMALL for b in _SMALL)

TEMPLATES: tuple[Template, ...] = (
    Template(
        "buys",
        "{name} has {a} {item} and buys {b} more. How many {item} does {name} have now?",
        ("a + b",),
        _SUMS,
    ),
    Template(
        "together",
        "{name} has {a} {item} and {other} has {b} {item}. How many {item} do they have together?",
        ("a + b",),
        _SUMS,
    ),
    Template(
        "gives",
        "{name} has {a} {item} and gives {b} to {other}. How many {item} does {name} have left?",
        ("a - b",),
        _DIFFERENCES,
    ),
    Template(
        "compare",
        "{name} has {a} {item} and {other} has {b} {item}. "
        "How many more {item} does {name} have than {other}?",
        ("a - b",),
        _DIFFERENCES,
    ),
    Template(
        "boxes",
        "{name} has {a} boxes with {b} {item} each. How many {item} does {name} have?",
        ("a * b",),
        _PRODUCTS,
    ),
    Template(
        "price",
        "{name} buys {a} {item} for {b} dollars each. How many dollars does {name} pay?",
        ("a * b",),
        _PRODUCTS,
    ),
    Template(
        "days",
        "{name} finds {a} {item} on Monday, {b} on Tuesday and {c} on Friday. "
        "How many {item} does {name} find?",
        ("a + b", "r + c"),
        tuple((a, b, c) for a, b in _SUMS for c in _SMALL),
    ),
    Template(
        "buys-gives",
        "{name} has {a} {item}, buys {b} more and gives {c} to {other}. "
        "How many {item} does {name} have left?",
        ("a + b", "r - c"),
        tuple((a, b, c) for a, b in _SUMS for c in _SMALL if c <= a + b),
    ),
    Template(
        "loses-sells",
        "{name} has {a} {item}, loses {b} and sells {c}. How many {item} does {name} have left?",
        ("a - b", "r - c"),
        tuple((a, b, c) for a, b in _DIFFERENCES for c in _SMALL if c <= a - b),
    ),
    Template(
        "boxes-more",
        "{name} has {a} boxes with {b} {item} each and buys {c} more. "
        "How many {item} does {name} have now?",
        ("a * b", "r + c"),
        tuple((a, b, c) for a, b in _PRODUCTS for c in _TERM),
    ),
    Template(
        "boxes-gives",
        "{name} has {a} boxes with {b} {item} each and gives {c} to {other}. "
        "How many {item} does {name} have left?",
        ("a * b", "r - c"),
        tuple((a, b, c) for a, b in _PRODUCTS for c in _TERM if c <= a * b),
    ),
    Template(
        "change",
        "{name} has {a} dollars and buys {b} {item} for {c} dollars each. "
        "How many dollars does {name} have left?",
        ("b * c", "a - r"),
        tuple((a, b, c) for a in (20, 30, 40, 50) for b, c in _PRODUCTS if b * c <= a),
    ),
)


# --------------------------------------------------------------------------- problems


def split_of(question: str) -> Split:
    """Return the split that owns this question, by a hash of its text."""
    digest = hashlib.sha256(question.encode()).digest()
    return "train" if int.from_bytes(digest[:8]) % VALIDATION_SHARE else "validation"


def generate_problems(
    split: Split, count: int, seed: int, *, largest: int = 50, steps: int = 2
) -> list[Problem]:
    """Return ``count`` different problems of one split, the templates in turn while they last.

    The same arguments give the same list, and a smaller count gives its beginning.

    Args:
        largest: no number in a question exceeds this.
        steps: no solution has more lines of arithmetic than this.

    Raises:
        ConfigError: (a ValueError) the templates have fewer problems than that in this split.
    """
    templates = [template for template in TEMPLATES if len(template.steps) <= steps]
    total = sum(template.size for template in templates)
    problems: list[Problem] = []
    # A count beyond both splits together fails at once, without a walk over millions of problems.
    sources = [_walk(t, split, seed, largest) for t in templates] if count <= total else []
    while sources and len(problems) < count:
        drawn = [(source, next(source, None)) for source in sources]
        sources = [source for source, problem in drawn if problem is not None]
        problems += [problem for _, problem in drawn if problem is not None]
    if len(problems) < count:
        limit = f"has only {len(problems):,}" if count <= total else f"has fewer than {total:,}"
        raise ConfigError(
            f"{count:,} {split} problems were asked for, but the arithmetic task {limit} different "
            f"ones; lower data.{split}_problems, or raise data.largest_number"
        )
    return problems[:count]


def _walk(template: Template, split: Split, seed: int, largest: int) -> Iterator[Problem]:
    """Yield every problem of this template in this split once, in a seeded order."""
    generator = random.Random(f"{seed}/{template.name}")
    for index in _shuffled(template.size, generator):
        if max(template.numbers_of(index)) > largest:
            continue
        problem = template.problem(index)
        if split_of(problem.question) == split:
            yield problem


def _shuffled(size: int, generator: random.Random) -> Iterator[int]:
    """Yield a random permutation of range(size).

    Memory grows with what is consumed, not with size.
    """
    moved: dict[int, int] = {}  # Fisher-Yates, storing only the entries that were swapped
    for i in range(size):
        j = generator.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)

"""Okabe and Ito's palette, which color-blind readers can tell apart."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("", "5 3", "1.5 2.5")  # in turn: a line that lies on another leaves it visible


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def dash(index: int) -> str:
    """Return SVG's dash pattern of a line; empty for a solid one."""
    return DASHES[index % len(DASHES)]

"""What would make the host wait for a GPU, done without.

Kernels run behind the host that launches them. What reads a value, or makes a shape of one, stops
the host until they have caught up, and the device idles until the next launch: `nonzero`, `unique`,
boolean masks as indices, `.item()`, copies of Python lists, and decompositions that check their
outcome. Within a projected backward pass none of them is used where `asynchronous` says so, but for
those that `IntraPromaUpdater` names. Elsewhere they stay, for they touch fewer numbers.
"""

from __future__ import annotations

import torch


def asynchronous(device: torch.device) -> bool:
    """Tell whether reading a value from this device makes the host wait."""
    return device.type != "cpu"


def add_rows(
    out: torch.Tensor,
    places: torch.Tensor,
    values: torch.Tensor,
    chosen: torch.Tensor,
    factors: torch.Tensor | None = None,
) -> None:
    """Add ``factors[t] values[t]`` to ``out[places[t]]`` for the chosen tokens.

    Args:
        out: (n, h).
        places: (T,), of any value where a token is not chosen.
        values: (T, h).
        chosen: (T,) bool.
        factors: (T,); None: 1.
    """
    if asynchronous(out.device):  # how many are chosen is not known here: the others add 0
        if factors is not None:
            values = values * factors[:, None]
        values = values.masked_fill(~chosen[:, None], 0)
        out.index_add_(0, places.masked_fill(~chosen, 0), values)
        return
    tokens = chosen.nonzero()[:, 0]
    values = values[tokens]
    if factors is not None:
        values = values * factors[tokens, None]
    out.index_add_(0, places[tokens], values)


def distinct(rows: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows that chosen tokens name, and which of them each one does.

    Args:
        rows: (T,) int64.
        chosen: (T,) bool.

    Returns:
        The rows (n,), and (T,) places among them, of any value where a token is not chosen. Where
        the host must not wait for n, the first is (T,): rows first, then row 0 again and again.
    """
    if not asynchronous(rows.device):
        tokens = chosen.nonzero()[:, 0]
        used, mine = rows[tokens].unique(return_inverse=True)
        return used, torch.zeros_like(rows).index_copy_(0, tokens, mine)
    ordered, order = rows.masked_fill(~chosen, 0).sort()
    fresh = torch.ones_like(ordered)
    fresh[1:] = ordered[1:] != ordered[:-1]
    along = fresh.cumsum(0) - 1
    places = torch.empty_like(along).scatter_(0, order, along)
    return torch.zeros_like(ordered).scatter_(0, along, ordered), places

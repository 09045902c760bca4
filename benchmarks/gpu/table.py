"""The table of docs/guide/gpu.md, from a file of results."""

from __future__ import annotations

from benchmarks.cost.results import Row
from benchmarks.cost.table import cells_line
from benchmarks.gpu.figures import PEAKS
from benchmarks.gpu.results import GpuResults
from benchmarks.gpu.settings import precision

HEAD = (
    "shape",
    "layers",
    "precision",
    "tokens x k x microbatches",
    "recompute",
    "plain, tokens/s",
    "PROMA, tokens/s",
    "time, PROMA / plain",
    "MFU, plain",
    "MFU, PROMA",
    "peak GiB, plain",
    "peak GiB, PROMA",
)
NO_MEMORY = "out of memory"


def table(results: GpuResults) -> list[str]:
    """Lines of Markdown: what it was measured on, and a row for each setting."""
    machine = results.notes.get("machine", {})
    versions = ", ".join(f"{key} {machine[key]}" for key in sorted(machine) if key != "device")
    device = machine.get("device", "unknown device")
    lines = [f"{device}: {versions}.", _peak(device), "", cells_line(HEAD)]
    lines.append("|---" * len(HEAD) + "|")
    return lines + [cells_line(_cells(row)) for row in results.rows]


def _peak(device: str) -> str:
    if device not in PEAKS:
        return "MFU is left out: no published peak of this device is known here."
    peak = PEAKS[device]
    fp8 = "" if peak.fp8 is None else f" and {peak.fp8:,} TFLOP/s for FP8"
    return f"MFU is relative to {peak.bf16:,} TFLOP/s for bf16{fp8}, dense."


def _cells(row: Row) -> list[str]:
    plain, proma = row["ways"]["plain"], row["ways"]["proma"]
    ratio = row["ratio"]
    return [
        row["shape"],
        str(row["layers"]),
        precision(row["fp8"]),
        f"{row['tokens']:,} x {row['sequences']} x {row['microbatches']}",
        row["recomputed"],
        *(_figure(way, "tokens_per_second", "{:,.0f}") for way in (plain, proma)),
        "-" if ratio is None else f"{ratio['median']:.3f}",
        *(_figure(way, "utilization", "{:.1%}") for way in (plain, proma)),
        *(_figure(way, "peak_bytes", "{:.1f}", 2**30) for way in (plain, proma)),
    ]


def _figure(way: Row | None, name: str, form: str, unit: float = 1) -> str:
    if way is None:
        return NO_MEMORY
    return "-" if way[name] is None else form.format(way[name] / unit)

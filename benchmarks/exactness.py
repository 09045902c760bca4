"""How far projected gradients of layouts lie apart, by dtype: docs/evidence/exactness.md.

    uv run python benchmarks/exactness.py --json OUT.json --png docs/evidence/exactness.png

A random Qwen3 (made with transformers) goes through `proma grads` in every layout and dtype, with
the projection and without. Two errors are taken of each tensor: against one process in the same
dtype (does the layout matter?) and against one process in float64 (does the dtype matter?).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from proma_megatron.batching.batch_file import write_batch
from proma_megatron.commands.verify.comparison import relative_error
from proma_megatron.commands.verify.subject import Subject, random_batch
from proma_megatron.config.model import ComputeConfig
from proma_megatron.config.run import GradientsConfig
from proma_megatron.weights.huggingface import read_model

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

LAYOUTS = {
    "one process": [],
    "tensor 2": ["parallel.tensor=2"],
    "tensor 4, sequence": ["parallel.tensor=4", "parallel.sequence=true"],
    "pipeline 4": ["parallel.pipeline=4"],
    "tensor 2 x pipeline 2": ["parallel.tensor=2", "parallel.pipeline=2"],
}
RULES = {"plain": "none", "projected": "exact"}
DTYPES = ("float64", "float32", "bfloat16")
COLORS = {"plain": "#8a8f98", "projected": "#2f6fb5"}
FROM_FLOAT64 = "#c0392b"

Tensors = dict[str, torch.Tensor]


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def grads(folder: Path, dtype: str, rule: str, overrides: list[str]) -> Tensors:
    out = folder / "out.safetensors"
    subprocess.run(
        [
            *(sys.executable, "-m", "proma_megatron.cli", "grads"),
            *("--hf", str(folder / "model"), "--batch", str(folder / "batch.jsonl")),
            *("--out", str(out), f"model.dtype={dtype}", f"projection.rule={rule}"),
            *("projection.bound=null", *overrides),
        ],
        check=True,
        capture_output=True,
    )
    return {name: value.double() for name, value in load_file(out).items()}


def measure(folder: Path) -> list[dict[str, str | float]]:
    make_model(folder / "model")
    found = read_model(folder / "model", ComputeConfig())
    subject = Subject(GradientsConfig(), found.model, found.vocab_size, folder / "model")
    write_batch(folder / "batch.jsonl", random_batch(subject))
    rows: list[dict[str, str | float]] = []
    for label, rule in RULES.items():
        truth: Tensors = {}
        for dtype in DTYPES:
            alone: Tensors = {}
            for layout, overrides in LAYOUTS.items():
                gradients = grads(folder, dtype, rule, overrides)
                alone = alone or gradients
                truth = truth or gradients
                row: dict[str, str | float] = {"rule": label, "dtype": dtype, "layout": layout}
                for key, reference in (("layout_error", alone), ("dtype_error", truth)):
                    errors = [relative_error(gradients[n], v) for n, v in reference.items()]
                    row[f"{key}_largest"] = max(errors)
                    row[f"{key}_median"] = statistics.median(errors)
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def draw(rows: list[dict[str, str | float]], path: Path) -> None:
    layouts = [layout for layout in LAYOUTS if layout != "one process"]
    labels = [name.replace(" x ", "\nx ").replace(", ", ",\n") for name in layouts]
    figure, panels = plt.subplots(
        1, len(DTYPES), figsize=(11, 3.8), sharey=True, layout="constrained"
    )
    for panel, dtype in zip(panels, DTYPES, strict=True):
        for offset, rule in ((-0.19, "plain"), (0.19, "projected")):
            found = {r["layout"]: r for r in rows if r["dtype"] == dtype and r["rule"] == rule}
            for at, layout in enumerate(layouts):
                error = float(found[layout]["layout_error_largest"])
                if error:
                    panel.bar(at + offset, error, 0.36, color=COLORS[rule])
                else:
                    panel.text(at + offset, 2e-18, "0", ha="center", color=COLORS[rule])
            if rule == "projected" and dtype != "float64":
                own = float(found["one process"]["dtype_error_largest"])
                panel.axhline(own, color=FROM_FLOAT64, linewidth=1.2, linestyle="--")
        panel.set_yscale("log")
        panel.set_ylim(1e-18, 1)
        panel.set_title(dtype)
        panel.set_xticks(range(len(layouts)), labels, fontsize=8)
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("largest relative error of a tensor")
    handles = [
        *(
            Patch(color=color, label=f"{rule}, against one process")
            for rule, color in COLORS.items()
        ),
        Line2D([], [], color=FROM_FLOAT64, linestyle="--", label="one process against float64"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--draw", action="store_true", help="only draw what the JSON file holds")
    options = parser.parse_args()
    if not options.draw:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(Path(folder))
        options.json.write_text(json.dumps(rows, indent=1))
    if options.png:
        draw(json.loads(options.json.read_text()), options.png)


if __name__ == "__main__":
    main()

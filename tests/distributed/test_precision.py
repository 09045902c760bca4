"""Backends, FP8 recipes and operands: what goes together, and what a machine has to have for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from proma_megatron.checkpoints.compatibility import shape_of
from proma_megatron.config.fp8 import RECIPES, token_multiple
from proma_megatron.config.loading import validate_config
from proma_megatron.config.model import ModelConfig
from proma_megatron.config.run import RunConfig
from proma_megatron.distributed import devices, libraries
from proma_megatron.distributed.devices import check_backend, choose_backend
from proma_megatron.errors import ConfigError
from proma_megatron.model.build import transformer_config
from proma_megatron.model.fp8_operands import high_precision

SHAPE = {"hidden_size": 256, "ffn_hidden_size": 512, "heads": 8, "kv_heads": 4, "layers": 4}


def run(model: dict[str, Any], **tree: Any) -> RunConfig:
    half = {"dtype": "bfloat16", **SHAPE}
    return validate_config({"name": "r", "model": half | model, **tree})


@pytest.mark.parametrize("fp8", list(RECIPES))
def test_every_recipe_goes_with_shapes_that_it_can_cut(fp8: str) -> None:
    assert run({"fp8": fp8, "fp8_skip_first": 0}).model.fp8 == fp8


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"model": {"fp8": "current", "dtype": "float32"}}, ["float32", "model.dtype=bfloat16"]),
        ({"model": {"fp8": "mxfp8", "backend": "torch"}}, ["model.backend=torch", "auto"]),
        (
            {"model": {"backend": "transformer_engine", "dtype": "float64"}},
            ["model.dtype=float64", "model.backend=torch"],
        ),
        (
            {"model": {"fp8": "delayed", "fp8_skip_first": 1}},
            ["model.fp8_skip_first", "model.fp8=current"],
        ),
        ({"model": {"fp8_skip_last": 2}}, ["fp8_skip_last is 2", "model.fp8=none"]),
        (
            {"model": {"fp8": "current", "fp8_skip_first": 2, "fp8_skip_last": 2}},
            ["is 4 of 4 layers"],
        ),
        (
            {"model": {"fp8": "current", "fp8_skip_first": 2}, "parallel": {"pipeline": 4}},
            ["model.fp8_skip_first is 2", "the 1 layers of a pipeline stage"],
        ),
        ({"model": {"fp8": "current", "hidden_size": 264}}, ["hidden_size is 264", "of 16"]),
        ({"model": {"fp8": "mxfp8", "ffn_hidden_size": 528}}, ["is 528", "multiple of 32"]),
        (
            {"model": {"fp8": "blockwise"}, "parallel": {"tensor": 4}},
            ["model.heads x model.head_dim / parallel.tensor is 64", "multiple of 128"],
        ),
        (
            {"model": {"fp8": "none"}, "projection": {"fp8_operands": "fp8"}},
            ["projection.fp8_operands is 'fp8'", "bfloat16"],
        ),
        (
            {
                "model": {"fp8": "current"},
                "algorithm": "intra_proma",
                "projection": {"fp8_operands": "fp8"},
            },
            ["'subspace'", "fp8_operands=bfloat16"],
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_does_not_go_together_is_refused_with_the_fix(
    tree: dict[str, Any], parts: list[str]
) -> None:
    tree = dict(tree)
    with pytest.raises(ConfigError) as caught:
        run(tree.pop("model"), **tree)
    for part in parts:
        assert part in str(caught.value)


# --------------------------------------------------------------------------- the machine


def model(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"dtype": "bfloat16", **changes})


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says which version of Transformer Engine is there."""

    def install(version: str | None) -> None:
        monkeypatch.setattr(libraries, "transformer_engine_version", lambda: version)
        monkeypatch.setattr(libraries, "_has_torch_binding", lambda: True)

    return install


def test_auto_takes_transformer_engine_in_bfloat16_where_a_gpu_and_it_are_there(te: Any) -> None:
    te("2.20.2")
    assert choose_backend(model(), "cuda") == "transformer_engine"
    assert choose_backend(model(), "cpu") == "torch"
    assert choose_backend(model(dtype="float32"), "cuda") == "torch"
    assert choose_backend(model(backend="torch"), "cuda") == "torch"
    for version in (None, "2.19.0", "2.21", "3.0", "unknown"):
        te(version)
        assert choose_backend(model(), "cuda") == "torch"


@pytest.mark.parametrize("changes", [{"backend": "transformer_engine"}, {"fp8": "current"}])
@pytest.mark.parametrize(
    ("version", "device", "parts"),
    [
        (None, "cuda", ["not installed", "pip install", "model.fp8=none"]),
        ("2.21.0", "cuda", ["2.21.0", libraries.TE_RANGE, "pip install"]),
        ("2.20.2", "cpu", ["on the CPU", "model.backend=torch model.fp8=none"]),
    ],
)
def test_what_needs_transformer_engine_says_what_is_missing(
    te: Any, changes: dict[str, Any], version: str | None, device: str, parts: list[str]
) -> None:
    te(version)
    with pytest.raises(ConfigError) as caught:
        choose_backend(model(**changes), device)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("fp8", "capability", "cuda", "refused"),
    [
        ("current", (9, 0), "12.4", None),
        ("current", (8, 9), "12.1", None),
        ("delayed", (8, 0), "12.4", "compute capability 8.9 or more; this GPU has 8.0"),
        ("blockwise", (9, 0), "12.9", None),
        ("blockwise", (9, 0), "12.8", "CUDA 12.9 or later; torch has 12.8"),
        ("mxfp8", (10, 0), "13.0", None),
        ("mxfp8", (9, 0), "13.0", "10.0 or more, below 12.0; this GPU has 9.0"),
        ("mxfp8", (12, 0), "13.0", "this GPU has 12.0"),
    ],
)
def test_a_recipe_that_a_gpu_does_not_have_is_refused_with_those_that_it_has(
    te: Any,
    monkeypatch: pytest.MonkeyPatch,
    fp8: str,
    capability: tuple[int, int],
    cuda: str,
    refused: str | None,
) -> None:
    te("2.20.2")
    monkeypatch.setattr(devices.torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(devices.torch.version, "cuda", cuda)
    if refused is None:
        check_backend(model(fp8=fp8), "cuda")
        return
    with pytest.raises(ConfigError) as caught:
        check_backend(model(fp8=fp8), "cuda")
    assert refused in str(caught.value)
    use = str(caught.value).split("; use ")[1]
    assert use.endswith("model.fp8=none")
    assert ("model.fp8=current" in use) is (capability >= (8, 9))


def test_a_transformer_engine_without_its_library_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise ImportError")
    monkeypatch.setattr(libraries, "transformer_engine_version", lambda: "2.20.2")
    assert "no library for torch" in str(libraries.transformer_engine_problem())
    (tmp_path / "transformer_engine_torch.cpython-312.so").touch()
    assert libraries.transformer_engine_problem() is None


def test_the_other_apex_is_told_from_nvidias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert libraries.apex_problem() is None
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('another project')")
    assert "pip uninstall apex" in str(libraries.apex_problem())
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    assert libraries.apex_problem() is None


def test_a_run_on_gpus_says_whose_layers_it_has(te: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    te("2.20.2")
    assert libraries.in_use("transformer_engine", "current") == [
        "layers of Transformer Engine 2.20.2, FP8 with current scaling"
    ]
    monkeypatch.setattr(libraries, "apex_problem", lambda: "another project")
    assert libraries.in_use("torch", "none")[1:] == ["apex: another project"]


# --------------------------------------------------------------------------- shapes and names


@pytest.mark.parametrize(
    ("fp8", "tensor", "sequence", "multiple"),
    [
        ("none", 4, False, 1),
        ("none", 4, True, 4),
        ("current", 4, False, 16),
        ("current", 4, True, 64),
        ("mxfp8", 2, True, 64),
        ("blockwise", 2, True, 256),
    ],
)
def test_each_rank_has_as_many_tokens_as_the_recipe_asks_for(
    fp8: str, tensor: int, sequence: bool, multiple: int
) -> None:
    assert token_multiple(fp8, tensor, sequence_parallel=sequence) == multiple


def test_a_checkpoint_is_of_the_same_model_whatever_computes_with_it() -> None:
    plain, fp8 = model(), model(fp8="current", backend="transformer_engine", fp8_skip_first=1)
    assert shape_of(plain, 10) == shape_of(fp8, 10)


@pytest.mark.parametrize("columnwise", [False, True])
def test_an_operand_is_read_back_as_the_weight_gradient_would_have_read_it(
    columnwise: bool,
) -> None:
    class Quantized:
        """As Transformer Engine's: a copy scaled along rows and one along columns."""

        rows: torch.Tensor | None = torch.full((3, 1, 4), 1.0)
        columns = torch.full((3, 1, 4), 2.0)

        def update_usage(self, *, rowwise_usage: bool, columnwise_usage: bool) -> None:
            self.rows = self.rows if rowwise_usage else None

        def dequantize(self, *, dtype: torch.dtype) -> torch.Tensor:
            return (self.columns if self.rows is None else self.rows).to(dtype)

    operand = Quantized() if columnwise else torch.full((3, 1, 4), 2.0)
    found = high_precision(operand, torch.bfloat16)
    assert found.shape == (3, 4)
    assert bool((found == 2.0).all())


def test_megatron_gets_the_recipe_and_the_layers_that_stay_out_of_it() -> None:
    class OneRank:
        tensor = pipeline = type("Axis", (), {"size": 1})
        virtual_pipeline, sequence_parallel, device = 1, False, torch.device("cpu")

    found = transformer_config(
        model(fp8="mxfp8", fp8_skip_first=1, fp8_skip_last=2, **SHAPE),
        OneRank(),  # type: ignore[arg-type]
    )
    assert (found.fp8, found.fp8_recipe) == ("e4m3", "mxfp8")
    assert found.first_last_layers_bf16
    assert (found.num_layers_at_start_in_bf16, found.num_layers_at_end_in_bf16) == (1, 2)
    hybrid = transformer_config(model(fp8="current", **SHAPE), OneRank())  # type: ignore[arg-type]
    assert (hybrid.fp8, hybrid.fp8_recipe) == ("hybrid", "tensorwise")
    assert transformer_config(model(**SHAPE), OneRank()).fp8 is None  # type: ignore[arg-type]

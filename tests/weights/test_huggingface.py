"""What is read of a Hugging Face directory, and which directories are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from proma_megatron.config.model import ComputeConfig, ModelConfig
from proma_megatron.errors import ConfigError
from proma_megatron.weights.huggingface import read_model

VOCAB = 61
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPUTE = ComputeConfig(dtype="bfloat16", recompute="full")
GONE = object()  # a key to leave out of config.json


@dataclass(frozen=True)
class Saved:
    path: Path
    tensors: dict[str, torch.Tensor]


Models = dict[str, Saved]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    def save(name: str, family: str, *, tied: bool, shard_size: str = "1GB") -> Saved:
        shape: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
            "tie_word_embeddings": tied,
        }
        model: Any
        if family == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**shape))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=generator)
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path, max_shard_size=shard_size)
        return Saved(path, {name: p.detach() for name, p in model.named_parameters()})

    return {
        "qwen2": save("qwen2", "qwen2", tied=False),
        "qwen2-tied": save("qwen2-tied", "qwen2", tied=True),
        "qwen3": save("qwen3", "qwen3", tied=False),
        "qwen3-tied": save("qwen3-tied", "qwen3", tied=True),
        "sharded": save("sharded", "qwen3", tied=False, shard_size="20KB"),
    }


def copy_of(saved: Saved, tmp_path: Path) -> Path:
    return shutil.copytree(saved.path, tmp_path / "copy")


def edit_json(file: Path, changes: dict[str, object]) -> None:
    fields = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not GONE}))


def edit_tensors(path: Path, changes: dict[str, torch.Tensor]) -> None:
    save_file({**load_file(path / WEIGHTS), **changes}, path / WEIGHTS, {"format": "pt"})


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_model(path, COMPUTE)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --------------------------------------------------------------------------- what is read


def expected_shape(family: str, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        hidden_size=32,
        ffn_hidden_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8 if family == "qwen2" else 16,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        tie_embeddings=tied,
        rope_base=50_000.0,
        norm_eps=1e-5,
        dtype="bfloat16",
        recompute="full",
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_shape_is_that_of_config_json(models: Models, family: str, tied: bool) -> None:
    found = read_model(models[f"{family}-tied" if tied else family].path, COMPUTE)
    assert found.model == expected_shape(family, tied=tied)
    assert found.vocab_size == VOCAB


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_older_spelling_of_rope_gives_the_same_shape(
    models: Models, tmp_path: Path, family: str
) -> None:
    path = copy_of(models[family], tmp_path)
    older = {"rope_parameters": GONE, "rope_theta": 50_000.0, "rope_scaling": None}
    edit_json(path / "config.json", {**older, "layer_types": GONE})
    assert read_model(path, COMPUTE).model == expected_shape(family, tied=False)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "sharded"])
def test_slices_are_those_of_the_tensors(models: Models, name: str) -> None:
    found = read_model(models[name].path, COMPUTE)
    for tensor, values in models[name].tensors.items():
        for axis, size in enumerate(values.shape):
            for start, length in [(0, size), (0, 1), (1, size // 2), (size - 3, 3), (2, 0)]:
                slices = found.read(tensor).narrow(axis, start, length)
                assert torch.equal(slices, values.narrow(axis, start, length)), tensor


def test_the_sharded_model_is_in_several_files(models: Models) -> None:
    assert len(set(read_model(models["sharded"].path, COMPUTE).files.values())) > 2


def test_a_tied_model_may_hold_an_equal_head(models: Models, tmp_path: Path) -> None:
    path = copy_of(models["qwen3-tied"], tmp_path)
    edit_tensors(path, {HEAD: models["qwen3-tied"].tensors[EMBEDDING].clone()})
    found = read_model(path, COMPUTE)
    assert found.model == expected_shape("qwen3", tied=True)


def test_a_tied_model_with_a_head_of_its_own_is_refused(models: Models, tmp_path: Path) -> None:
    path = copy_of(models["qwen3-tied"], tmp_path)
    head = models["qwen3-tied"].tensors[EMBEDDING].clone()
    head[-1, -1] += 1
    edit_tensors(path, {HEAD: head})
    message = refusal(path)
    assert "tie_word_embeddings is true" in message
    assert f"{HEAD} differs from {EMBEDDING}" in message


@pytest.mark.ranks
def test_reading_a_model_does_not_load_megatron() -> None:
    code = (
        "import sys, proma_megatron.weights.huggingface\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'megatron'])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------- config.json


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    assert "no directory" in refusal(tmp_path / "none")


def test_a_directory_without_config_json_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{", "can't be read as JSON"),
        (b"\xff\xfe", "can't be read as JSON"),
        (b"[]", "holds list, expected a JSON object"),
    ],
)
def test_a_broken_config_json_is_refused(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    message = refusal(tmp_path)
    assert "config.json" in message
    assert part in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        pytest.param({"model_type": "llama"}, ["llama", "qwen2 or qwen3"], id="llama"),
        pytest.param({"model_type": "qwen3_moe"}, ["qwen3_moe", "dense"], id="qwen3_moe"),
        pytest.param({"model_type": GONE}, ["without model_type"], id="no model_type"),
        pytest.param(
            {"use_sliding_window": True}, ["use_sliding_window is true"], id="use_sliding_window"
        ),
        pytest.param(
            {"layer_types": ["full_attention", "sliding_attention"]},
            ["layer_types", "'sliding_attention'"],
            id="sliding layer",
        ),
        pytest.param({"layer_types": 3}, ["layer_types"], id="layer_types no list"),
        pytest.param(
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0}},
            ["'yarn'"],
            id="yarn",
        ),
        pytest.param({"rope_parameters": "yarn"}, ["rope_parameters", "'yarn'"], id="rope string"),
        pytest.param(
            {
                "rope_parameters": GONE,
                "rope_theta": 5e4,
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            ["'linear'"],
            id="rope_scaling",
        ),
        # transformers lets rope_scaling win over rope_parameters.
        pytest.param(
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            ["'linear'"],
            id="rope_scaling beside rope_parameters",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "default"}}, ["rope_theta"], id="no rope_theta"
        ),
        pytest.param({"attention_bias": True}, ["attention_bias is true"], id="attention_bias"),
        pytest.param({"hidden_act": "gelu"}, ["hidden_act is 'gelu'"], id="gelu"),
        pytest.param({"quantization_config": {"bits": 4}}, ["quantized"], id="quantized"),
        pytest.param({"hidden_size": "many"}, ["hidden_size is 'many'"], id="hidden_size many"),
        pytest.param({"hidden_size": 0}, ["hidden_size is 0", "positive"], id="hidden_size 0"),
        pytest.param({"num_hidden_layers": GONE}, ["num_hidden_layers"], id="no num_hidden_layers"),
        pytest.param({"rms_norm_eps": GONE}, ["rms_norm_eps"], id="no rms_norm_eps"),
    ],
)
def test_a_model_that_cant_be_honoured_is_refused_by_name(
    models: Models, tmp_path: Path, changes: dict[str, object], parts: list[str]
) -> None:
    path = copy_of(models["qwen3"], tmp_path)
    edit_json(path / "config.json", changes)
    message = refusal(path)
    for part in parts:
        assert part in message


# --------------------------------------------------------------------------- tensors


def test_a_directory_without_safetensors_is_refused(models: Models, tmp_path: Path) -> None:
    path = copy_of(models["qwen3"], tmp_path)
    (path / WEIGHTS).unlink()
    assert f"neither {WEIGHTS} nor {INDEX}" in refusal(path)


def test_a_missing_tensor_is_refused(models: Models, tmp_path: Path) -> None:
    path = copy_of(models["qwen3"], tmp_path)
    kept = {name: value for name, value in load_file(path / WEIGHTS).items() if name != NORM}
    save_file(kept, path / WEIGHTS)
    assert f"lacks {NORM}" in refusal(path)


@pytest.mark.parametrize(
    ("model", "extra"),
    [("qwen3", "model.layers.0.self_attn.q_proj.bias"), ("qwen2", "model.layers.2.mlp.x")],
)
def test_an_extra_tensor_is_refused(models: Models, tmp_path: Path, model: str, extra: str) -> None:
    path = copy_of(models[model], tmp_path)
    edit_tensors(path, {extra: torch.zeros(64)})
    assert f"holds {extra}" in refusal(path)


def test_a_tensor_of_a_wrong_shape_is_refused(models: Models, tmp_path: Path) -> None:
    path = copy_of(models["qwen3"], tmp_path)
    edit_tensors(path, {EMBEDDING: torch.zeros(VOCAB - 1, 32)})
    assert f"{EMBEDDING} has shape [60, 32], expected [61, 32]" in refusal(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_slice_that_is_not_finite_is_refused(
    models: Models, tmp_path: Path, value: float
) -> None:
    path = copy_of(models["qwen3"], tmp_path)
    table = models["qwen3"].tensors[EMBEDDING].clone()
    table[7, 3] = value
    edit_tensors(path, {EMBEDDING: table})
    slices = read_model(path, COMPUTE).read(EMBEDDING)
    assert torch.equal(slices.narrow(0, 0, 7), table[:7])
    with pytest.raises(ConfigError, match=f"{EMBEDDING} holds NaN or infinity"):
        slices.narrow(0, 0, 8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_tensor_of_a_strange_dtype_is_refused(
    models: Models, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = copy_of(models["qwen3"], tmp_path)
    edit_tensors(path, {NORM: torch.zeros(32).to(dtype)})
    assert f"{NORM} has dtype" in refusal(path)
    assert "expected one of F64, F32, F16, BF16" in refusal(path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(models: Models, tmp_path: Path, kept: int) -> None:
    path = copy_of(models["qwen3"], tmp_path)
    file = path / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{file} can't be read" in refusal(path)


def test_an_index_that_names_a_missing_file_is_refused(models: Models, tmp_path: Path) -> None:
    path = copy_of(models["sharded"], tmp_path)
    file = path / json.loads((path / INDEX).read_text())["weight_map"][NORM]
    file.unlink()
    assert f"{file} can't be read" in refusal(path)


def test_an_index_that_names_a_tensor_in_the_wrong_file_is_refused(
    models: Models, tmp_path: Path
) -> None:
    path = copy_of(models["sharded"], tmp_path)
    where = json.loads((path / INDEX).read_text())["weight_map"]
    assert where[NORM] != where[EMBEDDING]
    edit_json(path / INDEX, {"weight_map": {**where, NORM: where[EMBEDDING]}})
    assert f"{path / where[EMBEDDING]} has no tensor {NORM}" in refusal(path)


@pytest.mark.parametrize("weight_map", [GONE, [], {NORM: 3}], ids=["none", "list", "no file name"])
def test_a_broken_index_is_refused(models: Models, tmp_path: Path, weight_map: object) -> None:
    path = copy_of(models["sharded"], tmp_path)
    edit_json(path / INDEX, {"weight_map": weight_map})
    message = refusal(path)
    assert INDEX in message
    assert "weight_map" in message

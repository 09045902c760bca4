"""Which optional GPU libraries are installed, without importing them: that takes seconds and a GPU.

PyPI's ``apex`` is a project of another kind. Where it shadows NVIDIA's, Megatron's imports fail and
torch's kernels are taken without a word, so it is looked for and named.
"""

from __future__ import annotations

import re
from importlib import metadata, util
from pathlib import Path

# Weight gradients are captured through Transformer Engine's internals: any other version is
# untested. The range of pyproject.toml's extra `te`.
TE_TESTED = ((2, 20), (2, 21))
TE_RANGE = ">=2.20,<2.21"
TE_INSTALL = f"pip install --no-build-isolation 'transformer-engine[pytorch]{TE_RANGE}'"
APEX_SOURCE = "https://github.com/NVIDIA/apex"


def transformer_engine_version() -> str | None:
    """Return the installed version; None where there is none."""
    if util.find_spec("transformer_engine") is None:
        return None
    try:
        return metadata.version("transformer_engine")
    except metadata.PackageNotFoundError:
        return "unknown"


def transformer_engine_problem() -> str | None:
    """Say why its layers can't be taken, and the fix; None where they can."""
    version = transformer_engine_version()
    if version is None:
        return f"Transformer Engine is not installed; {TE_INSTALL}"
    number = re.match(r"(\d+)\.(\d+)", version)
    low, high = TE_TESTED
    if number is None or not low <= (int(number[1]), int(number[2])) < high:
        return f"Transformer Engine is {version}, tested is {TE_RANGE}; {TE_INSTALL}"
    if not _has_torch_binding():
        return f"Transformer Engine {version} has no library for torch; {TE_INSTALL}"
    return None


def _has_torch_binding() -> bool:
    """Tell whether the compiled part is there: the package can be installed without it."""
    spec = util.find_spec("transformer_engine")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    return any(
        any(place.glob("transformer_engine_torch*.so"))
        for folder in folders
        for place in (folder.parent, folder, folder / "wheel_lib")
    )


def apex_problem() -> str | None:
    """Say that the package apex is not NVIDIA's, and the fix; None where it is, or is missing."""
    spec = util.find_spec("apex")
    if spec is None or has_nvidia_apex():
        return None
    where = next(iter(spec.submodule_search_locations or ()), spec.origin)
    return (
        f"{where} is not NVIDIA's Apex, for PyPI's `apex` is another project; pip uninstall apex, "
        f"then build NVIDIA's from {APEX_SOURCE} or use an NGC container"
    )


def in_use(backend: str, fp8: str) -> list[str]:
    """Return what the start of a run on GPUs says of these libraries."""
    layers = "Megatron-Core's layers, on torch"
    if backend == "transformer_engine":
        layers = f"layers of Transformer Engine {transformer_engine_version()}"
        if fp8 != "none":
            layers += f", FP8 with {fp8} scaling"
    problem = apex_problem()
    return [layers, *([] if problem is None else [f"apex: {problem}"])]


def has_nvidia_apex() -> bool:
    spec = util.find_spec("apex")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders)


def has_fused_weight_gradient() -> bool:
    """Tell whether Apex's GEMM that adds to float32 gradients is there."""
    return util.find_spec("fused_weight_gradient_mlp_cuda") is not None

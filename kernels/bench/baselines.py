"""Other packages to compare with, where they are installed; an absent one gives the reason."""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

# Import names of the packages; the command prints which of them are there
KNOWN = ("spconv", "spconv_triton", "flex_gemm", "gsplat", "nvdiffrast", "flash_attn", "fused_ssim")


def optional(name: str) -> ModuleType | str:
    """Import a module, or say why it cannot be imported.

    It may not be installed, or be built for another torch or CUDA.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        return f"absent: {name} cannot be imported ({type(error).__name__}: {reason})"


def compiled(function: Callable, device: torch.device) -> Callable | str:
    """Compile a function with torch.compile for a GPU; for a CPU, say why not.

    On a CPU the compilation takes longer than everything that is measured. fullgraph: it raises
    where a part would run uncompiled unnoticed.
    """
    if device.type == "cpu":
        return "absent: torch.compile is measured on a GPU only"
    return inductor(function)


def inductor(function: Callable) -> Callable:
    """Compile a function so that its backward pass can run several times on one graph."""
    import torch._functorch.config

    # else the backward pass overwrites what it was given
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, fullgraph=True)

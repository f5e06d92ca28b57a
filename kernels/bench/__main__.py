"""python -m kernels.bench [OP ...] [--size small|base] [--dtype fp16,bf16] [--json PATH] [--errors]

Times every op forward and backward; kernels.bench.command says how, and what the flags do.
"""

import sys

from kernels.bench.command import main
from kernels.bench.ops import OPS

if __name__ == "__main__":
    sys.exit(main(OPS, "python -m kernels.bench"))

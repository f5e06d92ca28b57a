"""python -m kernels.bench [OP ...]: times every op forward and backward.

The flags are described in kernels.bench.command.
"""

import sys

from kernels.bench.command import main
from kernels.bench.ops import OPS

if __name__ == "__main__":
    sys.exit(main(OPS, "python -m kernels.bench"))

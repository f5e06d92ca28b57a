"""python -m kernels.compile: builds every kernel for absent GPUs, see kernels.compile.command."""

import sys

from kernels.compile.command import main

if __name__ == "__main__":
    sys.exit(main())

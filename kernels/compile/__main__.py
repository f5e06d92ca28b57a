"""python -m kernels.compile"""

import sys

from kernels.compile.command import main

if __name__ == "__main__":
    sys.exit(main())

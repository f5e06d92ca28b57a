"""python -m kernels.bench"""

import sys

from kernels.bench.command import main

if __name__ == "__main__":
    sys.exit(main())

"""python -m kernels.profile OP: measures every kernel of an op on a GPU, see kernels.bench.profile.

Not yet measured on a GPU.
"""

import sys

from kernels.bench.ops import OPS
from kernels.bench.profile import main

if __name__ == "__main__":
    sys.exit(main(OPS))

"""The command line, as ``python -m longnet_hpc``."""

import sys

from longnet_hpc.run import main

sys.exit(main())

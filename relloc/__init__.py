"""Pretrains networks by the relative location of image patches, and evaluates what they learned."""

import os
import sys

if sys.platform == "win32" or os.name == "nt":
    # Every command passes here, before the first import of what Windows lacks (fcntl).
    print(
        "relloc: it needs Linux or macOS; on Windows install and run it in WSL (wsl --install)",
        file=sys.stderr,
    )
    sys.exit(2)

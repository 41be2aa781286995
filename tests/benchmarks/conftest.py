"""Puts the benchmarks, which are scripts and no package, where tests can import them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

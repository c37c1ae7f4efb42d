"""Benchmarks: python -m benchmarks.NAME."""

import support  # noqa: F401 (first: sets what torch reads from the environment)

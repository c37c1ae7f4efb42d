"""Benchmarks: python -m benchmarks.NAME."""

import training  # noqa: F401 (first: sets what torch reads from the environment)

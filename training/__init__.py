"""What a training run needs besides the experiment itself; predictions use some of it.

Imported before torch, it sets the environment variables that libraries read when they start.
"""

import os

# By default the threads of libgomp, PyTorch's OpenMP library on Linux, wait for work in a busy
# loop: if other programs need the cores too, training takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "500")
os.environ["MPLBACKEND"] = "agg"  # notebooks set one that other environments do not have

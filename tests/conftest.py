"""One thread per process: the networks here are small, and the tests stay quick where other work shares the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

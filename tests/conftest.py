"""One thread per process: the networks here are small, and the tests stay quick where other work shares the cores.

And Ctrl-C as a terminal has it: a shell starts background jobs with SIGINT ignored, which all their children inherit.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)

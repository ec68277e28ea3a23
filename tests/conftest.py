"""One thread per process: the networks here are small, and the tests stay quick where other work shares the cores.

And Ctrl-C as a terminal has it: a shell starts background jobs with SIGINT ignored, which all their children inherit.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)

# Event files of one second are read in the order of their names, which end with a counter: 99 comes
# after 100. Runs have a process each; tests make many files in one.
from tensorboard.summary.writer import event_file_writer  # noqa: E402

event_file_writer._global_uid = event_file_writer.AtomicCounter(1_000)

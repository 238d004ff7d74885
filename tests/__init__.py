"""The tests. The garbage collector looks after more objects than the 700 of the default: imports make a million."""

import gc

gc.set_threshold(100_000, 20, 100)

"""Training, stage by stage."""

import time

IMPORTED_S = time.time()
"""When this process began to import the training, in seconds since 1970: a worker's first sign of life, for `trace`."""

"""Imported by the server that data-loader workers are forked from, before it forks any, and by nothing else."""

import atexit
import os

from . import retrieval  # noqa: F401 (what a worker would else import anew)


# When the run has ended the server ends at once: taking its imports down would take it seconds. Workers run no such
# handlers, as they leave without them.
atexit.register(os._exit, 0)

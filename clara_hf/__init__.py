"""CLaRa for Hugging Face: what works with a CLaRa model and does not travel with its checkpoints."""

import logging


# PEFT imports bitsandbytes where it is installed, which tells of a kernel that only 4-bit models would use.
if logging.getLogger("bitsandbytes").level == logging.NOTSET:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

"""Questions, documents and candidate pools, read and checked; nothing here imports torch.

>>> from clara_hf.data import load_examples, read_rows
"""

from clara_hf.data.files import DataError
from clara_hf.data.schema import QAExample, iter_examples, load_examples, load_scp
from clara_hf.data.sources import read_rows


__all__ = ["DataError", "QAExample", "iter_examples", "load_examples", "load_scp", "read_rows"]

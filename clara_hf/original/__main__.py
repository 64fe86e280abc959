"""`python -m clara_hf.original`: convert a checkpoint of the release, or back."""

import sys

from .convert import main


sys.exit(main())

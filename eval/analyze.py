"""Pictures and a page about evaluations: `clara analyze`.

python eval/analyze.py --runs runs/eval/joint-test --output_dir runs/analysis
"""

import sys

from clara_hf.evaluation.analyze import main


if __name__ == "__main__":
    sys.exit(main())

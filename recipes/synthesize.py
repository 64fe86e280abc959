"""Make SCP data from one's own documents with any language model: `clara synthesize`.

python recipes/synthesize.py --corpus docs.jsonl --out scp/ --model qwen3-32b --base-url http://localhost:8000/v1
"""

from clara_hf.program import run_program
from clara_hf.synthesis.synthesize import main


if __name__ == "__main__":
    run_program(main)

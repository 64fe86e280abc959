"""Make SCP data from one's own documents with any language model: `clara synthesize`.

python recipes/synthesize.py --corpus docs.jsonl --output_dir scp/ --model qwen3-32b --base_url http://localhost:8000/v1
"""

from clara_hf.cli import load
from clara_hf.program import run_program


if __name__ == "__main__":
    run_program(lambda: load("synthesize")(None))

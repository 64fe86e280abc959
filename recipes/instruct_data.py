"""Make instruction-tuning data: a language model answers questions from retrieved passages.

python recipes/instruct_data.py --questions pools.jsonl --output_dir instruct/ --model qwen3-32b --base_url URL
"""

from clara_hf.cli import load
from clara_hf.program import run_program


if __name__ == "__main__":
    run_program(lambda: load("instruct-data")(None))

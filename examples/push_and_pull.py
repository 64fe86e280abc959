"""Put a checkpoint on the Hub, and use it from there as everyone else can.

    hf auth login
    python examples/push_and_pull.py user/clara-nano
    python examples/push_and_pull.py user/clara-mine --checkpoint runs/joint

What is uploaded is the model with its code, processor, card and results; nothing else of a run's folder. To load it
takes torch, transformers and peft, and not this package.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard

from clara_hf.hub.publish import publish


ROOT = Path(__file__).resolve().parents[1]
# What someone without this package runs.
USE = """
import sys
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
memories = model.compress(["Zora Vinson comes from Galholm and keeps a goat.", "Boryn Dorberg keeps a cat."])
answers = model.generate(questions=["Which animal does Zora Vinson keep?"], memories=memories, n_docs=1)
print(answers.texts[0], answers.indices[0, 0].item())
"""


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", help="user/name on the Hub; made, private, if it does not exist")
    parser.add_argument("--checkpoint", default=str(ROOT / "recipes/nano/pretrained/joint"), help="a CLaRa checkpoint")
    args = parser.parse_args(arguments)
    print(publish(args.checkpoint, args.repo_id, private=True, base_licence="apache-2.0"))
    for result in ModelCard.load(args.repo_id).data.eval_results or []:
        print(f"{result.metric_name}: {result.metric_value}")
    command = [sys.executable, "-c", USE, args.repo_id]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    print(said)
    return said


if __name__ == "__main__":
    main()

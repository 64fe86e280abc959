"""Compress a folder of text files into a store, and ask it.

    python examples/compress_and_ask.py FOLDER "A question?" --model user/clara-...

Each paragraph is a passage. A second call compresses only what is new. `clara ask` does the same for PDF, HTML and
Markdown, with sentence-aware splitting.
"""

import argparse
from pathlib import Path

from clara_hf.memory_store import MemoryStore
from modeling_clara import CLaRaForRetrievalGeneration


ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("question")
    parser.add_argument("--model", default=str(ROOT / "recipes/nano/pretrained/joint"), help="a CLaRa checkpoint")
    parser.add_argument("--store", help="default: FOLDER.memories")
    args = parser.parse_args(arguments)

    passages, sources = [], []
    for path in sorted(Path(args.folder).rglob("*.txt")):
        for passage in filter(None, map(str.strip, path.read_text(encoding="utf-8").split("\n\n"))):
            passages.append(passage)
            sources.append(path.name)

    model = CLaRaForRetrievalGeneration.from_pretrained(args.model).eval()
    store = MemoryStore.open(args.store or f"{args.folder.rstrip('/')}.memories", model)
    store.add(passages, columns={"source": sources})

    found = store.search([args.question], top_k=model.config.top_k)
    answer = model.generate(questions=[args.question], memories=store.get(found.keys[0]), max_new_tokens=32)
    print(answer.texts[0])
    for score, text, source in zip(found.scores[0], found.texts[0], found.columns["source"][0], strict=True):
        print(f"  {float(score):.2f}  {source}: {text}")
    return answer.texts[0]


if __name__ == "__main__":
    main()

"""What tests of the synthesis program share: a corpus, a run, its files, and a script with faults of every kind."""

import json
from pathlib import Path

from scripted_endpoint import Cut, Hang, Say, Status

from benchmarks.synthesis.scripted_teacher import REPAIR, asked_in, fact_document, part_of
from clara_hf.synthesis import synthesize
from clara_hf.synthesis.outputs import OUTPUTS


def write_corpus(path: Path, count: int = 6) -> str:
    rows = [{"id": f"doc{number}", "text": fact_document(number, 4)} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(corpus: str, out: Path, url: str, *options: str) -> dict:
    """The run's statistics."""
    fixed = ["--min_passage_tokens", "8", "--concurrency", "6", "--timeout", "20", "--validation_share", "0"]
    arguments = ["--corpus", corpus, "--out", str(out), "--model", "scripted", "--base-url", url, *fixed, *options]
    synthesize.main(arguments)
    return json.loads((out / "stats.json").read_text(encoding="utf-8"))


def files(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in OUTPUTS if (out / name).is_file()}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def faulty(messages, body, before):
    """A script in which a third of all requests meet one fault, a different one by the request, and then succeed."""
    faults = [
        Status(429, headers={"Retry-After": "0.05"}),
        Status(500),
        Cut(),
        Status(200, "busy"),
        Say('{"pairs": [{"question": "cut off'),
        Hang(0.01),
    ]
    asked = asked_in(messages).rpartition("Question")[2]
    if part_of(messages) == "answer" and "anthem" in asked:
        return Say('{"answerable": false, "answer": ""}')
    if part_of(messages) == "answer" and "dance" in asked:
        return Say('{"answerable": true, "answer": "something else"}')
    choice = body["seed"] % (3 * len(faults))
    if choice >= len(faults) or messages[-1]["content"].startswith(REPAIR):
        return None
    # Only what is no reply passes by itself; one that cannot be read comes again, until it is asked for in a repair.
    return None if before and not isinstance(faults[choice], Say) else faults[choice]

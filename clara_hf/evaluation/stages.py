"""The stages of an evaluation: ranking and answering in fixed batches, each written down as soon as it is done.

Batches depend on the questions alone, not on where an earlier call stopped or on how many processes there are, so that
a run that was killed and goes on gives what an uninterrupted one gives.
"""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.journal import Journal
from clara_hf.evaluation.settings import SystemSpec, slug
from clara_hf.evaluation.systems.base import Ranking


class Workplace:
    """The folder of an unfinished run: rankings, answers and costs of every data file.

    Args:
        folder: where the journals lie.
        batch_size: questions per batch.
    """

    def __init__(self, folder: Path, batch_size: int):
        self.folder = folder
        self.batch_size = batch_size
        self.state = PartialState()

    def _journal(self, stage: str, dataset: str, label: str) -> Journal:
        return Journal(self.folder / stage / dataset, slug(label), self.state.process_index)

    # Ranking

    def rankings(self, dataset: str, ranker: str) -> dict[str, Ranking]:
        """What is ranked so far, by question id."""
        found = self._journal("rankings", dataset, ranker).read()
        return {identifier: Ranking(record["order"], record["scores"]) for identifier, record in found.items()}

    def is_ranked(self, dataset: str, ranker: str, examples: list[QAExample]) -> bool:
        ranked = self._journal("rankings", dataset, ranker).read()
        return all(example.id in ranked for example in examples)

    def rank(self, dataset: str, ranker: str, system, examples: list[QAExample], title: str) -> None:
        """Ranks the candidates of those questions that are not ranked yet."""
        batches = _cut(examples, self.batch_size)

        def work(batch: list[QAExample]) -> list[dict]:
            return [{"order": found.order, "scores": found.scores} for found in system.rank(batch)]

        self._run(self._journal("rankings", dataset, ranker), batches, work, f"{title}: ranking")

    # Answering

    def answers(self, dataset: str, label: str) -> dict[str, dict]:
        """What is answered so far, by question id: `prediction`, `prompt_tokens`, `ms`, `mib`."""
        return self._journal("answers", dataset, label).read()

    def is_answered(self, dataset: str, label: str, asked: dict[str, list[str]]) -> bool:
        return asked.keys() <= self.answers(dataset, label).keys()

    def answer(
        self, dataset: str, spec: SystemSpec, reader, examples: list[QAExample], asked: dict[str, list[str]], title: str
    ) -> None:
        """Answers those questions that are not answered yet.

        Args:
            asked: question id -> the documents to answer from; questions that are not in it are left out.
        """
        chosen = [example for example in examples if example.id in asked]
        # By length, so that little is padded; the longest first, so that a lack of memory shows at once.
        chosen.sort(key=lambda example: reader.length(example.question, asked[example.id]), reverse=True)

        def work(batch: list[QAExample]) -> list[dict]:
            found = reader.answer([one.question for one in batch], [asked[one.id] for one in batch])
            return [{"prediction": answer.text, "prompt_tokens": answer.prompt_tokens} for answer in found]

        journal = self._journal("answers", dataset, spec.label)
        self._run(journal, _cut(chosen, self.batch_size), work, f"{title}: answers")

    def _run(
        self, journal: Journal, batches: list[list[QAExample]], work: Callable[[list], list[dict]], label: str
    ) -> None:
        done = journal.read()
        own = batches[self.state.process_index :: self.state.num_processes]
        counts = [sum(example.id in done for example in batch) for batch in own]
        with tqdm(
            total=sum(map(len, own)),
            initial=sum(counts),
            desc=label,
            unit="question",
            leave=False,
            disable=not self.state.is_main_process,
        ) as bar:
            for batch, count in zip(own, counts, strict=True):
                if count < len(batch):
                    self._write(journal, batch, done, work)
                    bar.update(len(batch) - count)
        self.state.wait_for_everyone()

    def _write(self, journal: Journal, batch: list[QAExample], done: dict, work: Callable[[list], list[dict]]) -> None:
        began = time.perf_counter()
        found = work(batch)
        measured = {
            "ms": round(1000 * (time.perf_counter() - began) / len(batch), 3),
            "mib": round(peak_memory(self.state.device) / 2**20, 1),
        }
        journal.append(
            [
                {"id": example.id, **record, **measured}
                for example, record in zip(batch, found, strict=True)
                if example.id not in done
            ]
        )

    # Costs that are not a question's own

    def note_cost(self, dataset: str, part: str, count: int, seconds: float) -> None:
        """Keeps what preparing `count` documents for a ranker or reader took, in place of what was kept before."""
        if self.state.is_main_process and count:
            row = {"id": f"{dataset}: {part}", "count": count, "seconds": seconds}
            Journal(self.folder, "costs").append([row])

    def measured(self, stage: str, dataset: str, label: str) -> list[dict]:
        """The records of `rankings` or `answers`, with their `ms` and `mib`."""
        return list(self._journal(stage, dataset, label).read().values())

    def milliseconds(self, dataset: str, part: str) -> float | None:
        """Milliseconds per document of what `note_cost` kept; `None` where nothing was measured."""
        row = Journal(self.folder, "costs").read().get(f"{dataset}: {part}")
        return None if row is None else 1000 * row["seconds"] / row["count"]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on an accelerator since the last call, or what the process holds now."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return psutil.Process().memory_info().rss


def _cut(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]

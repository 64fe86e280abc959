"""The systems that an evaluation compares.

Each chooses documents for a question, by ranking its candidates or by rule, and a reader answers from them.

A ranking holds candidate positions (into `QAExample.docs`), best first. `None` in a list of documents means that the
system does not apply to that question.
"""

from collections.abc import Iterable, Iterator

import bm25s
import numpy as np
import Stemmer
import torch
from tqdm.auto import tqdm

from eval.data import QAExample
from eval.metrics.answer_f1.answer_f1 import normalize_answer


class MemoryReader:
    """A CLaRa model that ranks and answers from memories; each distinct document is compressed once.

    Args:
        model: a `CLaRaForRetrievalGeneration`.
        memories: document text -> memory `[num_memory_tokens, hidden_size]` on the CPU, extended in place. Readers
            whose models have the same `compressor_fingerprint()` can share it.
        batch_size: questions (documents, when compressing) per batch.
        max_new_tokens: limit of an answer's length.
    """

    def __init__(self, model, memories: dict[str, torch.Tensor], batch_size: int, max_new_tokens: int):
        self.model = model
        self.processor = model.processor
        self.memories = memories
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens

    def rank(self, examples: list[QAExample], label: str) -> list[list[int]]:
        """Ranks all candidates of each question by the model's scores."""
        self._compress(document for example in examples for document in example.docs)
        rankings = []
        for batch in _batches(examples, self.batch_size, f"{label}: ranking"):
            found = self.model.retrieve(
                [example.question for example in batch],
                [self._stack(example.docs) for example in batch],
                top_k=max(len(example.docs) for example in batch),
            )
            for example, indices in zip(batch, found.indices.tolist(), strict=True):
                rankings.append(indices[: len(example.docs)])
        return rankings

    def answer(self, questions: list[str], documents: list[list[str]], label: str) -> list[str]:
        """Answers each question from the memories of its documents, in the given order."""
        self._compress(document for given in documents for document in given)
        answers = []
        for batch in _batches(list(zip(questions, documents, strict=True)), self.batch_size, f"{label}: answers"):
            generated = self.model.generate(
                questions=[question for question, _ in batch],
                memories=[self._stack(given) for _, given in batch],
                rerank=False,
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
            )
            answers.extend(generated.texts)
        return answers

    def _compress(self, documents):
        missing = [document for document in dict.fromkeys(documents) if document not in self.memories]
        if missing:
            memories = self.model.compress(missing, batch_size=self.batch_size, show_progress=True).cpu()
            self.memories.update(zip(missing, memories, strict=True))

    def _stack(self, documents):
        if not documents:
            config = self.model.config
            empty = torch.empty(0, config.num_memory_tokens, config.hidden_size, dtype=self.model.dtype)
            return empty.to(self.model.device)
        return torch.stack([self.memories[document] for document in documents]).to(self.model.device)


class TextReader:
    """A causal language model that answers from raw text in its prompt.

    Args:
        model: a causal language model of transformers, with its adapter if it has one.
        processor: the `CLaRaProcessor` that writes the prompts and holds the tokenizer.
        batch_size: questions per batch.
        max_new_tokens: limit of an answer's length.
    """

    def __init__(self, model, processor, batch_size: int, max_new_tokens: int):
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens

    @torch.no_grad()
    def answer(self, questions: list[str], documents: list[list[str]], label: str) -> list[str]:
        """Answers each question from the text of its documents, in the given order."""
        tokenizer, config = self.processor.tokenizer, self.processor.config
        prompts = [
            self.processor.answer_prompt(question, documents=given)
            for question, given in zip(questions, documents, strict=True)
        ]
        rows = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        # By length, so that little is padded; the longest first, so that a lack of memory shows at once.
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
        answers = {}
        for batch in _batches(order, self.batch_size, f"{label}: answers"):
            inputs = self.processor.pad_prompts([rows[row] for row in batch]).to(self.model.device)
            sequences = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
            )
            texts = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers.update(zip(batch, (text.strip() for text in texts), strict=True))
        return [answers[row] for row in range(len(rows))]


class System:
    """One row of the table. A system without a reader ranks only."""

    def __init__(self, name: str, reader: MemoryReader | TextReader | None):
        self.name = name
        self.reader = reader

    def rank(self, examples: list[QAExample]) -> list[list[int]] | None:
        """The ranking of each question's candidates, or `None` for a system that does not rank."""
        return None

    def documents(self, examples: list[QAExample], rankings: list[list[int]] | None) -> list[list[str] | None]:
        """The documents that each question is answered from."""
        raise NotImplementedError

    def answer(self, examples: list[QAExample], rankings: list[list[int]] | None) -> list[str | None]:
        """The answer to each question; `None` where the system does not apply."""
        if self.reader is None:
            return [None] * len(examples)
        asked = [
            (index, example.question, given)
            for index, (example, given) in enumerate(zip(examples, self.documents(examples, rankings), strict=True))
            if given is not None
        ]
        answers = [None] * len(examples)
        if not asked:
            return answers
        texts = self.reader.answer([row[1] for row in asked], [row[2] for row in asked], self.name)
        for (index, _, _), text in zip(asked, texts, strict=True):
            answers[index] = text
        return answers


class RankingSystem(System):
    """Answers from the `top_k` best candidates."""

    def __init__(self, name: str, reader: MemoryReader | None, top_k: int | None):
        super().__init__(name, reader)
        self.top_k = top_k

    def documents(self, examples, rankings):
        return [
            [example.docs[position] for position in ranking[: self.top_k]]
            for example, ranking in zip(examples, rankings, strict=True)
        ]


class Clara(RankingSystem):
    """A CLaRa model ranks the candidates and answers from the memories of the best."""

    def rank(self, examples):
        return self.reader.rank(examples, self.name)


class BM25(RankingSystem):
    """BM25 (bm25s: its defaults, English stemmer and stop words) ranks; `reader` answers.

    Args:
        corpus: the passages whose document frequencies and mean length count: all distinct ones of the data file.
        seed: of the order among candidates with equal scores, so that none profits from its place in the file.
    """

    def __init__(self, name, reader, top_k, corpus: list[str], seed: int):
        super().__init__(name, reader, top_k)
        self.rows = {document: row for row, document in enumerate(corpus)}
        self.seed = seed
        self.index = bm25s.BM25()
        self.index.index(_tokenize(corpus), show_progress=False)

    def rank(self, examples):
        chance = np.random.default_rng(self.seed)
        rankings = []
        tokens = _tokenize([example.question for example in examples])
        for example, words in zip(tqdm(examples, desc=f"{self.name}: ranking", leave=False), tokens, strict=True):
            scores = self.index.get_scores_from_ids(self.index.get_tokens_ids(words))
            scores = scores[[self.rows[document] for document in example.docs]]
            rankings.append(np.lexsort((chance.random(len(scores)), -scores)).tolist())
        return rankings


class Gold(System):
    """Answers from the gold documents: the upper bound of retrieval, on memories or on text."""

    def documents(self, examples, rankings):
        return [example.gold or None for example in examples]


class NoMemory(System):
    """Answers from the question alone."""

    def documents(self, examples, rankings):
        return [[] for _ in examples]


class WrongMemory(System):
    """Answers from the gold documents of another question, as many as the question's own."""

    def __init__(self, name: str, reader: MemoryReader, seed: int):
        super().__init__(name, reader)
        self.seed = seed

    def documents(self, examples, rankings):
        return wrong_documents(examples, self.seed)


def wrong_documents(examples: list[QAExample], seed: int) -> list[list[str] | None]:
    """For each question the gold documents of another question that has other answers, as many as its own.

    Where no such question has as many, documents of several are put together. None of them is a gold document of the
    question itself. `None` where the question's gold documents are not known, or too few others are.
    """
    answers = [{normalize_answer(answer) for answer in example.answers} for example in examples]
    starts = np.random.default_rng(seed).integers(len(examples), size=len(examples))
    chosen = []
    for index, example in enumerate(examples):
        # A generator: nearly always the first question that it gives will do.
        others = (
            examples[other].gold
            for other in (np.arange(len(examples)) + starts[index]) % len(examples)
            if answers[other].isdisjoint(answers[index]) and set(examples[other].gold).isdisjoint(example.gold)
        )
        chosen.append(_as_many(len(example.gold), others) if example.gold else None)
    return chosen


def _as_many(count: int, others: Iterable[list[str]]) -> list[str] | None:
    pool = {}
    for documents in others:
        if len(documents) == count:
            return documents
        pool.update(dict.fromkeys(documents))
    return list(pool)[:count] if len(pool) >= count else None


def _tokenize(texts: list[str]) -> list[list[str]]:
    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)


def _batches(items: list, batch_size: int, label: str) -> Iterator[list]:
    with tqdm(total=len(items), desc=label, unit="question", leave=False) as bar:
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            yield batch
            bar.update(len(batch))

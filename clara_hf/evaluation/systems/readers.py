"""Answering from documents: from their memories, or from their text."""

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.systems.base import Answer, Ranking
from clara_hf.evaluation.systems.listwise import cut
from modeling_clara.generation_clara import length_batches


class MemoryReader:
    """A CLaRa model that ranks and answers from memories; each distinct document of a data file is compressed once.

    Several processes compress a part each and share what they made.

    Args:
        model: a `CLaRaForRetrievalGeneration`.
        batch_size: documents per batch when compressing.
        max_new_tokens: limit of an answer's length.
        store: a `MemoryStore` of the same compressor, to read memories from and add missing ones to; `None` keeps them
            in main memory.
        max_tokens: tokens per batch when compressing, in place of `batch_size`.

    Attributes:
        memories: document text -> memory `[num_memory_tokens, hidden_size]` on the CPU, where there is no store.
            Readers whose models have the same `compressor_fingerprint()` can share it.
    """

    def __init__(self, model, batch_size: int | None, max_new_tokens: int, store=None, max_tokens: int | None = None):
        self.model = model
        self.processor = model.processor
        self.batch_size = None if max_tokens is not None else batch_size
        self.max_tokens = max_tokens
        self.max_new_tokens = max_new_tokens
        self.store = store
        self.memories: dict[str, torch.Tensor] = {}

    def prepare(self, documents: list[str]) -> int:
        """Compresses the distinct `documents`, in one call, unless all of them are there already.

        Without a store this forgets the memories of other documents.

        Returns:
            How many documents were compressed.
        """
        documents = list(dict.fromkeys(documents))
        if not documents:
            return 0
        if self.store is not None:
            return self._fill_store(documents)
        # Not only those that are missing: a batch's other documents may change the last bits of a memory, and a run
        # that goes on after a kill must see the same ones.
        if all(document in self.memories for document in documents):
            return 0
        self.memories.clear()
        own = self._share(documents)
        made = self._compress(own)
        for part, memories in gather_object([(own, made)]):
            self.memories.update(zip(part, memories, strict=True))
        return len(documents)

    def _compress(self, documents: list[str]) -> torch.Tensor:
        if not documents:
            return torch.empty(0)
        show = PartialState().is_main_process
        size = {"batch_size": self.batch_size, "max_tokens_per_batch": self.max_tokens}
        return self.model.compress(documents, show_progress=show, **size).cpu()

    def _share(self, documents: list[str]) -> list[str]:
        """This process's documents: whole batches of those that one process would make."""
        state = PartialState()
        if state.num_processes == 1:
            return documents
        lengths = self.processor.encoded_lengths(self.processor.encode_documents(documents))
        batches = length_batches(lengths, self.batch_size, self.max_tokens)
        return [documents[row] for batch in batches[state.process_index :: state.num_processes] for row in batch]

    def _fill_store(self, documents: list[str]) -> int:
        before = len(self.store)
        if PartialState().is_main_process:
            self.store.add(documents, batch_size=self.batch_size, max_tokens_per_batch=self.max_tokens)
        PartialState().wait_for_everyone()
        return len(self.store) - before

    def rank(self, examples: list[QAExample]) -> list[Ranking]:
        """Ranks all candidates of each question by the model's scores."""
        found = self.model.retrieve(
            [example.question for example in examples],
            self._stacks([example.docs for example in examples]),
            n_docs=max(len(example.docs) for example in examples),
        )
        rows = zip(examples, found.indices.tolist(), found.scores.tolist(), strict=True)
        return [Ranking(order[: len(one.docs)], scores[: len(one.docs)]) for one, order, scores in rows]

    def answer(self, questions: list[str], documents: list[list[str]]) -> list[Answer]:
        """Answers each question from the memories of its documents, in the given order."""
        generated = self.model.generate(
            questions=questions,
            memories=self._stacks(documents),
            rerank=False,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
        )
        prompts = self.processor.encode_prompts(questions, [len(given) for given in documents])
        counts = prompts["attention_mask"].sum(dim=1).tolist()
        return [Answer(text, count) for text, count in zip(generated.texts, counts, strict=True)]

    def length(self, question: str, documents: list[str]) -> int:
        """Grows with the prompt's length, so that prompts of like length can share a batch."""
        return len(question) + 4 * len(documents) * self.model.config.num_memory_tokens

    def _stacks(self, rows: list[list[str]]) -> list[torch.Tensor]:
        """Memories `[documents, num_memory_tokens, hidden_size]` of each row of documents, on the model's device."""
        config, device = self.model.config, self.model.device
        distinct = list(dict.fromkeys(document for row in rows for document in row))
        found = self.memories
        if self.store is not None and distinct:
            found = dict(zip(distinct, self.store.get(self.store.keys(distinct)), strict=True))
        empty = torch.empty(0, config.num_memory_tokens, config.hidden_size, dtype=self.model.dtype, device=device)
        return [torch.stack([found[document] for document in row]).to(device) if row else empty for row in rows]


class ShuffledReader(MemoryReader):
    """A [`MemoryReader`] that puts every vector of a memory in the place of the next one: a control that tells whether
    places matter beside content.

    Args:
        reader: whose model and memories it reads.
    """

    def __init__(self, reader: MemoryReader):
        super().__init__(reader.model, reader.batch_size, reader.max_new_tokens, reader.store, reader.max_tokens)
        self.memories = reader.memories

    def _stacks(self, rows: list[list[str]]) -> list[torch.Tensor]:
        return [memories.roll(1, dims=1) for memories in super()._stacks(rows)]


class TextReader:
    """A causal language model that answers from raw text in its prompt.

    Args:
        model: a causal language model of transformers, with its adapter if it has one.
        processor: the `CLaRaProcessor` that writes the prompts and holds the tokenizer.
        max_new_tokens: limit of an answer's length.
        doc_max_length: tokens of a document that the prompt shows; the rest is cut.
        shorten: shortens documents before they are read; `None` leaves them as they are.
    """

    def __init__(self, model, processor, max_new_tokens: int, doc_max_length: int, shorten=None):
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.doc_max_length = doc_max_length
        self.shorten = shorten
        self.texts: dict[str, str] = {}

    def prepare(self, documents: list[str]) -> int:
        """Cuts, and shortens, each distinct document once. Returns how many were shortened."""
        missing = [document for document in dict.fromkeys(documents) if document not in self.texts]
        texts = [cut(document, self.processor.tokenizer, self.doc_max_length) for document in missing]
        if self.shorten is not None:
            texts = self.shorten(texts)
        self.texts.update(zip(missing, texts, strict=True))
        return len(missing) if self.shorten is not None else 0

    @torch.no_grad()
    def answer(self, questions: list[str], documents: list[list[str]]) -> list[Answer]:
        """Answers each question from the text of its documents, in the given order."""
        tokenizer, config = self.processor.tokenizer, self.processor.config
        prompts = [
            self.processor.answer_prompt(question, documents=[self.texts[document] for document in given])
            for question, given in zip(questions, documents, strict=True)
        ]
        rows = self.processor.tokenize(prompts)
        inputs = self.processor.pad_prompts(rows).to(self.model.device)
        # A decoder that carried CLaRa's adapters can write their tokens, which its base does not know.
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        sequences = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            suppress_tokens=[token for token in config.added_token_ids if token < vocabulary] or None,
        )
        texts = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [Answer(text.strip(), len(row)) for text, row in zip(texts, rows, strict=True)]

    def length(self, question: str, documents: list[str]) -> int:
        """Grows with the prompt's length, so that prompts of like length can share a batch."""
        return len(question) + sum(len(self.texts[document]) for document in documents)

"""A model whose memories depend on the text alone, and what the tests of the memory store do to its files."""

import hashlib
import os
import signal
from types import SimpleNamespace

import torch

from clara_hf.memory_store.store import MemoryStore


class FakeModel:
    """Makes a document's memory from its text alone, and counts what it compresses."""

    def __init__(self, fingerprint="a" * 64, num_memory_tokens=2, hidden_size=8, dtype=torch.float32, **config):
        self.config = SimpleNamespace(
            num_memory_tokens=num_memory_tokens,
            hidden_size=hidden_size,
            doc_max_length=64,
            base_model_name_or_path="some/base",
        )
        for name, value in config.items():
            setattr(self.config, name, value)
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.batches = []
        self.fingerprinted = 0
        self._weights = "", torch.empty(0)

    def compressor_fingerprint(self):
        self.fingerprinted += 1
        return self.fingerprint

    def named_parameters(self):
        if self._weights[0] != self.fingerprint:
            self._weights = self.fingerprint, torch.tensor(list(self.fingerprint.encode()), dtype=torch.float32)
        return [("compressor.lora_A", self._weights[1])]

    def encode_questions(self, questions, batch_size=32):
        """Near the memory of the document that a question names."""
        return torch.stack([self.memory(question) for question in questions])

    def compress(self, documents, batch_size=32):
        assert len(documents) <= batch_size
        memories = torch.stack([self.memory(document) for document in documents])
        self.batches.append(list(documents))
        return memories

    def memory(self, document):
        seed = int.from_bytes(hashlib.sha256(document.encode()).digest()[:7], "big")
        shape = (self.config.num_memory_tokens, self.config.hidden_size)
        return (10 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(self.dtype)

    @property
    def compressed(self):
        return [document for batch in self.batches for document in batch]


class SpectrumModel(FakeModel):
    """Its memories lie near a few directions, as a real model's do."""

    def __init__(self):
        super().__init__(num_memory_tokens=2, hidden_size=16)
        generator = torch.Generator().manual_seed(7)
        self.device = torch.device("cpu")
        self.mixing = torch.randn(12, 32, generator=generator) * torch.logspace(0.5, -0.5, 12).unsqueeze(1)
        self.offset = torch.randn(32, generator=generator)

    def memory(self, document):
        hidden = super().memory(document).flatten()[:12] / 10
        return (hidden @ self.mixing + self.offset).unflatten(0, (2, 16))


class OrderedModel(SpectrumModel):
    """Its memories depend on their batch; before one it does what a file says, once: dies, or fails."""

    def __init__(self, orders=None):
        super().__init__()
        self.orders = orders

    def compress(self, documents, batch_size=32):
        if self.orders is not None and self.orders.exists():
            order = self.orders.read_text()
            if order in documents[0] or order == "die":
                self.orders.unlink()
            if order == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if order in documents[0]:
                raise ValueError(f"no memory for {documents[0]}")
        return super().compress(documents, batch_size) + 1e-3 * self.memory("\n".join(documents))


class FailingModel(FakeModel):
    """Fails at the compression of one document."""

    def __init__(self, document, failure, **kwargs):
        super().__init__(**kwargs)
        self.document = document
        self.failure = failure

    def memory(self, document):
        if document == self.document:
            self.failure()
        return super().memory(document)


DOCUMENTS = [f"document number {index} " + "word " * (index % 5) for index in range(40)]


def expected(documents, dtype=torch.float32):
    return torch.stack([FakeModel().memory(document) for document in documents]).to(dtype)


def raise_(error):
    raise error


def data_files(path):
    return sorted((path / "data").glob("*.lance"))


def replace_bytes(path, old, new):
    """Changes bytes inside the one data file that holds them, as a failing disk would."""
    (file,) = [file for file in data_files(path) if old in file.read_bytes()]
    content = file.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    file.write_bytes(content.replace(old, new))


class BatchModel(FakeModel):
    """Its memories depend, like a real model's in the last bits, on all documents of their batch."""

    def compress(self, documents, batch_size=32):
        shift = self.memory("\n".join(documents))
        return super().compress(documents, batch_size) + 1e-3 * shift


def alone(path):
    """Memories that one uninterrupted process with a `BatchModel` makes of `DOCUMENTS`, four at a time."""
    store = MemoryStore.open(path, BatchModel(), dtype="float32")
    return store.get(store.add(DOCUMENTS, batch_size=4, show_progress=False))


def add_together(rank, path, model=None, documents=DOCUMENTS, **options):
    """Adds `documents` together with the other processes, four at a time, a part each; returns what it compressed."""
    store = MemoryStore.open(path, model or BatchModel(), dtype="float32")
    store.write_bytes = 1
    columns = {"index": list(range(len(documents)))}
    keys = store.add(documents, columns, batch_size=4, show_progress=False, distributed=True, **options)
    assert len(store.get(keys)) == len(documents)  # everything is there in every process
    return store.model.compressed


def killed_at(batch, model):
    """`model`, which dies as after kill -9 when it compresses its `batch`-th batch."""
    whole = model.compress

    def compress(documents, batch_size=32):
        if len(model.batches) == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(documents, batch_size)

    model.compress = compress
    return model

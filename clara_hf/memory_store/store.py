"""Documents and their memories on disk: each document is compressed once, ever, read by key and found by questions."""

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .build import Addition, batch_size_of
from .copies import copy_store, locate, push_store
from .encoding import FITTED, FORMS
from .keys import Maker, state_of
from .processes import Processes
from .reader import StoreReader, checked
from .table.columns import check_columns
from .table.layout import TORCH_TYPES, CorruptMemoryError, code_column, is_blank
from .table.remote import LOCK, Remote
from .table.table import MemoryTable
from .upkeep import Report, fit_store, verify_store


if TYPE_CHECKING:
    from .actors import RayActors

# So many files make every read slow: an addition that leaves more joins them.
MOST_PIECES = 64
# Files that older versions alone have are kept so long after an addition, for those that still read them.
KEPT = timedelta(minutes=10)


class MemoryStore(StoreReader):
    """Documents, their memories, and columns of the user's: one row per distinct text. Made by [`MemoryStore.open`].

    The folder is a Lance dataset with the columns `key` (hash of the text and of the compressor that made the memory),
    `text`, `memory` (or its codes, where the store has another form than "none"), any others given to
    [`MemoryStore.add`], and a checksum for every value. Each write is a new version of the dataset: a crash or a full
    disk costs at most what was not written yet, and readers of an older version go on.

    What is guaranteed: `get` checks every memory that it reads against its checksum and key, `columns` every value
    (those of stores of format 1 have no checksums, of texts apart), `search` every memory that it scores; damage is an
    error there, never a value. `add` makes anew what is lost with a file; [`MemoryStore.verify`] reads everything.

    A pickled store holds its path, not its rows nor the model: the copy reads, and cannot add. Data-loader workers get
    such copies where they are started by "forkserver" or "spawn" (`multiprocessing_context` of a DataLoader); forked
    ones, in which Lance can hang, are refused.

    Example:

    ```python
    store = MemoryStore.open("runs/memories", model)
    keys = store.add(["A first document.", "A second one."], columns={"title": ["first", "second"]})
    memories = store.get(keys)  # [2, num_memory_tokens, hidden_size]
    titles = store.columns(keys, ["title"])["title"]  # ["first", "second"]
    found = store.search(["Which is first?"], top_k=1)  # found.scores, found.keys, found.texts, found.columns
    ```
    """

    write_bytes = 256 * 2**20  # a part is written at this many bytes of memories ...
    write_seconds = 30.0  # ... or after this time, which is then what a kill can cost a process

    def __init__(self, table: MemoryTable, model=None, rate: int | None = None):
        super().__init__(table, model, rate)
        self._seen = None if model is None else state_of(self.model)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_seen": None}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        model=None,
        dtype: str = "auto",
        form: str = "auto",
        revision: str | None = None,
        rate: int | None = None,
    ) -> "MemoryStore":
        """Opens the store at `path`, or creates it there when a model is given.

        Args:
            path: a local folder; "s3://bucket/folder", where one process can write at a time; or, to read it alone,
                "hf://datasets/user/repository", which is downloaded into the Hub's cache.
            model: the model whose compressor makes the memories; without one, an existing store is opened to read.
            dtype: of the memories, "float16", "bfloat16", "float32", or "auto": an existing store's own; for a new one
                bfloat16 if the model is in bfloat16, else float16.
            form: in which memories are stored: "none" (as they are), "rotated8", "rotated4", "rotated2", "fitted2",
                "fitted1.5" or "fitted1" (the number is bits per value), or "auto": an existing store's own, "none" for
                a new one. A store of a fitted form keeps memories as they are until [`MemoryStore.fit`].
            revision: branch, tag or commit of a repository of the Hub.
            rate: which of the model's several compression rates its memories have; by default the one in use, see
                `at_rate`.

        Raises:
            FileNotFoundError: nothing is at `path` and no model is given.
            OSError: no store can be read at an address, or it cannot be downloaded.
            ValueError: `path` holds something else; the store was made by another compressor, rate, width or document
                length (both makers are named), or holds another dtype or form.
        """
        if dtype != "auto" and dtype not in TORCH_TYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be 'auto', 'float16', 'bfloat16' or 'float32'")
        if form not in ("auto", *FORMS):
            raise ValueError(f"form is {form!r}; it must be 'auto' or one of {FORMS}")
        path, frozen = locate(path, revision)
        maker = None if model is None else Maker.of(model if rate is None else model.at_rate(rate))
        blank = not frozen and is_blank(path) if isinstance(path, Path) else maker is not None and Remote(path).is_blank
        if blank:
            if maker is None:
                raise FileNotFoundError(
                    f"no memory store at {path}: open it with a model to create it, or mend the path"
                )
            auto = "bfloat16" if model.dtype == torch.bfloat16 else "float16"
            MemoryTable.create(path, maker, auto if dtype == "auto" else dtype, "none" if form == "auto" else form)
        table = MemoryTable.open(path, frozen)
        if maker is not None and not maker.makes_the_same_as(table.maker):
            raise ValueError(
                f"the memories in {path} were made by {table.maker}; the model given is {maker}, in dtype "
                f"{str(model.dtype).removeprefix('torch.')}: open the store with the model that made it, in the dtype "
                "and at the rate of then, or choose another path"
            )
        if dtype not in ("auto", table.dtype):
            raise ValueError(
                f"dtype is {dtype!r}, and the store at {path} holds {table.dtype}, not {dtype}: choose another path, "
                "or dtype='auto'"
            )
        if form != "auto" and form != table.wanted_form:  # "auto" reads no rows, so that a damaged store can be mended
            raise ValueError(
                f"form is {form!r}, and the store at {path} has form {table.wanted_form!r}: open it with form='auto' "
                f"and call recode({form!r}), or choose another path"
            )
        return cls(table, model, rate)

    def add(
        self,
        documents: Sequence[str],
        columns: Mapping[str, Sequence] | None = None,
        batch_size: int | None = None,
        show_progress: bool = True,
        verify: str = "changed",
        distributed: bool = False,
        actors: "RayActors | None" = None,
        max_tokens_per_batch: int | None = None,
    ) -> list[str]:
        """Stores `documents`; compresses those that are not stored yet, each distinct text once, longest first.

        Finished parts are safe on disk at once and go into the store together at the end. After an interruption, a kill
        included, the same call compresses only the rest, in the batches of the uninterrupted call: on like devices all
        memories equal its memories bit for bit, whatever the number of processes. Memories made again because single
        rows were damaged get other neighbours in their batch, on which the last bits depend.

        Before anything is compressed, all missing documents are checked; how many were cut is told at the end. A call
        that finds everything stored writes nothing, so that it works where the store cannot be written to.

        Args:
            documents: non-empty strings without tokens that the model reserves: a list, a column of a data set, a NumPy
                array or a pandas series.
            columns: values to keep beside each document, by column name, one for each document. They replace those of
                documents already stored; a text that occurs several times in `documents` keeps the first one's. A new
                column is None for the other documents stored before. What could not come back as it is is refused.
            batch_size: documents per forward pass, 64 by default.
            show_progress: whether to show a bar (of several processes, in the first).
            verify: which stored memories of `documents` are made again: "changed", those in files that are gone or
                cannot be read, or "all", which reads them, also those that are not what was written. `get` verifies
                what it reads, always.
            distributed: whether all processes of the running torch.distributed job call this together, with the same
                arguments: each compresses its share, and all return when everything is stored. The path must be on a
                file system that they share. Without such a job it means nothing.
            actors: those of a Ray cluster ([`RayActors`]), which compress in the place of this process. The path must
                be on a file system that they share.
            max_tokens_per_batch: tokens per forward pass, padding and memory tokens included, in place of `batch_size`.

        Returns:
            The documents' keys, in their order.

        Raises:
            ValueError: the store was opened without a model, or the model's compressor changed since; a bad document
                (its position is named) or column; a memory that is not finite, or too large for float16; processes
                with different arguments or without a shared file system.
            OSError: the disk is full, too small for what is missing, or read-only; what was written before is kept.
        """
        self._check_model()
        size = batch_size_of(self.model, batch_size, max_tokens_per_batch)
        if verify not in ("changed", "all"):
            raise ValueError(f"verify is {verify!r}; it must be 'changed' or 'all'")
        if distributed and actors is not None:
            raise ValueError("distributed=True and actors are two ways to compress together: choose one")
        documents = checked(documents)
        check_columns(columns, len(documents))
        with Processes.of(distributed) as processes, ExitStack() as held:
            processes.from_first(lambda: held.enter_context(self._table.writing()))
            addition = Addition(self, documents, columns, size, processes, actors)
            if processes.from_first(lambda: verify == "changed" and addition.is_done()):
                return addition.keys
            processes.from_first(lambda: self._check_writable(f"to add {len(addition.missing())} documents"))
            processes.check_shared(self._table.parts)
            try:
                addition.run(verify, show_progress)
            except BaseException:
                if processes.is_first:
                    self._table.bring_up()
                raise
            processes.from_first(self._tidy)
            self._table.load(processes.from_first(self._table.newest))
        return addition.keys

    def _check_model(self) -> None:
        if self.model is None:
            raise ValueError(
                f"the memory store at {self.path} is open to read: add through MemoryStore.open(path, model)"
            )
        # The fingerprint reads all weights: only where something of them is not as it was.
        seen = state_of(self.model)
        if seen == self._seen:
            return
        maker = Maker.of(self.model)
        if not maker.makes_the_same_as(self.maker):
            raise ValueError(
                f"the model's compressor has changed since the memory store at {self.path} was opened, from "
                f"{self.maker} to {maker}: open a store at another path for it"
            )
        self._seen = seen

    def _check_writable(self, what: str) -> None:
        if not self._table.is_writable:
            raise OSError(
                errno.EROFS,
                f"the memory store at {self.path} is read-only here, so that it can be read and searched, and nothing "
                f"can be written ({what}): copy it to where you can write, by copy_to(folder)",
            )

    def _tidy(self) -> None:
        """Joins small files once there are many, unless another process writes just now."""
        many = len(self._table.snapshot().pieces) > MOST_PIECES
        if many or self._searcher.needs_index():
            with self._table.changing(wait=False) as got:
                if got and many:
                    self._table.compact(KEPT)
                if got:
                    self._searcher.bring_index_up()

    # Changing

    def delete(self, keys: Sequence[str]) -> None:
        """Removes the documents of `keys`.

        Raises:
            KeyError: names the first key that is not stored; nothing is removed.
        """
        self._check_writable("to delete")
        with self._table.changing():
            keys, _ = self._locate(keys)
            self._table.remove(sorted(set(keys)))

    def update(
        self,
        keys: Sequence[str],
        documents: Sequence[str] | None = None,
        columns: Mapping[str, Sequence] | None = None,
        **options,
    ) -> list[str]:
        """Gives stored documents other texts, other values of columns, or both.

        A document with another text is another one: it is compressed, keeps the columns that are not given, and gets
        another key. The old ones are removed when the new ones are stored.

        Args:
            keys: of stored documents, each once.
            documents: their new texts, in the order of `keys`.
            columns: new values by column name, in the order of `keys`.
            options: of [`MemoryStore.add`].

        Returns:
            The documents' keys, in the order of `keys`.
        """
        keys, _ = self._locate(keys)
        if len(set(keys)) < len(keys):
            raise ValueError("keys holds one key twice: give each document once")
        before = self.columns(keys)
        texts = before.pop("text")
        documents = texts if documents is None else checked(documents)
        if len(documents) != len(keys):
            raise ValueError(f"documents has {len(documents)} texts for {len(keys)} keys")
        check_columns(columns, len(keys))
        new = self.add(documents, {**before, **(columns or {})}, **options)
        gone = [key for key in keys if key not in set(new)]
        if gone:
            self.delete(gone)
        return new

    def compact(self, keep: timedelta = timedelta(0)) -> None:
        """Joins small files, and removes files that only versions older than `keep` have.

        Other processes that read such a version go on with the newest one.
        """
        self._check_writable("to compact")
        with self._table.changing():
            self._table.compact(keep)
            self._searcher.bring_index_up()

    def fit(
        self,
        form: str = "auto",
        seed: int = 0,
        show_progress: bool = True,
        questions: Sequence[str] | torch.Tensor | None = None,
    ) -> dict:
        """Fits the search to what is stored, and a form to its memories; then stores them in it.

        Sketches are made for all rows, and an index of them; documents that are added later get theirs as they are
        stored. A fitted form takes one eigendecomposition per memory token. Fit once there is a good sample of the
        documents; again when others have come in. The share of the exact top 5 that search finds is measured, and
        kept in `stats()`.

        Args:
            form: the store's own by default; another one than "none" recodes a store of form "none".
            seed: of the samples.
            show_progress: whether to show bars.
            questions: by which the share is measured, as `search` takes them: some that your documents are asked.
                Memories with noise by default.

        Returns:
            What was measured: `documents`, `form`, `questions` (how many), `kind` of them and `share_of_exact_top_5`.

        Raises:
            ValueError: there are too few documents, which are counted; or no questions, or none that `search` takes.
        """
        if form not in ("auto", *FORMS):
            raise ValueError(f"form is {form!r}; it must be 'auto' or one of {FORMS}")
        if questions is not None and len(questions) == 0:
            raise ValueError("questions is empty: leave it out, or give some")
        asked = None if questions is None else self._queries(questions, 32)
        self._check_writable("to fit")
        with self._table.writing():
            self._table.bring_up()
            form = self._table.wanted_form if form == "auto" else form
            self._check_recodable(form)
            return fit_store(self, form, seed, show_progress, asked)

    def unlock(self) -> None:
        """Takes the lock of a store in object storage away from a process that was killed while it wrote.

        A process that still runs must not lose it. Folders need none of this: their lock ends with its process.
        """
        if self._table.remote is not None:
            self._table.remote.remove(LOCK)

    def index_texts(self) -> None:
        """Makes an index of the words of all texts, for `search(..., hybrid=True)`.

        Documents that are added later are found without it, and taken into it by [`MemoryStore.compact`].
        """
        self._check_writable("to index texts")
        with self._table.changing():
            self._table.texts.make()

    def verify(self, repair: bool = False, show_progress: bool = True) -> Report:
        """Reads every value and every file of the store, and compares it with what was written.

        Args:
            repair: whether to make anew what is damaged, from the texts: memories and sketches by the model, the search
                index from the sketches. Values of the user's columns that are damaged become None; rows whose text is
                damaged are removed. Both are named in the report.
            show_progress: whether to show a bar.
        """
        return verify_store(self, repair, show_progress)

    def copy_to(self, target: str | os.PathLike) -> None:
        """Copies the newest version of the store to a new local folder or, "s3://bucket/folder", to object storage.

        Others may read and write meanwhile. After an interruption, the same call sends object storage what it lacks.

        Raises:
            FileExistsError: something is at `target`.
        """
        copy_store(self, target)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        license: str | None = None,
        token: str | None = None,
    ) -> str:
        """Uploads the newest version of the store to a data set repository of the Hub, in one commit, with a card.

        `MemoryStore.open("hf://datasets/" + repo_id, model)` reads it. A card that is there keeps what is outside of
        the part about the store.

        Args:
            repo_id: such as "user/corpus-memories"; made where it does not exist.
            private: whether a repository that is made is private; its owner's default where it is None.
            revision: branch, made where it does not exist.
            license: of the documents, for the card.
            token: of the Hub; the one that is logged in by default.

        Returns:
            The commit's URL.
        """
        return push_store(self, repo_id, private, revision, license, token)

    def recode(self, form: str) -> None:
        """Stores all memories in another form, made from how they are stored now; nothing is compressed again.

        One new version of the store: after a kill it is as before. A fitted form needs [`MemoryStore.fit`].

        Raises:
            ValueError: `form` is none; or has more bits than the memories are stored with now.
        """
        if form in FITTED:
            raise ValueError(f"form {form!r} is fitted to the memories: call fit(form={form!r})")
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; it must be one of {FORMS}")
        self._recode("memory" if form == "none" else code_column(form))

    def _check_recodable(self, form: str) -> None:
        if self.form not in ("none", form):
            raise ValueError(
                f"the store at {self.path} holds codes of form {self.form!r}: codes made from these would be worse "
                f"than form {form!r} is; add the documents to a new store"
            )

    def _recode(self, column: str) -> None:
        self._check_writable("to recode")
        form = self._table.form_of(column)
        with self._table.changing():
            if column == self._table.memory_column:
                return
            self._check_recodable(form.name)
            self._table.recode(column, lambda keys, offsets: form.encode(self._read(keys, offsets)).numpy())


__all__ = ["CorruptMemoryError", "MemoryStore"]

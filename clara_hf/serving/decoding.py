"""How the rows of one batch are decoded, each with its own length, temperature, seed and stop texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, StoppingCriteria, TopPLogitsWarper


REPLACEMENT = "\ufffd"  # stands for bytes of a character that is not complete yet


@dataclass(frozen=True)
class Decoding:
    """One request's options; `temperature` 0 is greedy, as the paper decodes. `seed` makes sampling repeatable."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1


class TextStream:
    """Gives the text of growing token ids in pieces that never have to be taken back.

    Held back are white space at the end, an incomplete character, and what may turn out to begin a stop text; the
    pieces joined are the text as `model.generate` returns it, up to the first stop text.

    Args:
        decode: text of token ids.
        stop: texts before which the answer ends.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self.decode, self.stop = decode, stop
        self.given = ""
        self.stopped = False

    def piece(self, ids: list[int], last: bool = False) -> str:
        """What can be given on top of earlier pieces; all of the rest if these are the `last` ids."""
        text = self.decode(ids).lstrip()
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        elif not last:
            text = text.rstrip(REPLACEMENT)
            text = text[: len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)]
        piece = text.rstrip()[len(self.given) :]
        self.given += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may begin `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Row:
    """One answer in the making.

    Args:
        decoding: its request's options.
        choice: which of its request's answers; it shifts the seed.
        text: for its pieces.
        end_ids: tokens that end it.
        on_piece: called with each piece of text, of a request that streams.
        on_end: called once, with this row.
        is_wanted: whether anybody still waits for it.
    """

    def __init__(
        self,
        decoding: Decoding,
        choice: int,
        text: TextStream,
        end_ids: Sequence[int],
        on_piece: Callable[[str], None] | None,
        on_end: Callable[["Row"], None],
        is_wanted: Callable[[], bool],
    ):
        self.decoding, self.text, self.end_ids = decoding, text, frozenset(end_ids)
        self.on_piece, self.on_end, self.is_wanted = on_piece, on_end, is_wanted
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.random = torch.Generator()
        if decoding.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(decoding.seed + choice)

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None

    def push(self, token: int) -> None:
        """Takes the next token in, and ends the row where it is the last one."""
        if not self.is_wanted():
            self._end("cancelled")
        elif token in self.end_ids:
            self._end("stop")
        else:
            self.ids.append(token)
            if self.on_piece or self.decoding.stop:
                self._give(self.text.piece(self.ids))
            if self.text.stopped:
                self._end("stop")
            elif len(self.ids) >= self.decoding.max_tokens:
                self._end("length")

    def _end(self, reason: str) -> None:
        self.finish_reason = reason
        if reason != "cancelled" and not self.text.stopped:
            self._give(self.text.piece(self.ids, last=True))
        self.on_end(self)

    def _give(self, piece: str) -> None:
        if piece and self.on_piece:
            self.on_piece(piece)


class RowControl(StoppingCriteria):
    """Hands each new token to its row, and tells `generate` which rows are done."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not row.is_done:
                row.push(token)
        return torch.tensor([row.is_done for row in self.rows], device=input_ids.device)


class RowSampler(LogitsProcessor):
    """Draws the next token of each row that has a temperature, by the row's own generator, and leaves only that one.

    What a row draws thus does not depend on its neighbours in the batch, beyond the last bits of its logits.
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for number, row in enumerate(self.rows):
            if row.decoding.temperature > 0 and not row.is_done:
                logits = scores[number : number + 1].float().cpu() / row.decoding.temperature
                if row.decoding.top_p < 1:
                    logits = TopPLogitsWarper(row.decoding.top_p)(input_ids[number : number + 1], logits)
                chosen = torch.multinomial(logits.softmax(-1), 1, generator=row.random)
                scores[number] = float("-inf")
                scores[number, int(chosen)] = 0.0
        return scores

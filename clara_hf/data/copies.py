"""Equal texts among a question's candidates are one candidate."""

from collections.abc import Iterable, Sequence


def distinct_docs(docs: Sequence[str], pos_index: Iterable[int] = ()) -> tuple[list[str], list[int]]:
    """The distinct texts of `docs`, each at the place of its first copy, and the gold positions among them.

    A text is gold if any of its copies is.

    >>> distinct_docs(["A", "A", "B"], [1, 2])
    (['A', 'B'], [0, 1])

    Raises:
        IndexError: a gold position beyond `docs`.
    """
    place = {text: number for number, text in enumerate(dict.fromkeys(docs))}
    return list(place), sorted({place[docs[index]] for index in pos_index})

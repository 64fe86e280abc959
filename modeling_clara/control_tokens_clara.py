"""User text: whether it is some, and what it says beside control tokens, as none of which it ever acts.

A tokenizer reads `</s>` or `<|im_end|>` wherever it stands. Text with such markup is hidden from the chat template and
tokenized by a twin of the tokenizer whose control tokens have secret names. Everything else goes the ordinary way.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Set, Sized

from tokenizers import Tokenizer


_SURROGATE = re.compile("[\ud800-\udfff]")
MARK = re.compile("\ufdd0(\\d+)\ufdd1")  # code points that are no characters stand around the number of what is hidden


def listed(texts: Iterable[str], argument: str) -> list[str]:
    """The strings of a list, tuple, NumPy array, or column of pandas or datasets, as a list.

    Raises:
        TypeError: one string, something without an order or a length, a table, or no collection at all.
    """
    is_collection = isinstance(texts, Iterable) and isinstance(texts, Sized)
    is_table = getattr(texts, "ndim", 1) != 1  # a pandas table would give the names of its columns
    if isinstance(texts, (str, bytes, Mapping, Set)) or is_table or not is_collection:
        raise TypeError(f"{argument} must be a list of strings, got {type(texts).__name__}.")
    return texts if isinstance(texts, list) else list(texts)


def check_texts(texts: Iterable[str], argument: str) -> list[str]:
    """`texts` as a list, if they are strings that hold more than white space, at least one of them.

    Raises:
        TypeError: `texts` is no list, tuple, array or column, or holds something that is no string.
        ValueError: `texts` is empty or holds an empty string, or one with half of a surrogate pair.
    """
    texts = listed(texts, argument)
    if not texts:
        raise ValueError(f"{argument} is empty: give at least one string.")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{argument}[{position}] must be a string, got {type(text).__name__}.")
        if not text.strip():
            raise ValueError(f"{argument}[{position}] is an empty string: remove it or give it a text.")
        if half := _SURROGATE.search(text):
            raise ValueError(
                f"{argument}[{position}] has {half[0]!r}, half of a surrogate pair, at character "
                f"{half.start()}: remove it, or decode the text anew from its source."
            )
    return texts


class ControlTokens:
    """The control tokens of a tokenizer: its special ones, and added ones that its chat template writes.

    Args:
        tokenizer: a tokenizer of transformers. Picklable with it.

    Example:

    ```python
    control = ControlTokens(tokenizer)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": control.hide(text)}], tokenize=False)
    (ids,) = control.encode([prompt])
    ```
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        template = str(tokenizer.chat_template or "")
        added = tokenizer.added_tokens_decoder.values()
        found = {token.content for token in added if token.special or token.content in template}
        self.names = sorted((name for name in found if name.strip()), key=len, reverse=True)
        # The marks' own ends are hidden too, so that no text can be taken for one.
        self.hidden = [*self.names, "\ufdd0", "\ufdd1"]
        self._pattern = re.compile("|".join(map(re.escape, self.hidden)))
        unknown = getattr(tokenizer, "unk_token", None)
        self._ids = set(tokenizer.convert_tokens_to_ids([name for name in self.names if name != unknown]))
        self._twin = None

    def __getstate__(self) -> dict:
        return {**vars(self), "_twin": None}

    def hide(self, text: str) -> str:
        """`text` with a mark in place of every control token; `show` and `encode` put back what was there."""
        return self._pattern.sub(lambda found: f"\ufdd0{self.hidden.index(found[0])}\ufdd1", text)

    def show(self, text: str) -> str:
        """The text that was hidden, to be read."""
        return MARK.sub(lambda found: self.hidden[int(found[1])], text)

    def encode(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Token ids of texts: control tokens act, hidden ones are split as text.

        Raises:
            ValueError: something is hidden, and the tokenizer is not one of the tokenizers library.
        """
        rows = self.tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        around = self.tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
        pairs = enumerate(zip(texts, rows, strict=True))
        marked = [at for at, (text, row) in pairs if MARK.search(text) or self._made_one(text, row, around)]
        if marked:
            twin, secret = self._twin = self._twin or self._renamed()
            written = [self._with_secrets(texts[position], secret) for position in marked]
            for position, row in zip(marked, twin.encode_batch(written, add_special_tokens), strict=True):
                rows[position] = row.ids
        return rows

    def _made_one(self, text: str, row: list[int], around: int) -> bool:
        """Whether a tokenizer's normalization made a control token of other characters: of full-width brackets, capital
        letters, or beside what it leaves out."""
        count = sum(map(self._ids.__contains__, row)) - around
        return count > 0 and count > len(self._pattern.findall(text))

    def _with_secrets(self, text: str, secret: dict[str, str]) -> str:
        either = re.compile(f"{MARK.pattern}|{self._pattern.pattern}")
        return either.sub(lambda found: self.hidden[int(found[1])] if found[1] else secret[found[0]], text)

    def _renamed(self) -> tuple[Tokenizer, dict[str, str]]:
        """A copy of the tokenizer whose control tokens nobody can write, and their names in it."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"a text holds a control token, which {type(self.tokenizer).__name__} cannot split: remove it, or set "
                "split_control_tokens=False."
            )
        nonce = secrets.token_hex(8)
        secret = {name: f"\ufdd2{nonce}.{position}\ufdd3" for position, name in enumerate(self.names)}
        values = json.loads(self.tokenizer.backend_tokenizer.to_str())
        values |= {"truncation": None, "padding": None}
        for token in values["added_tokens"]:
            token["content"] = secret.get(token["content"], token["content"])
        model = values["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {secret.get(name, name): number for name, number in model["vocab"].items()}
        else:
            model["vocab"] = [[secret.get(name, name), score] for name, score in model["vocab"]]
        if model.get("unk_token") in secret:
            model["unk_token"] = secret[model["unk_token"]]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if _merged(pair) not in secret]
        return Tokenizer.from_str(json.dumps(values)), secret


def _merged(pair: str | list[str]) -> str:
    return "".join(pair.split(" ") if isinstance(pair, str) else pair)

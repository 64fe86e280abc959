"""Text as checks and prompts see it: cleaned, in words, without what could pass for a prompt's own marks."""

import re
import unicodedata
from html import unescape


# Scripts without spaces between words: every character is a word of its own.
UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f"
WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")
# What tells apart -5 and 5, C and C++, $5 and €5, 5% and 5.
SIGN = re.compile(r"(?<!\w)[-\u2212](?=\d)|[+#%‰°<>=$€£¥]")
ARTICLES = {"a", "an", "the"}
# C0 and C1 control characters but tab and newline, bidirectional overrides, surrogates, and what is no character.
BAD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
LINE_ENDS = re.compile("\r\n?|[\u0085\u2028\u2029]")
# A chat template's marks and the prompts' own tags lose their effect when a space stands behind the bracket.
MARKS = re.compile(r"<(?=\||/?(?:passage|paraphrase|s|bos|eos|start_of_turn|end_of_turn|think)\b)|\[(?=/?INST\])", re.I)


def clean_text(text: str) -> str:
    """The text without control characters and halves of surrogate pairs; line ends are newlines."""
    return BAD.sub("", LINE_ENDS.sub("\n", text))


def clean_line(text: str) -> str:
    """The same in one line, white space collapsed."""
    return " ".join(clean_text(text).split())


def damage(text: str) -> float:
    """Share of characters that `clean_text` drops, or that stand for bytes which were no text."""
    return (len(BAD.findall(text)) + text.count("\ufffd")) / max(len(text), 1)


def prompt_text(text: str) -> str:
    """The text with a space in whatever a prompt or a chat template could take for the end of the passage or a turn."""
    return MARKS.sub(lambda found: found.group() + " ", text)


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return WORD.findall(text.casefold())


def normalized(text: str) -> str:
    """Words without articles, and signs: what two answers that say the same usually share, and -5 and 5 do not."""
    found = [*(word for word in words(text) if word not in ARTICLES), *SIGN.findall(text)]
    return " ".join(found)


def letter_share(text: str) -> float:
    """Share of letters among all characters that are not white space, HTML tags left out."""
    dense = "".join(re.sub(r"<[^<>]{1,500}>", "", unescape(text)).split())
    return sum(map(str.isalpha, dense)) / len(dense) if dense else 0.0


def script(text: str) -> str | None:
    """The script of most letters ("LATIN", "CYRILLIC", "CJK"), `None` without letters."""
    if text.isascii():
        return "LATIN" if any(map(str.isalpha, text)) else None
    counts: dict[str, int] = {}
    for letter in filter(str.isalpha, text[:400]):
        if letter.isascii():
            name = "LATIN"
        else:
            name = unicodedata.name(letter, "OTHER").split()[0]
            # Japanese mixes three scripts.
            name = "CJK" if name in ("HIRAGANA", "KATAKANA") else name
        counts[name] = counts.get(name, 0) + 1
    return max(counts, key=counts.get) if counts else None

"""Text as checks and prompts see it: cleaned, in words, without what could pass for a prompt's own marks."""

import re
import unicodedata
from html import unescape


# Scripts without spaces between words: every character is a word of its own.
UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f"
WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")
# What tells apart -5 and 5, C and C++, $5 and €5, 5% and 5.
SIGN = re.compile(r"(?<!\w)[-\u2212](?=\d)|[+#%‰°<>=$€£¥]")
# Before another word only, and no "A" in mid-sentence: vitamin A is no vitamin of another kind.
ARTICLE = re.compile(r"(?:\b(?i:an|the)|\ba|^\W*A)\s+(?=\w)")
# 1/2, 3.5 and 12:30 are one thing each; the commas of 1,000,000 say nothing.
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
NUMBER_OR_WORD = re.compile(rf"\d+(?:[/:.,]\d+)+|{WORD.pattern}")
# C0 and C1 control characters but tab and newline, bidirectional overrides, surrogates, and what is no character.
BAD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
BYTE_ORDER_MARK = "\ufeff"
LINE_ENDS = re.compile("\r\n?|[\u0085\u2028\u2029]")
# A chat template's marks and the prompts' own tags lose their effect when a space stands behind the bracket; some
# models write the bar full-width.
MARKS = re.compile(
    r"<(?=[|\uff5c]|/?(?:passage|paraphrase|s|bos|eos|unk|pad|mask|sop|eop|(?:bos|eos)_token|(?:start|end)_of_\w+|think|"
    r"thought|tools?|tool_\w+|seed:\w+)\b|<?/?SYS>)|\](?=~)|\[(?=e~\[|/?(?:INST|g?MASK|THINK|ARGS|CALL_ID|SYSTEM_PROMPT|"
    r"MODEL_SETTINGS|AVAILABLE_TOOLS|TOOL_[A-Z]+)\])",
    re.I,
)


def clean_text(text: str) -> str:
    """The text without control characters, byte order marks and halves of surrogate pairs; line ends are newlines."""
    return BAD.sub("", LINE_ENDS.sub("\n", text)).replace(BYTE_ORDER_MARK, "")


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
    plain = THOUSANDS.sub("", ARTICLE.sub("", text)).casefold()
    return " ".join([*NUMBER_OR_WORD.findall(plain), *SIGN.findall(text)])


def same_text(first: str, second: str) -> bool:
    """Whether two texts are the same but for articles, case and punctuation; texts without a word never are."""
    found = normalized(first)
    return bool(found) and found == normalized(second)


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
    return max(counts, key=counts.__getitem__) if counts else None

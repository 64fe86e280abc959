"""The nano world's byte-level BPE tokenizer: its words are tokens, its names are split at their syllables."""

import os

from lexicon import ATTRIBUTES, BEGINNINGS, ENDINGS, INTRODUCTIONS, LINKS, NAME_QUESTIONS, PRONOUNS, SUBJECTS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def corpus() -> list[str]:
    """Every phrase of the lexicon, and the pieces of names apart from each other, so that no merge joins them.

    A hyphen before a word makes it a word without a leading space, as it stands behind a line break or inside a name.
    """
    frames = [
        text for table in (SUBJECTS, INTRODUCTIONS, PRONOUNS, NAME_QUESTIONS) for row in table.values() for text in row
    ]
    frames += [f"-{text}" for row in PRONOUNS.values() for text in row]
    frames += [
        "She and He, who. which? -Q: -A: -Who -What -Which -Where -How",
        "Say it in other words. Ask and answer.",
    ]
    frames += ["What are the and the of", "-What are the"]
    phrases = []
    for kind, attributes in ATTRIBUTES.items():
        for attribute in attributes:
            frames += attribute.questions
            phrases += [text for value in attribute.wordings for text in value]
            phrases += attribute.values
        for link in LINKS[kind]:
            frames += [*link.questions, *link.wordings, link.bridge]
    frames = [text.format(S="", N="").strip() for text in frames]
    pieces = [f"{piece} -{piece}" for piece in BEGINNINGS]
    pieces += [f"-{piece}" for endings in ENDINGS.values() for piece in endings]
    return phrases * 2 + frames * 50 + pieces * 50


def make_tokenizer(vocab_size: int = 3520) -> PreTrainedTokenizerFast:
    """Trains the tokenizer; deterministic. Text between special tokens gets a leading space, which decoding removes."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Prepend(" ")
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Makes the tokenizer and writes its files to `folder`."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer

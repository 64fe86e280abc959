"""From text to tensors: documents, questions, chat prompts with memory slots, and labels."""

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Sized

import torch
from huggingface_hub import HfApi
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import logging

from .configuration_clara import HUB_ARGUMENTS, CLaRaConfig, forget_places
from .control_tokens_clara import ControlTokens, check_texts, listed


logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
AE_TOKEN, ENC_TOKEN, SEP_TOKEN = "<AE>", "<ENC>", "<SEP>"
# What ENC, beginning and end token add to the budget of a document.
ENCODER_MARKERS = 3
_FIELD = re.compile(r"\{(docs|question|answer|paraphrase)\}")


def memory_token_texts(num_memory_tokens: int, distinct: bool) -> list[str]:
    """The texts of the memory tokens as they are added to a tokenizer: one each, or a single shared one."""
    return [f"<MEM{i}>" for i in range(num_memory_tokens)] if distinct else ["<MEM>"]


def fill_template(template: str, **values: str) -> str:
    """Replace `{docs}`, `{question}`, `{answer}`, `{paraphrase}` in one pass; what is filled in is never a template."""
    return _FIELD.sub(lambda match: values.get(match.group(1), match.group(0)), template)


def left_pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Stack lists of ids to an int64 tensor `[rows, longest]`, padded on the left with `value`."""
    width = max(len(row) for row in rows)
    return torch.tensor([[value] * (width - len(row)) + row for row in rows], dtype=torch.long)


class CLaRaProcessor(ProcessorMixin):
    r"""All text-to-tensor work of a CLaRa model. Picklable, so that data-loader workers can hold it.

    Args:
        tokenizer: the decoder's tokenizer with the added tokens (see [`CLaRaProcessor.add_tokens`]).
        config ([`CLaRaConfig`]): budgets, prompts and the ids of the added tokens.
    """

    def __init__(self, tokenizer, config: CLaRaConfig):
        super().__init__(tokenizer)
        self.config = config
        vocabulary = tokenizer.convert_ids_to_tokens(config.added_token_ids)
        self.reserved_texts = [str(token) for token in vocabulary]
        repeats = 1 if config.distinct_memory_tokens else config.most_memory_tokens
        self._memory_ids = list(config.memory_token_ids) * repeats
        self._memory_texts = tokenizer.convert_ids_to_tokens(self._memory_ids)
        start = config.document_start if config.document_start is not None else tokenizer.bos_token or ""
        self._before = ENC_TOKEN + start
        self._after = tokenizer.eos_token or ""
        self._control = ControlTokens(tokenizer)

    @property
    def memory_ids(self) -> list[int]:
        """Ids of a document's memory tokens, at the compression rate in use."""
        return self._memory_ids[: self.config.num_memory_tokens]

    @property
    def slot_text(self) -> str:
        """What a document occupies in a prompt."""
        return "".join(self._memory_texts[: self.config.num_memory_tokens]) + SEP_TOKEN

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokenizer={type(self.tokenizer).__name__}, config={self.config!r})"

    @staticmethod
    def add_tokens(tokenizer, num_memory_tokens: int, distinct: bool) -> dict[str, int | list[int]]:
        """Add memory tokens and slot markers to `tokenizer` in place; returns the configuration fields of their ids."""
        memory = memory_token_texts(num_memory_tokens, distinct)
        tokens = [*memory, AE_TOKEN, ENC_TOKEN, SEP_TOKEN]
        present = [token for token in tokens if token in tokenizer.get_vocab()]
        if present:
            raise ValueError(f"the tokenizer already has the tokens {present}: give a base model without them.")
        tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *tokens]})
        ids = tokenizer.convert_tokens_to_ids(tokens)
        names = ("ae_token_id", "enc_token_id", "sep_token_id")
        return {"memory_token_ids": ids[: len(memory)], **dict(zip(names, ids[len(memory) :], strict=True))}

    # Saving and loading: the configuration is the model's, so it is not written a second time.

    def to_dict(self) -> dict:
        values = super().to_dict()
        values.pop("config", None)
        return values

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write tokenizer and processor files, and the model's `config.json` where the folder has none."""
        os.makedirs(save_directory, exist_ok=True)
        if not os.path.exists(os.path.join(save_directory, "config.json")):
            self.config.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id: str, files_timestamps: dict, **options):
        os.remove(os.path.join(working_dir, "README.md"))  # transformers' own, which says nothing
        # A model's configuration, which says how its weights are saved, is kept.
        api = HfApi(token=options.get("token"))
        if api.file_exists(repo_id, "config.json", revision=options.get("revision")):
            os.remove(os.path.join(working_dir, "config.json"))
        else:
            forget_places(working_dir)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, config: CLaRaConfig | None = None, **kwargs):
        """Load the tokenizer and, unless given, the configuration of a checkpoint folder or Hub repository.

        Raises:
            OSError: files are missing or damaged.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        if config is None:
            config = CLaRaConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        # Without the configuration, AutoTokenizer would load it itself and ask whether to trust its code.
        try:
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, config=config, **hub)
        except ImportError:
            raise
        except Exception as error:  # of many kinds, each in several lines
            reason = str(error).strip().split("\n")[0].rstrip(" .:")
            raise OSError(
                f"{pretrained_model_name_or_path} has no tokenizer that can be loaded ({reason}): its tokenizer.json "
                "or tokenizer_config.json is missing or damaged; save the processor there again."
            ) from error
        return cls(tokenizer, config)

    # Encoder side: documents and questions

    def check_user_texts(self, texts: Iterable[str], argument: str) -> list[str]:
        """[`check_texts`], and no text may contain an added token, which would be read as the token itself.

        Raises:
            ValueError: a text contains a memory token or slot marker.
        """
        texts = check_texts(texts, argument)
        for position, text in enumerate(texts):
            if any(token in text for token in self.reserved_texts):
                found = next(token for token in self.reserved_texts if token in text)
                raise ValueError(
                    f"{argument}[{position}] contains {found!r}, a token that the model reserves: remove it."
                )
        return texts

    def check_candidates(
        self, questions: Iterable[str], documents: Iterable[Iterable[str]]
    ) -> tuple[list[str], list[list[str]]]:
        """Both as lists, if every question has its own non-empty list of documents, with texts that can be encoded.

        Raises:
            TypeError: `documents` is not a list of lists, or a text is no string.
            ValueError: the lengths differ, a question has no document, or a text is empty or has a reserved token.
        """
        questions = self.check_user_texts(questions, "questions")
        documents = listed(documents, "documents")
        if any(isinstance(row, str) or not isinstance(row, Sized) for row in documents):
            raise TypeError("documents must be a list with one list of strings per question.")
        if len(documents) != len(questions):
            raise ValueError(
                f"documents has {len(documents)} lists for {len(questions)} questions: give one per question."
            )
        checked = [self.check_user_texts(row, f"documents[{position}]") for position, row in enumerate(documents)]
        return questions, checked

    def _encode(self, texts: list[str], max_length: int) -> tuple[list[list[int]], list[int]]:
        rows = self.tokenize([f"{self._before}{self._hide(text)}{self._after}" for text in texts])
        limit = max_length + ENCODER_MARKERS
        cut = [position for position, row in enumerate(rows) if len(row) > limit]
        for position in cut:
            keep_end = self.config.keep_end_token and self._after
            rows[position] = [*rows[position][: limit - 1], rows[position][-1]] if keep_end else rows[position][:limit]
        return rows, cut

    def encode_and_cut(self, documents: list[str]) -> tuple[list[list[int]], list[int]]:
        """[`encode_documents`] without a warning, and the positions of the documents that were cut."""
        return self._encode(self.check_user_texts(documents, "documents"), self.config.doc_max_length)

    def _hide(self, text: str) -> str:
        return self._control.hide(text) if self.config.split_control_tokens else text

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of prompts from [`CLaRaProcessor.prompt`]: control tokens in the user's parts are split as text."""
        return self._control.encode(texts)

    def encode_documents(self, documents: list[str]) -> list[list[int]]:
        """Token ids of each document with its markers, without memory tokens, at most `doc_max_length` + 3 long.

        Documents over the budget are cut; one warning per call says how many and how to list them.
        """
        rows, cut = self.encode_and_cut(documents)
        if cut:
            logger.warning(
                f"{len(cut)} of {len(documents)} documents are longer than doc_max_length={self.config.doc_max_length} "
                "tokens and were cut; processor.find_cut_documents(documents) lists them."
            )
        return rows

    def find_cut_documents(self, documents: list[str]) -> list[int]:
        """Positions of the documents that are longer than `doc_max_length` tokens."""
        return self.encode_and_cut(documents)[1]

    def encode_questions(self, questions: list[str]) -> list[list[int]]:
        """Token ids of each question with its markers, without memory tokens, at most `query_max_length` + 3 long.

        Questions over the budget are cut; a warning says how many and how to list them, once for each number.
        """
        questions = self.check_user_texts(questions, "questions")
        rows, cut = self._encode(questions, self.config.query_max_length)
        if cut:
            # Data loaders call this for one question at a time.
            logger.warning_once(
                f"{len(cut)} of {len(questions)} questions are longer than query_max_length="
                f"{self.config.query_max_length} tokens and were cut for retrieval; "
                "processor.find_cut_questions(questions) lists them."
            )
        return rows

    def find_cut_questions(self, questions: list[str]) -> list[int]:
        """Positions of the questions that are longer than `query_max_length` tokens."""
        return self._encode(self.check_user_texts(questions, "questions"), self.config.query_max_length)[1]

    def pad_encodings(self, rows: list[list[int]], width: int | None = None) -> BatchFeature:
        """Batch encoded documents or questions: left padding to the longest (or `width`), then the memory tokens, if
        the model reads any.

        Returns:
            `input_ids` and `attention_mask`, int64 `[rows, longest + encoder_memory_tokens]`.
        """
        longest = width or max(len(row) for row in rows)
        behind = self.memory_ids[: self.config.encoder_memory_tokens]
        padded = [[self.config.pad_token_id] * (longest - len(row)) + list(row) + behind for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * (len(row) + len(behind)) for row in rows]
        return BatchFeature({"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)})

    def encoded_lengths(self, rows: list[list[int]]) -> list[int]:
        """Tokens of encoded documents or questions with the memory tokens that `pad_encodings` puts behind them."""
        return [len(row) + self.config.encoder_memory_tokens for row in rows]

    # Decoder side: prompts and labels

    def slots(self, num_documents: int) -> str:
        """The prompt text that `num_documents` selected documents occupy: memory tokens, then `<SEP>`, for each."""
        return self.slot_text * num_documents

    def prompt(self, kind: str, docs: str, question: str = "", variant: int = 0, beside: str = "") -> str:
        """The chat prompt of a `kind` of prompt, up to where the assistant answers; for [`CLaRaProcessor.tokenize`].

        Where the texts hold control tokens, marks stand in their place, which `tokenize` reads as text.

        Args:
            kind (`str`): `answer`, `qa` or `paraphrase`.
            docs (`str`): text in place of `{docs}`: [`CLaRaProcessor.slots`], or raw documents.
            question (`str`): text in place of `{question}`.
            variant (`int`): which of several user templates, modulo their number.
            beside (`str`): raw text that follows `docs`.
        """
        messages = self._hidden_messages(kind, docs, question, variant, beside)
        return self._render(messages, add_generation_prompt=True)

    def _hidden_messages(
        self, kind: str, docs: str, question: str, variant: int, beside: str = ""
    ) -> list[dict[str, str]]:
        are_slots = not docs.replace(self.slot_text, "")
        docs = (docs if are_slots else self._hide(docs)) + self._hide(beside)
        return self.messages(kind, docs, self._hide(question), variant)

    def messages(self, kind: str, docs: str, question: str = "", variant: int = 0) -> list[dict[str, str]]:
        """The chat messages of a prompt, as `role` and `content`, with the texts as they are."""
        template = self.config.prompts[kind]
        users = [template["user"]] if isinstance(template["user"], str) else template["user"]
        user = fill_template(users[variant % len(users)], docs=docs, question=question)
        system = [{"role": "system", "content": template["system"]}] if template["system"] else []
        return [*system, {"role": "user", "content": user}]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            text = "\n\n".join(message["content"] for message in messages if message["role"] != "assistant") + "\n"
            answers = [message["content"] for message in messages if message["role"] == "assistant"]
            return text + "".join(answer + self._after for answer in answers)
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "enable_thinking": False}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception:  # templates without a system role raise, each with a sentence of its own
            pass
        if messages[0]["role"] == "system":
            system, user, *rest = messages
            messages = [{"role": "user", "content": f"{system['content']}\n{user['content']}"}, *rest]
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"the tokenizer's chat template cannot write a question and its answer ({reason}): set "
                "tokenizer.chat_template to one that can, or to None."
            ) from error

    def answer_prompt(self, question: str, num_documents: int = 0, documents: list[str] | None = None) -> str:
        """The chat prompt for a question over memory slots, the raw text of `documents`, or one behind the other."""
        self.check_user_texts([question], "questions")
        if documents:
            self.check_user_texts(documents, "documents")
        text = "\n".join(documents or [])
        if not num_documents:
            return self.prompt("answer", text, question)
        return self.prompt("answer", self.slots(num_documents), question, beside=f"\n{text}" if text else "")

    def cut(self, text: str, max_length: int) -> str:
        """The longest beginning of a text that has at most `max_length` tokens in a prompt."""

        def length(end: int) -> int:
            return len(self.tokenize([self._hide(text[:end])])[0])

        if length(len(text)) <= max_length:
            return text
        return text[: bisect_right(range(len(text)), max_length, key=length) - 1]

    def target(self, kind: str, answers: list[str], questions: list[str] | None = None) -> str:
        """The assistant's text: the answer, the paraphrase, or the list of question and answer pairs, one per entry."""
        template = self.config.prompts[kind]["assistant"]
        self.check_user_texts(answers, "answers")
        if kind == "qa":
            self.check_user_texts(questions, "questions")
            if len(questions) != len(answers):
                raise ValueError(f"{len(questions)} questions have {len(answers)} answers: give one answer for each.")
            pairs = zip(questions, answers, strict=True)
            return "\n".join(fill_template(template, question=question, answer=answer) for question, answer in pairs)
        return fill_template(template, answer=answers[0], paraphrase=answers[0])

    def training_example(
        self, kind: str, docs: str, target: str, question: str = "", variant: int = 0, max_length: int | None = None
    ) -> dict[str, list[int]]:
        """Token ids of a prompt with its target, and labels that are -100 on the prompt.

        Args:
            max_length (`int`, *optional*): tokens kept; the target is cut on the right. `None` keeps all.

        Returns:
            `input_ids` and `labels`, lists of equal length.

        Raises:
            ValueError: `max_length` leaves no token of the target, or the chat template writes the prompt otherwise
                once an answer follows it.
        """
        messages = self._hidden_messages(kind, docs, question, variant)
        prompt = self._render(messages, add_generation_prompt=True)
        answered = [*messages, {"role": "assistant", "content": self._hide(target)}]
        full = self._render(answered, add_generation_prompt=False)
        ids, prompt_ids = self.tokenize([full, prompt])
        if self.config.exact_prompt_end and ids[: len(prompt_ids)] != prompt_ids:
            if not full.startswith(prompt):
                raise ValueError(
                    f"the tokenizer's chat template writes {prompt!r} otherwise once an answer follows, so that no "
                    "label can be told from the prompt: use a chat template that keeps it."
                )
            # A token spans the end of the prompt, which generation would never see.
            ids = prompt_ids + self.tokenize([full[len(prompt) :]])[0]
        if max_length is not None:
            if len(prompt_ids) >= max_length:
                raise ValueError(
                    f"max_length={max_length} leaves no room for the target after a prompt of {len(prompt_ids)} "
                    f"tokens: raise it. The question is {question!r}."
                )
            ids = ids[:max_length]
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(prompt_ids) + ids[len(prompt_ids) :]}

    def pad_prompts(self, rows: list[list[int]], labels: list[list[int]] | None = None) -> BatchFeature:
        """Left-padded prompts: `input_ids`, `attention_mask` and, if given, `labels`, int64 `[rows, longest]`."""
        batch = {
            "input_ids": left_pad(rows, self.config.pad_token_id),
            "attention_mask": left_pad([[1] * len(row) for row in rows], 0),
        }
        if labels is not None:
            batch["labels"] = left_pad(labels, IGNORE_INDEX)
        return BatchFeature(batch)

    def encode_prompts(
        self, questions: list[str], num_documents: list[int], documents: list[list[str]] | None = None
    ) -> BatchFeature:
        """Padded answer prompts, one per question: slots for `num_documents[i]`, then raw `documents[i]`."""
        rows = zip(questions, num_documents, documents or [None] * len(questions), strict=True)
        return self.pad_prompts(self.tokenize([self.answer_prompt(*row) for row in rows]))

    def __call__(
        self,
        questions: list[str],
        documents: list[list[str]],
        answers: list[str] | None = None,
        *,
        padding: bool | str = True,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Everything that `forward` needs to answer questions over their candidate documents, compressed in the step.

        Args:
            questions (`list[str]`, B of them).
            documents (`list[list[str]]`): candidates of each question; their numbers may differ.
            answers (`list[str]`, *optional*): targets; labels are returned if given.
            padding, return_tensors: as every processor has them; here always `True` (to the longest) and `"pt"`.

        Returns:
            `document_input_ids`, `document_attention_mask` of the distinct documents, `document_index` `[B, N]` (-1
            where a question has fewer candidates, or a copy), `query_input_ids`, `query_attention_mask`, `input_ids`,
            `attention_mask` and, with answers, `labels`.

        Raises:
            TypeError, ValueError: texts that are no strings, empty, or hold reserved tokens; lists of unequal length.
        """
        if padding not in (True, "longest") or return_tensors != "pt":
            raise ValueError(
                f"a CLaRaProcessor pads to the longest and returns torch tensors, got padding={padding!r:.80} and "
                f"return_tensors={return_tensors!r:.80}: leave them out."
            )
        questions, documents = self.check_candidates(questions, documents)
        distinct, index = distinct_texts(documents)
        encoded = self.pad_encodings(self.encode_documents(distinct))
        query = self.pad_encodings(self.encode_questions(questions))
        counts = [min(self.config.top_k, len(set(row))) for row in documents]
        batch = {
            "document_input_ids": encoded["input_ids"],
            "document_attention_mask": encoded["attention_mask"],
            "document_index": index,
            "query_input_ids": query["input_ids"],
            "query_attention_mask": query["attention_mask"],
        }
        if answers is None:
            return BatchFeature({**batch, **self.encode_prompts(questions, counts)})
        answers = self.check_user_texts(answers, "answers")
        if len(answers) != len(questions):
            raise ValueError(f"answers has {len(answers)} texts for {len(questions)} questions: give one per question.")
        rows = [
            self.training_example("answer", self.slots(count), self.target("answer", [answer]), question)
            for question, count, answer in zip(questions, counts, answers, strict=True)
        ]
        prompts = self.pad_prompts([row["input_ids"] for row in rows], [row["labels"] for row in rows])
        return BatchFeature({**batch, **prompts})


def index_matrix(rows: list[list[int]]) -> torch.Tensor:
    """Stack lists of document positions to an int64 matrix `[rows, longest]`, filled up with -1 on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [-1] * (width - len(row)) for row in rows], dtype=torch.long).view(
        len(rows), width
    )


def distinct_texts(rows: list[list[str]]) -> tuple[list[str], torch.Tensor]:
    """The distinct texts of `rows`, and which of them each row holds: their [`index_matrix`], -1 for a text's copies
    in its row."""
    position = {text: row for row, text in enumerate(dict.fromkeys(text for row in rows for text in row))}
    index = []
    for row in rows:
        unseen = set(row)
        if len(unseen) < len(row):
            logger.warning_once("questions have candidates with equal texts, which count as one.")
        index.append([])
        for text in row:
            index[-1].append(position[text] if text in unseen else -1)
            unseen.discard(text)
    return list(position), index_matrix(index)


def padding_id(tokenizer) -> int:
    """The id that a tokenizer pads with, else one that never stands in a text.

    Raises:
        ValueError: there is none.
    """
    for value in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    raise ValueError("the base's tokenizer has no padding, beginning or end token: set its pad_token.")


def end_token_ids(tokenizer, generation_config) -> list[int]:
    """Ids that end an answer: those of a base's `generation_config`, and the tokenizer's."""
    declared = generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in [*declared, tokenizer.eos_token_id] if token is not None})

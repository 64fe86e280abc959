"""What clients may send: OpenAI's shapes, with the fields that a CLaRa model has a meaning for; others are refused."""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


MAX_QUESTION = 8_000  # characters
MAX_TEXT = 4_000_000
MAX_DOCUMENTS = 100
MAX_TOKENS = 1024
MAX_N_DOCS = 50

Question = Annotated[str, Field(min_length=1, max_length=MAX_QUESTION)]
DocumentText = Annotated[str, Field(min_length=1, max_length=100_000)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Request):
    type: Literal["text"]
    text: str = Field(max_length=MAX_QUESTION)


class Message(Request):
    """`content` is a text or a list of text parts; the last message is the question, earlier ones are not read."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=10 * MAX_QUESTION)] | list[TextPart]
    name: str | None = Field(None, max_length=200)
    # What a client sends back when it appends the answer's message to the conversation.
    refusal: Literal[None] = None
    annotations: list[dict[str, Any]] | None = Field(None, max_length=MAX_N_DOCS)

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class DocumentObject(Request):
    text: DocumentText
    title: str | None = Field(None, max_length=1000)


Documents = Annotated[list[DocumentText | DocumentObject], Field(min_length=1, max_length=MAX_DOCUMENTS)]


def texts_of(documents: list[str | DocumentObject]) -> list[str]:
    return [text if isinstance(text, str) else "\n".join(filter(None, (text.title, text.text))) for text in documents]


class StreamOptions(Request):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampling(Request):
    """Options of an answer; `n_docs` is the number of documents in the prompt."""

    model: str = Field(max_length=500)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**62), le=2**62)
    n: int | None = Field(None, ge=1, le=8)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    documents: Documents | None = None
    n_docs: int | None = Field(None, ge=1, le=MAX_N_DOCS)
    query_words: int = Field(0, ge=0, le=50)
    # Fields that clients send at their neutral values.
    user: str | None = Field(None, max_length=1000)
    metadata: dict[str, str] | None = Field(None, max_length=16)
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true only")
        return self


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=200)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: Literal[False] | None = None

    @property
    def question(self) -> str:
        return self.messages[-1].text

    @property
    def unread(self) -> str | None:
        """What of the conversation the answer does not depend on, in a sentence."""
        roles = Counter("system" if one.role == "developer" else one.role for one in self.messages[:-1])
        counts = ", ".join(f"{count} {role}" for role, count in sorted(roles.items()))
        return f"messages not read: {counts}; the model answers the last one by its own prompt" if counts else None

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> "ChatRequest":
        if self.messages[-1].role != "user":
            raise ValueError("the last of messages must have the role 'user': it is the question")
        if len(self.question) > MAX_QUESTION:
            raise ValueError(f"the question has {len(self.question)} characters, more than {MAX_QUESTION}: shorten it")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self


class CompletionRequest(Sampling):
    """`prompt` is the question, or several."""

    prompt: Question | Annotated[list[Question], Field(min_length=1, max_length=16)]
    echo: Literal[False] | None = None


class EmbeddingRequest(Request):
    """`input_type` says which adapter reads: the compressor ("document") or the query reasoner ("query").

    `vector` is the flattened memory, or its sketch in the collection's principal dimensions.
    """

    model: str = Field(max_length=500)
    input: DocumentText | Annotated[list[DocumentText], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    input_type: Literal["document", "query"] = "document"
    vector: Literal["memory", "sketch"] = "memory"
    user: str | None = Field(None, max_length=1000)


class RerankRequest(Request):
    """As Cohere and Jina have it."""

    model: str = Field(max_length=500)
    query: Question
    documents: Documents
    top_n: int | None = Field(None, ge=1, le=MAX_DOCUMENTS)
    return_documents: bool = False


class RankingOptions(Request):
    ranker: Literal["auto", "none"] | None = None
    score_threshold: float | None = Field(None, ge=-1, le=1)


class SearchRequest(Request):
    query: Question | Annotated[list[Question], Field(min_length=1, max_length=16)]
    max_num_results: int = Field(10, ge=1, le=MAX_N_DOCS)
    ranking_options: RankingOptions | None = None
    rewrite_query: Literal[False] | None = None


class FileRequest(Request):
    """A file with its `text`, or its bytes in base64 as `data`, which are read by the ending of `filename`.

    `file_id` is the id that it gets; a new one without it.
    """

    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)] | None = None
    data: Annotated[str, Field(min_length=1, max_length=2 * MAX_TEXT)] | None = None
    filename: str | None = Field(None, min_length=1, max_length=500)
    file_id: str | None = Field(None, min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._-]+$")
    attributes: dict[str, str | float | bool] | None = Field(None, max_length=16)

    @model_validator(mode="after")
    def _has_one_content(self) -> "FileRequest":
        if (self.text is None) == (self.data is None):
            raise ValueError("give either text or data (base64), not both and not neither")
        return self


class FeedbackRequest(Request):
    """A thumb for an answer; `correction` is the right answer where the thumb is down."""

    question: Question
    answer: str = Field(max_length=MAX_QUESTION)
    rating: Literal["up", "down"]
    correction: Question | None = None


class Fault(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Whatever is wrong, in OpenAI's shape."""

    error: Fault


def usage(prompt: int, completion: int | None = None) -> dict[str, Any]:
    """OpenAI's usage block: prompt tokens once, completion tokens of all choices."""
    counts = {"prompt_tokens": prompt, "total_tokens": prompt + (completion or 0)}
    return counts if completion is None else {**counts, "completion_tokens": completion}

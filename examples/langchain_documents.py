"""LangChain over a CLaRa service: its chat model as it is, and its collection as a retriever.

    clara serve --model recipes/nano/pretrained/joint --store notes.clara
    python examples/langchain_documents.py --url http://127.0.0.1:8000 "Who keeps bees?"

Needs `pip install langchain-openai openai`. The chat model answers from the collection by itself; the retriever gives
the passages to any other chain.
"""

import argparse

import openai
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_openai import ChatOpenAI


class CLaRaRetriever(BaseRetriever):
    """Passages of a service's collection; their metadata hold file, place and score."""

    url: str
    collection: str = "documents"
    api_key: str = "none"
    top_k: int = 5

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key)
        found = client.vector_stores.search(self.collection, query=query, max_num_results=self.top_k)
        return [
            Document(
                page_content=hit.content[0].text,
                metadata={"source": hit.filename, "score": hit.score, **(hit.attributes or {})},
            )
            for hit in found.data
        ]


def chat_model(url: str, api_key: str = "none") -> ChatOpenAI:
    """The service's own model, which retrieves before it answers."""
    name = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key).models.list().data[0].id
    return ChatOpenAI(model=name, base_url=f"{url}/v1", api_key=api_key, temperature=0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    options = parser.parse_args(arguments)
    for piece in chat_model(options.url, options.api_key).stream(options.question):
        print(piece.content, end="", flush=True)
    print()
    for document in CLaRaRetriever(url=options.url, api_key=options.api_key).invoke(options.question):
        print(f"{document.metadata['score']:.3f}  {document.metadata['source']}: {document.page_content[:80]}")


if __name__ == "__main__":
    main()

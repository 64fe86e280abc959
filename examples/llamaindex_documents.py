"""LlamaIndex over a CLaRa service: its model as an LLM, and its collection as a retriever.

    clara serve --model recipes/nano/pretrained/joint --store notes.clara
    python examples/llamaindex_documents.py --url http://127.0.0.1:8000 "Who keeps bees?"

Needs `pip install llama-index-core llama-index-llms-openai-like openai`. The LLM answers from the collection by itself,
so it is asked directly: a query engine would put the passages' text into the question once more.
"""

import argparse

import openai
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.llms.openai_like import OpenAILike


class CLaRaRetriever(BaseRetriever):
    """Passages of a service's collection as scored nodes."""

    def __init__(self, url: str, collection: str = "documents", api_key: str = "none", top_k: int = 5):
        super().__init__()
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key)
        self._collection, self._top_k = collection, top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._client.vector_stores.search(
            self._collection, query=query_bundle.query_str, max_num_results=self._top_k
        )
        return [
            NodeWithScore(
                node=TextNode(text=hit.content[0].text, metadata={"source": hit.filename, **(hit.attributes or {})}),
                score=hit.score,
            )
            for hit in found.data
        ]


def language_model(url: str, api_key: str = "none") -> OpenAILike:
    """The service's own model, which retrieves before it answers."""
    name = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key).models.list().data[0].id
    return OpenAILike(model=name, api_base=f"{url}/v1", api_key=api_key, is_chat_model=True, temperature=0.0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    options = parser.parse_args(arguments)
    model = language_model(options.url, options.api_key)
    print(model.chat([ChatMessage(role="user", content=options.question)]).message.content)
    for hit in CLaRaRetriever(options.url, api_key=options.api_key).retrieve(options.question):
        print(f"{hit.score:.3f}  {hit.node.metadata['source']}: {hit.node.text[:80]}")


if __name__ == "__main__":
    main()

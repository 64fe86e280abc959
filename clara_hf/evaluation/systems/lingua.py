"""Prompt compression by token classification: LLMLingua-2 (arXiv 2403.12968), by the package `llmlingua`."""

import torch
from llmlingua import PromptCompressor


class LLMLingua2:
    """Shortens documents by leaving out the words that a token classifier thinks least of.

    The package tells words apart only for classifiers whose name holds `xlm-roberta-large` or
    `bert-base-multilingual-cased`, and counts tokens by a vocabulary that tiktoken fetches once.

    Args:
        name: a local folder, or a name on the Hub.
        rate: the compression rate aimed at: 4 leaves about a quarter of the tokens.
        device: where it runs.
    """

    def __init__(self, name: str, rate: float, device: torch.device):
        self.compressor = PromptCompressor(
            name,
            device_map=str(device),
            model_config={"trust_remote_code": False},
            use_llmlingua2=True,
        )
        self.rate = rate

    def __call__(self, documents: list[str]) -> list[str]:
        """The documents, each shortened; one of which nothing is left stays as it was."""
        shortened = [
            self.compressor.compress_prompt_llmlingua2([document], rate=1 / self.rate)["compressed_prompt"]
            for document in documents
        ]
        return [short if short.strip() else document for short, document in zip(shortened, documents, strict=True)]

"""Which compressor made the memories of a store, and the keys of its documents."""

import hashlib
from dataclasses import dataclass, replace

from torch.distributed.tensor import DTensor


KEY_LENGTH = 32


@dataclass(frozen=True)
class Maker:
    """Which compressor made the memories of a store."""

    fingerprint: str
    num_memory_tokens: int
    hidden_size: int
    doc_max_length: int
    base: str | None

    @classmethod
    def of(cls, model) -> "Maker":
        config = model.config
        return cls(
            fingerprint=model.compressor_fingerprint(),
            num_memory_tokens=config.num_memory_tokens,
            hidden_size=config.hidden_size,
            doc_max_length=config.doc_max_length,
            base=config.base_model_name_or_path,
        )

    def __str__(self) -> str:
        return (
            f"compressor {self.fingerprint[:16]} on base {self.base} ({self.num_memory_tokens} memory tokens of width "
            f"{self.hidden_size}, documents of at most {self.doc_max_length} tokens)"
        )

    @property
    def width(self) -> int:
        """Values in one memory."""
        return self.num_memory_tokens * self.hidden_size

    def makes_the_same_as(self, other: "Maker") -> bool:
        """Whether both give equal memories; the base's name may differ, since the fingerprint covers the base."""
        return replace(self, base=None) == replace(other, base=None)


def key_of(fingerprint: str, text: str) -> str:
    return hashlib.sha256(f"{fingerprint}\0{text}".encode()).hexdigest()[:KEY_LENGTH]


def state_of(model) -> tuple:
    """What changes with a model's weights and geometry, at the cost of a look at its adapters.

    Versions count changes in place; changes beside them are seen in the sums of what is trained.
    """
    config = model.config
    geometry = config.num_memory_tokens, config.hidden_size, config.doc_max_length
    parameters = list(model.named_parameters())
    versions = hash(tuple((name, value.data_ptr(), value._version) for name, value in parameters))
    small = [
        value.detach()
        for name, value in parameters
        if (".lora_" in name or name.startswith("memory_")) and not isinstance(value, DTensor) and not value.is_meta
    ]
    return (*geometry, versions, float(sum(value.double().sum().cpu() for value in small)))

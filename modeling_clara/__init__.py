"""CLaRa: compress documents once into memory vectors, retrieve among them, and answer from them."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_clara import CLaRaConfig
from .functional_clara import straight_through_topk
from .generation_clara import CLaRaGenerationOutput, CLaRaRetrievalOutput
from .modeling_clara import CLaRaForRetrievalGeneration, CLaRaOutput
from .processing_clara import CLaRaProcessor


AutoConfig.register("clara", CLaRaConfig, exist_ok=True)
AutoModel.register(CLaRaConfig, CLaRaForRetrievalGeneration, exist_ok=True)
AutoProcessor.register(CLaRaConfig, CLaRaProcessor, exist_ok=True)
CLaRaConfig.register_for_auto_class()
CLaRaForRetrievalGeneration.register_for_auto_class("AutoModel")
CLaRaProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "CLaRaConfig",
    "CLaRaForRetrievalGeneration",
    "CLaRaGenerationOutput",
    "CLaRaOutput",
    "CLaRaProcessor",
    "CLaRaRetrievalOutput",
    "straight_through_topk",
]

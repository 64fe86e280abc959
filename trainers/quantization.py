"""The name that `quantize_base` had; it lives in `modeling_clara.quantization_clara`."""

from modeling_clara.quantization_clara import quantize_base  # noqa: F401

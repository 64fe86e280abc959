"""The Lance dataset behind a memory store: its rows, its layout, and what changes them."""

try:
    import lance  # noqa: F401
except ImportError as error:
    raise ImportError('the memory store needs Lance: pip install "clara-hf[index]"') from error

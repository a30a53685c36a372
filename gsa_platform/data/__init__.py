"""Text data: sources, tokenizers, the token store, packing into sequences, and the data module."""

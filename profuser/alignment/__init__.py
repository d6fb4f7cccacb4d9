"""Distributions of one tokenizer's tokens onto another's, on bytes; `align.py` holds the public `align`."""

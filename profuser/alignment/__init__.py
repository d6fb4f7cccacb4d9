"""Distributions of one tokenizer's tokens onto another's, on bytes; `text.py` holds the public `align`."""

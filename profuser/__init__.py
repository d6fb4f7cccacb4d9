"""profuser: fuse several language models into one (ProFuser, arXiv 2408.04998)."""

"""Writes into Markdown pages of results. Comments in such a page name the sections that the experiments fill in."""

from __future__ import annotations

from pathlib import Path

from profuser.errors import DataError
from profuser.store.files import write_atomic


def write_section(page: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        DataError: the page is missing, or does not hold these comments once each, in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise DataError(
            f"--write must name a page with `{begin}` and then `{end}` in it once each, got {page}; add them"
        )
    before, rest = content.split(begin)
    write_atomic(page, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}".encode())

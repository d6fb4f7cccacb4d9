"""The ids of tokens in a model's configuration files: with which a text begins, a turn ends and a batch is filled up.

transformers warns of wrong ones and hands them on, so that a fused or merged model would have them as well, and might never end its
turn. A judge may have them, because it writes nothing, and its padding is chosen by those who ask it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedConfig

from profuser.errors import DataError
from profuser.text.token_bytes import MAX_ID
from profuser.typed import Rule, checked, parsed

FILES = ("config.json", "generation_config.json")


def configuration_file(location: str, name: str, revision: str | None = None) -> Path | None:
    """Returns a file of a local model, or of one of the Hub that is downloaded; None if it has no such file."""
    if Path(location).is_dir():
        file: Any = Path(location) / name
    else:
        file = try_to_load_from_cache(location, name, revision=revision or "main")
    return Path(file) if isinstance(file, (str, Path)) and Path(file).exists() else None


def check_token_ids(name: str, location: str, config: PreTrainedConfig, revision: str | None = None) -> None:
    """Raises DataError for an id in a model's files that is none, or for which its embedding has no row."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    shape = _shape(rows if isinstance(rows, int) else MAX_ID)
    for file in (configuration_file(location, file, revision) for file in FILES):
        try:
            content = None if file is None else parsed(file.read_bytes())
        except (OSError, ValueError):  # whatever else is wrong with the file is said by those who read it
            continue
        if not isinstance(content, dict):
            continue
        for part in (content, content.get("text_config")):
            try:
                checked(part if isinstance(part, dict) else {}, shape)
            except ValueError as error:
                raise DataError(
                    f"{name}: {file} must hold {error}; set it to the id of a token, or to null, or copy or download it again"
                ) from None


def _shape(rows: int) -> dict[str, Any]:
    one = Rule(f"the id of a token (below {rows:,})", lambda value: type(value) is int and 0 <= value < rows)
    return {"eos_token_id?": (None, one, [one]), "bos_token_id?": (None, one), "pad_token_id?": (None, one)}

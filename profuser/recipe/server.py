"""An OpenAI-compatible server, as a recipe names one for a source or a judge."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from profuser.errors import ConfigError
from profuser.recipe.checks import check_not_negative, check_positive


@dataclass(kw_only=True)
class ServerConfig:
    """An OpenAI-compatible server, such as one of vLLM, SGLang, Ollama or OpenAI. Where nothing but the URL is to be said, it stands
    alone: `server: http://localhost:8000/v1`.
    """

    url: str
    """Its address with all that stands before /chat/completions, such as http://localhost:8000/v1."""
    model: str | None = None
    """What the server calls the model. null takes the only one that it lists."""
    key_variable: str | None = None
    """The environment variable that holds the server's key. The key itself never stands in a recipe; null sends none."""
    concurrency: int = 16
    """How many requests are sent at a time."""
    timeout: float = 600.0
    """How many seconds a reply may take."""
    retries: int = 6
    """How often a request is sent again, after 1, 2, 4 and more seconds, where the server fails, is too busy or cannot be reached."""

    def check(self, place: str) -> None:
        """Raises ConfigError for an address, a variable or a number that cannot be used. `place` is the server's in the recipe."""
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:  # such as a port that is no number
            parts, host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise ConfigError(f"{place}.url must be as http://localhost:8000/v1, got {self.url!r}; correct it")
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                f"{place}.url must hold no user and no password, because recipes are kept in runs; take them out, and name an "
                "environment variable as key_variable"
            )
        if self.key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise ConfigError(
                f"{place}.key_variable must be the name of an environment variable, got something else; put the key into a variable, "
                "and name it here"
            )
        check_positive(place, self, "concurrency", "timeout")
        check_not_negative(place, self, "retries")

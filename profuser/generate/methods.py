"""Opens the way of decoding that a recipe names."""

from __future__ import annotations

from profuser.generate.cool_fusion import CoolFusion
from profuser.generate.decoder import Decoder
from profuser.generate.eva import Eva
from profuser.generate.gated import Gated
from profuser.generate.mixture import Mixture
from profuser.generate.voices import load_voices
from profuser.recipe.schema import Recipe

METHODS: dict[str, type[Decoder]] = {"cool": CoolFusion, "gated": Gated, "eva": Eva, "mixture": Mixture}


def open_decoder(recipe: Recipe) -> Decoder:
    """Loads the recipe's sources, and returns what lets them answer together.

    Raises:
        ConfigError: `decode` does not suit the sources.
        DataError: a source cannot be loaded, or the method cannot join these sources.
    """
    return METHODS[recipe.decode.method](load_voices(recipe), recipe.decode, recipe.generation.max_new_tokens)

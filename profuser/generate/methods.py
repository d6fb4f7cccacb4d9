"""The methods with which the sources of a recipe answer together, by the names that `decode.method` has for them."""

from __future__ import annotations

from profuser.generate.cool_fusion import CoolFusion
from profuser.generate.gated import Gated
from profuser.generate.voices import load_voices
from profuser.recipe.schema import Recipe

METHODS: dict[str, type[CoolFusion]] = {"cool": CoolFusion, "gated": Gated}


def load_joint(recipe: Recipe) -> CoolFusion:
    """Loads the sources of a recipe, and lets them answer together as its `decode` says.

    Raises:
        ConfigError: the options of decoding do not fit the sources.
        DataError: a source cannot be loaded.
    """
    return METHODS[recipe.decode.method](load_voices(recipe), recipe.decode, recipe.generation.max_new_tokens)

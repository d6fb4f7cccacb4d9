"""Makes Triton's interpreter do once what it does again for every call, operation and tensor.

Most of the time that our kernels take in it is no arithmetic. Whenever one jitted function calls another, it goes through all names of
triton.language, although the launch around it has replaced them already. Every operation makes several tensors, each of them
with a tuple of constants for its shape. Nothing else is replaced, and what is computed is computed as before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest


def make_lean(patch: pytest.MonkeyPatch) -> None:
    """Replaces what is slow in the interpreter, until `patch` is undone."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version, which works in another way
        return
    patch.setattr(interpreter, "_patch_lang", _once_a_launch(interpreter._patch_lang))
    patch.setattr(interpreter, "_get_np_dtype", _looked_up(interpreter._get_np_dtype))
    types_of_blocks = _remembering(tl.block_type.__init__, lambda element, shape: (element.name, *shape), ())
    patch.setattr(tl.block_type, "__init__", types_of_blocks)
    tensors = _remembering(tl.tensor.__init__, lambda handle, type: type.name, ("handle", "type"))
    patch.setattr(tl.tensor, "__init__", tensors)


def _once_a_launch(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """What `prepare` does, which replaces the names of triton.language that a function sees, unless they are replaced already."""
    import triton.language as tl
    from triton.runtime import interpreter

    prepared: set[str] = set()

    @cache
    def seen_from(fn):
        modules = {"tl": tl, "core": tl.core}
        return {name for name, module in modules.items() if any(value is module for value in fn.__globals__.values())}

    def prepare_once(fn):
        seen = seen_from(fn)
        new = seen - prepared
        if seen and not new:
            return interpreter._LangPatchScope()
        scope = prepare(fn)
        prepared.update(new)
        restore = scope.restore

        def restore_and_forget():  # a launch calls it when it ends
            restore()
            prepared.difference_update(new)

        scope.restore = restore_and_forget
        return scope

    return prepare_once


def _looked_up(find: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """NumPy's type for a type of Triton, which `find` makes a table for. The type of a block cannot be hashed; its name says all of it."""
    found: dict[str, np.dtype] = {}

    def numpy_type(dtype):
        if dtype.name not in found:
            found[dtype.name] = find(dtype)
        return found[dtype.name]

    return numpy_type


def _remembering(init: Callable[..., None], key_of: Callable[..., Any], own: tuple[str, ...]) -> Callable[..., None]:
    """An __init__ that computes attributes once for all objects of the same key.

    `own` has the names of the first arguments, which are attributes that each object keeps for itself.
    """
    attributes: dict[Any, dict[str, Any]] = {}

    def init_once(self, *arguments):
        key = key_of(*arguments)
        if key not in attributes:
            init(self, *arguments)
            attributes[key] = {name: value for name, value in vars(self).items() if name not in own}
        vars(self).update(attributes[key], **dict(zip(own, arguments)))

    return init_once

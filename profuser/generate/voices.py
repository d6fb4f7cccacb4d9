"""Loads the sources of a recipe for decoding, spread over the devices that there are."""

from __future__ import annotations

import torch

from profuser.generate.speaker import Voice
from profuser.models.head import head_of
from profuser.models.load import chat_format, check_vocabulary, load_model, open_model, runtime_dtype
from profuser.prepare.inputs import settled_date
from profuser.recipe.schema import Recipe
from profuser.text.chat import ChatFormat


def chats_of(recipe: Recipe) -> list[ChatFormat]:
    """Opens every source, and returns their chat formats with the recipe's date, or today's where it has none.

    Raises:
        DataError: a source cannot be opened, or has no usable chat template.
    """
    date = settled_date(recipe.date, None)
    chats = []
    for source in recipe.sources:
        open_model(source)
        chats.append(chat_format(source, date=date))
    return chats


def load_voices(recipe: Recipe) -> list[Voice]:
    """Opens every source, and then loads each onto a device of its own as far as there are devices.

    Raises:
        DataError: a source cannot be loaded.
    """
    chats = chats_of(recipe)
    count = torch.cuda.device_count()
    voices = []
    for n, (source, chat) in enumerate(zip(recipe.sources, chats, strict=True)):
        device = torch.device(f"cuda:{n % count}" if count else "cpu")
        model = load_model(source, runtime_dtype(recipe.capture.dtype, device), device)
        head = head_of(model)
        check_vocabulary(source.name, chat, len(head.weight))
        voices.append(Voice(source.name, chat, model, head))
    return voices

"""Shows one training example as every model of a recipe sees it through its own chat template."""

from __future__ import annotations

import json
from typing import Any

from profuser.doctor.template_rows import MASK_LEGEND, conversation_rows, describe
from profuser.errors import ConfigError
from profuser.models.load import chat_format
from profuser.prepare.inputs import load_split, settled_date
from profuser.recipe.parse import Run
from profuser.text.display import terminal_width, use_color
from profuser.text.fit import Verdict, fit
from profuser.text.token_bytes import TokenBytesMismatch


def show_templates(run: Run, example: int, as_json: bool) -> None:
    """Prints one training example as every model of a recipe sees it through its own chat template.

    Args:
        example: its number, from 0. as_json: whether one JSON object is printed instead of text.
    Raises:
        ConfigError: there is no example of this number.
    """
    # The example, and the models' chat formats.
    recipe = run.recipe
    rows = load_split(recipe, "train")
    if not 0 <= example < len(rows):
        raise ConfigError(
            f"--example must be in 0..{len(rows) - 1} ({recipe.data.location('train')}), got {example}; give another"
        )
    row = rows[example]
    target = recipe.target_config
    models = {model.name: model for model in [*recipe.sources, target]}
    date = settled_date(recipe.date, run.store_dir)
    chats = {name: chat_format(config, date=date) for name, config in models.items()}
    sources = [chats[source.name] for source in recipe.sources]

    # The response is cut as it is in training. Where it cannot be used at all, the reason is shown instead.
    data = recipe.data
    cuts = data.too_long == "cut"
    fitted = fit(chats[target.name], sources, row["prompt"], row["response"], data.max_length, cuts=cuts)
    used = fitted.verdict == Verdict.OK
    described: dict[str, Any] = {}
    if not as_json:
        at = f", cut to data.max_length {recipe.data.max_length}" if fitted.cut else ""
        print(f"example {example} of {recipe.data.location('train')}{at}; {MASK_LEGEND}\n")

    # One model after the other. A single tokenizer may not be able to hold the response.
    for name, chat in chats.items():
        shown = [f"not used: {fitted.verdict.label}"]
        try:
            if used and as_json:
                described[name] = describe(chat, row["prompt"], fitted.text, complete=not fitted.cut)
                continue
            if used:
                shown = conversation_rows(
                    chat,
                    row["prompt"],
                    fitted.text,
                    complete=not fitted.cut,
                    color=use_color(),
                    width=terminal_width(),
                )
        except TokenBytesMismatch as error:
            shown = [f"not used: {error}"]
        described[name] = {"skipped": shown[0]}
        if not as_json:
            print("\n".join([f"{name}  {models[name].model}", "", *shown, ""]))
    if as_json:
        print(json.dumps({"example": example, "models": described}))

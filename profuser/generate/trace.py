"""A page that shows which source wrote each segment of the answers, with what every source thought of every candidate."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from profuser.generate.steps import Answer, Candidate
from profuser.text.conversation import Prompt

COLORS = ("#cfe3f7", "#f9dcc4", "#d5ecd0", "#ecd6f2", "#f7eebb", "#d0ece9", "#f7d0d7", "#dfe0ee")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Who wrote what</title><style>
body {{ font: 16px/1.7 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }}
h2 {{ font-size: 1rem; margin: 2rem 0 .5rem; white-space: pre-wrap }}
span.segment {{ border-radius: .25rem; padding: .1rem 0; white-space: pre-wrap; cursor: help }}
span.contested {{ text-decoration: underline dotted #555 }}
.key span {{ border-radius: .25rem; padding: .1rem .5rem; margin-right: .5rem }}
@media (prefers-color-scheme: dark) {{ body {{ color: #eee; background: #1b1b1f }} span.segment, .key span {{ color: #222 }} }}
</style></head><body>
<h1>Who wrote what</h1>
<p class="key">{key}</p>
<p>Each segment has the colour of the source that wrote it. Where sources wanted to write different segments, it is underlined;
point at it to see the candidates with the perplexities that the sources gave them.</p>
{answers}
</body></html>
"""


def page(sources: Sequence[str], answers: Iterable[tuple[Prompt, Answer]]) -> str:
    """The page as HTML.

    Args:
        answers: the prompts with their answers.
    """
    color = [COLORS[n % len(COLORS)] for n in range(len(sources))]
    key = "".join(f'<span style="background:{c}">{html.escape(name)}</span>' for name, c in zip(sources, color))
    shown = []
    for prompt, answer in answers:
        segments = []
        for step in answer.steps:
            lines = "\n".join(_line(candidate, sources) for candidate in step.candidates)
            contested = " contested" if len(step.candidates) > 1 else ""
            text = html.escape(step.winner.text) or "∎"
            segments.append(
                f'<span class="segment{contested}" style="background:{color[step.winner.sources[0]]}" '
                f'title="{html.escape(lines, quote=True)}">{text}</span>'
            )
        whole = f"<p>Taken instead: the whole answer of {html.escape(answer.source)}.</p>" if answer.source else ""
        shown.append(f"<h2>{html.escape(str(prompt))}</h2>\n<p>{''.join(segments)}</p>{whole}")
    return PAGE.format(key=key, answers="\n".join(shown))


def _line(candidate: Candidate, sources: Sequence[str]) -> str:
    names = ", ".join(sources[n] for n in candidate.sources)
    judged = ", ".join(f"{name} {ppl:.3g}" for name, ppl in zip(sources, candidate.perplexities) if ppl == ppl)
    judged = judged or "nobody else was asked"
    return f"{candidate.text.strip() or 'end'} ({names}): {judged}"

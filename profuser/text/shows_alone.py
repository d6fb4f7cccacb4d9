"""Whether a chat template does nothing with a message's text but show it, which its code tells.

Of such a template one rendering with a sentinel tells what it makes of every text. Another may look into a text, or may escape, cut or
replace a part of it. What such a template makes of a text is known only once it is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from jinja2 import Environment, TemplateSyntaxError, nodes

STRIPS = {"strip", "lstrip", "rstrip"}
TESTS = {"string", "defined", "undefined", "none", "mapping", "iterable", "sequence"}
"""Tests that ask what a content is, and not what it says."""
FILTERS = {"trim", "length", "count", "first", "last", "list"}
"""Filters that show messages no otherwise than their texts."""
PASSES = 20
"""So often at most is a text followed from one variable to the next. The templates in use take three passes."""
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""The tags by which a template marks what the assistant says. Only transformers knows them."""


def shows_texts_alone(template: str) -> bool:
    """Whether it is certain that a template shows the texts of messages as they are, but for the whitespace around them."""
    try:
        body = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", template))
        return not _Reading(body).looks_in(body)
    except (TemplateSyntaxError, RecursionError):
        return False


class _Reading:
    """What is known of a template's code: the variables that may hold the text of a message, or one made of it."""

    def __init__(self, body: nodes.Template):
        self._names: set[str] = set()
        assigned = [*_assigned(body)]
        for _ in range(PASSES):
            found = {name for name, value in assigned if self._holds(value)}
            self._are_all = found <= self._names
            if self._are_all:
                break
            self._names |= found

    def looks_in(self, node: nodes.Node) -> bool:
        """Whether code may do more with a text than join, strip, keep and show it."""
        if not self._are_all or isinstance(node, (nodes.FilterBlock, nodes.AssignBlock, nodes.Macro, nodes.CallBlock)):
            return True
        if isinstance(node, nodes.Filter) and node.name not in FILTERS:
            return True
        harmless = [*_shown_by(node)]
        if isinstance(node, (nodes.Assign, nodes.For)):
            harmless.append(node.target)
        elif isinstance(node, nodes.Test) and node.name in TESTS:
            harmless.append(node.node)
        known = set(map(id, harmless))  # equal nodes may stand in several places
        return any(
            (isinstance(child, nodes.Expr) and id(child) not in known and self._holds(child)) or self.looks_in(child)
            for child in node.iter_child_nodes()
        )

    def _holds(self, node: nodes.Node) -> bool:
        """Whether an expression may be a text, or be made of one by joining and stripping alone."""
        if _name_of(node) in self._names:
            return True
        if isinstance(node, nodes.Getattr) and node.attr == "content":
            return True
        if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice):
            return not isinstance(node.arg, (nodes.Const, nodes.Neg)) or getattr(node.arg, "value", 0) == "content"
        if isinstance(node, nodes.Call) and getattr(node.node, "attr", None) in ("get", "items", "values"):
            return True
        return any(map(self._holds, _shown_by(node)))


def _shown_by(node: nodes.Node) -> Iterator[nodes.Node]:
    """What an expression or a statement shows or keeps as it is, but for the whitespace around it."""
    if isinstance(node, (nodes.Concat, nodes.Output)):
        yield from node.nodes
    elif isinstance(node, nodes.Add):
        yield from (node.left, node.right)
    elif isinstance(node, nodes.CondExpr):
        yield from filter(None, (node.expr1, node.expr2))
    elif isinstance(node, nodes.Assign):
        yield from [node.node] if _name_of(node.target) is not None else []
    elif isinstance(node, (nodes.Filter, nodes.Call)) and node.node is not None and not (node.args or node.kwargs):
        if getattr(node, "name", None) == "trim" or getattr(node.node, "attr", None) in STRIPS:
            yield node.node
    elif isinstance(node, nodes.Getattr) and node.attr in STRIPS:
        yield node.node


def _assigned(body: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    """The names that are set in a template, each with its value."""
    for assign in body.find_all(nodes.Assign):
        if (name := _name_of(assign.target)) is not None:
            yield name, assign.node
    for loop in body.find_all(nodes.For):
        if isinstance(loop.target, nodes.Name):
            yield loop.target.name, loop.iter


def _name_of(node: nodes.Node) -> str | None:
    """The name of a variable, or of a variable in a namespace."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return f"{node.node.name}.{node.attr}"
    if isinstance(node, nodes.Getitem) and isinstance(node.node, nodes.Name) and isinstance(node.arg, nodes.Const):
        return f"{node.node.name}.{node.arg.value}"
    return None

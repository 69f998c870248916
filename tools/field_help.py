"""For the API pages: docstrings of dataclass fields, which stand elsewhere in this code. An extension of griffe.

`x: float = dataclasses.field(default=1.0, metadata={"help": "what x is"})` reads as `x: float = 1.0`, "what x is", and
`x: Tensor  # (N, D) what x is` as `x: Tensor`, "(N, D) what x is".
"""

from __future__ import annotations

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension


class FieldHelp(Extension):
    def on_attribute_instance(self, *, node: Any, attr: Attribute, **kwargs: Any) -> None:
        if not isinstance(node, ast.AnnAssign) or attr.docstring is not None:
            return
        text = attr.lines[-1].partition("  # ")[2] if attr.parent is not None and attr.parent.is_class else ""
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "dataclasses.field":
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            if "default" in given:
                attr.value = ast.unparse(given["default"])
            text = constant(given.get("metadata"), "help") or text
        if text:
            attr.docstring = Docstring(text[0].upper() + text[1:], parent=attr)


def constant(mapping: ast.expr | None, wanted: str) -> str:
    """The string under a key of a dict display; "" where there is none."""
    if isinstance(mapping, ast.Dict):
        for key, value in zip(mapping.keys, mapping.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == wanted and isinstance(value, ast.Constant):
                return str(value.value)
    return ""

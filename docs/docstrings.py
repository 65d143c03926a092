"""Shows our docstrings as they are meant: `Example:` is code, `Cost: ...` and the like are paragraphs.

mkdocstrings knows the section of examples in the plural only, and takes a line that begins with a word and a colon for a heading.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

PARAGRAPHS = "Accuracy|Cost|Parameters|Shapes|Source"


class OwnSections(griffe.Extension):
    """Loaded by mkdocs.yml; changes docstrings while the pages are built, and nothing in the source."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(rf"^({PARAGRAPHS}): (?=\S)", r"**\1.** ", text, flags=re.MULTILINE)

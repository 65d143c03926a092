"""Errors of estimators, in the words of the command: names that can be typed, and no option that it does not have."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator

from .failures import PHRASES

DIFFERENCES = re.compile(r"measure by differences(?: of gradients)? \([^)]*rule[^)]*\)")
"""What other commands can do."""
SETTING = re.compile(
    r"\b(Use|use|pass|raise) (way|rule|extension|max_gradients|max_products|rank|num_\w+)(?:='?(\w+)'?)?(?!\w)"
)
"""Advice on an option of an estimator."""
ELSEWHERE = "measure the trace instead, by curvkit trace --rule difference"


@contextlib.contextmanager
def typed() -> Generator[None]:
    """Say what is refused here as it would be typed."""
    from curvkit.errors import CurvkitError

    try:
        yield
    except CurvkitError as error:
        said = in_words(str(error))
        if said != str(error):
            error.args = (said,)
            if isinstance(error, ImportError):
                error.msg = said
        raise


def in_words(text: str) -> str:
    """Classes as names for --estimator, but for the one that speaks; differences of gradients as what they are offered by."""
    from curvkit.estimators.registry import BUILT_IN

    speaker = re.match(r"\w*", text)
    classes = {place.rpartition(":")[2]: name for name, place in BUILT_IN.items()}
    if speaker is not None:
        classes.pop(speaker[0], None)
    said = DIFFERENCES.sub(ELSEWHERE, text)
    said = re.sub(rf"\b({'|'.join(classes)})\b(?!\(|\.\w)", lambda found: f"--estimator {classes[found[1]]}", said)
    said = SETTING.sub(_setting, said)
    for phrase, words in PHRASES.items():
        said = said.replace(phrase, words)
    return said


def _setting(found: re.Match[str]) -> str:
    """`Use way='products'` as `Use --set way=products`, `raise rank` as `raise rank by --set`."""
    return f"{found[1]} --set {found[2]}={found[3]}" if found[3] else f"{found[1]} {found[2]} by --set"

"""The package transformers: its import, its tables, its silence; the only file that imports it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Generator
from typing import Any

from curvkit.errors import MissingExtra
from curvkit.resolving.language_model import Kind


def torchvision_fault() -> str | None:
    """Whether torchvision is installed and cannot be imported, as beside another build of torch; transformers then imports no model.

    Returns:
        What its import raised, or None.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError, OSError or ImportError, by platform
        return reason_of(error)
    return None


def library() -> Any:
    """Import transformers.

    Returns:
        The package.

    Raises:
        MissingExtra: If it is not there or cannot be imported, with what to type.

    Cost: seconds, once per process.
    """
    try:
        import transformers  # an optional package, and seconds to import
        from transformers import modeling_utils

        modeling_utils.PreTrainedModel  # noqa: B018
    except Exception as error:
        refuse_broken_torchvision(error)
        if isinstance(error, ModuleNotFoundError) and error.name == "transformers":
            raise MissingExtra(
                "Models of Hugging Face are built by transformers, which is not installed. Type: pip install 'curvkit[hf]'"
            ) from error
        raise MissingExtra(
            f"transformers is installed but cannot be imported ({reason_of(error)}). Type: pip install --upgrade 'curvkit[hf]'"
        ) from error
    return transformers


def refuse_broken_torchvision(error: Exception) -> None:
    """Say what to type if that is why transformers failed.

    Args:
        error: What it raised.

    Raises:
        MissingExtra: If torchvision is installed and cannot be imported.
    """
    fault = torchvision_fault()
    if fault is not None:
        raise MissingExtra(
            f"transformers imports no model, because torchvision is installed and broken ({fault}). Nothing here needs it. "
            "Type: pip uninstall torchvision"
        ) from error


@contextlib.contextmanager
def quietly() -> Generator[None]:
    """Without reports and progress bars: what matters of them is said by our own errors.

    Yields:
        Nothing; verbosity and bars are as before on leaving.
    """
    logging = library().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def classes_by_kind() -> dict[Kind, dict[str, str]]:
    """The language models that transformers ships.

    Returns:
        Kind -> model type -> name of the class.
    """
    from transformers.models.auto import modeling_auto

    causal: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked: Any = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return {"causal": dict(causal), "masked": dict(masked)}


def class_of_directory(reference: str, directory: str) -> Any:
    """Import a class from a Python file of a directory; only for what the user trusts.

    Args:
        reference: "file.Class".
        directory: Where the file lies.

    Returns:
        The class.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, directory, local_files_only=True)


def reason_of(error: BaseException) -> str:
    r"""The first line of an error that says something; where it announces the next one, both.

    Args:
        error: Any.

    Returns:
        At most 200 characters.

    Example:
        >>> reason_of(ValueError("Validation error for field 'n_layer':\n    TypeError: expected int, got str"))
        "Validation error for field 'n_layer': TypeError: expected int, got str"
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:200]

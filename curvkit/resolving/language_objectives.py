"""The objective of a checkpoint that is a language model: its own architecture, the cross-entropy, and the user's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from curvkit.checkpoints import Checkpoint, read
from curvkit.checkpoints.command_lines import command_line
from curvkit.checkpoints.needs import tokenizer_place
from curvkit.errors import UnknownObjective
from curvkit.objectives import Objective
from curvkit.resolving.adapted_models import adapt
from curvkit.resolving.calibration import Calibration, Shape, calibrate
from curvkit.resolving.hugging_face_models import build_hugging_face, refuse_other_architectures
from curvkit.resolving.language_model import LanguageModel
from curvkit.resolving.nanogpt_checkpoints import build_nanogpt, is_nanogpt
from curvkit.resolving.request import Request
from curvkit.resolving.texts import NoTokenizer, Tokenizer, bundled_tokens, read_tokens
from curvkit.resolving.tokenizers import load_tokenizer

DEMO = "text bundled with Python, not your data"


@dataclass(frozen=True, eq=False)
class LanguageObjective:
    """What was made of a checkpoint and a text."""

    objective: Objective
    source: str
    notes: tuple[str, ...]
    tokens_digest: str


def is_language_model(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint says which language model it is.

    Args:
        checkpoint: As read.

    Returns:
        True for a directory of Hugging Face, an adapter, or a checkpoint of nanoGPT; the architecture is looked at later.
    """
    return checkpoint.base is not None or _is_hugging_face(checkpoint) or is_nanogpt(checkpoint)


def language_objective(checkpoint: Checkpoint, request: Request) -> LanguageObjective:
    """Build the model, read the text, and join them.

    Args:
        checkpoint: One that `is_language_model`.
        request: Says which text.

    Returns:
        The objective: the mean cross-entropy of the predicted tokens, in nats.

    Raises:
        UnknownObjective: If no text is named, it does not fit, or there is no tokenizer for it.
        MissingExtra: If transformers, peft or datasets is needed and not there.
        RefusedCheckpoint: If the model would need code of its own, or its weights cannot be measured.
    """
    if not request.names_data:
        raise UnknownObjective(_teaching(checkpoint))
    seq_len, tokens = request.seq_len, request.tokens
    if request.data is not None:
        seq_len, tokens = request.data.seq_len, request.data.tokens
    language = _built(checkpoint, request)
    shape = Shape.of(seq_len, tokens, context=language.context)
    tokenizer = load_tokenizer(language.tokenizer_places, vocabulary=language.vocabulary, trust=request.trust)
    try:
        found = _calibration(language, shape, tokenizer, request)
    except NoTokenizer as error:
        raise UnknownObjective(_no_tokenizer(checkpoint, language, error, request)) from error
    name = DEMO if request.data is None else request.data.path.name
    objective = Objective(language.model, language.loss, found.batches)
    source = f"{language.name} ({checkpoint.kind}) · {language.loss.name} of {found.words} from {name}"
    return LanguageObjective(objective, source, (*language.notes, *found.notes), found.digest)


def _built(checkpoint: Checkpoint, request: Request) -> LanguageModel:
    if checkpoint.base is not None:
        base = build_hugging_face(read(checkpoint.base, trust=request.trust), request.trust)
        return adapt(base, checkpoint)
    if _is_hugging_face(checkpoint):
        return build_hugging_face(checkpoint, request.trust)
    return build_nanogpt(checkpoint)


def _calibration(language: LanguageModel, shape: Shape, tokenizer: Tokenizer | None, request: Request) -> Calibration:
    mask = tokenizer.mask if tokenizer is not None else None
    if request.data is not None:
        source = f"--data {request.data.path}"
        tokens = read_tokens(
            request.data, tokenizer, length=shape.length, count=shape.count, vocabulary=language.vocabulary
        )
    elif tokenizer is None:
        raise NoTokenizer("--demo-data is text")
    else:
        source, tokens = "--demo-data", bundled_tokens(tokenizer)
    return calibrate(tokens, shape, language, mask=mask, source=source)


def _no_tokenizer(checkpoint: Checkpoint, language: LanguageModel, error: NoTokenizer, request: Request) -> str:
    places = " and ".join(map(_named, language.tokenizer_places))
    measure = command_line("sharpness", checkpoint.path, *checkpoint.options, "--data", "val.bin")
    beside = [*language.tokenizer_places, *([request.data.path.parent] if request.data is not None else [])]
    pickled = next((place / "meta.pkl" for place in beside if (place / "meta.pkl").is_file()), None)
    lines = [
        f"{error}, and there is no tokenizer to make tokens of it.",
        f"  found    {language.name}, vocabulary 0 to {language.vocabulary - 1}; no tokenizer.json or the like in {places}",
        "  missing  the tokenizer that the model was trained with",
    ]
    if pickled is not None:
        lines.insert(2, f"           {pickled}, a pickle, which is not opened: that could run code")
    if isinstance(language.loss.attribute, str):
        lines.append(
            f"  do one   copy tokenizer.json (and tokenizer_config.json) of the model into {_named(language.tokenizer_places[0])}"
        )
        lines.append(f"           {measure}    ids: numpy.asarray(ids, dtype=numpy.uint16).tofile('val.bin')")
    else:
        lines.append(f"  do one   {measure}    the ids that nanoGPT's prepare.py wrote for its training")
        lines.append(f"           copy the tokenizer.json that fits it, for example GPT-2's, into {places}")
    return "\n".join(lines)


def _named(place: Path) -> str:
    return "the current directory" if place == Path() else str(place)


def _teaching(checkpoint: Checkpoint) -> str:
    """What to type, for a model that needs a text and nothing else."""
    path = checkpoint.path
    name = "GPT of nanoGPT"
    if checkpoint.base is not None:
        name = f"adapter of {checkpoint.base.name}"
    elif _is_hugging_face(checkpoint):
        name = refuse_other_architectures(checkpoint)
    places = (path if path.is_dir() else path.parent, *([checkpoint.base] if checkpoint.base is not None else []))
    place = tokenizer_place(places)
    tokenizer = "no tokenizer" if place is None else f"tokenizer in {place}"
    measure, text = command_line("sharpness", path, *checkpoint.options), "val.bin" if place is None else "val.txt"
    kinds = ".bin of nanoGPT: ids of tokens" if place is None else ".txt, .jsonl, nanoGPT's .bin, or a datasets folder"
    lines = [
        f"{path} is {_with_article(name)}, but nothing says on which text to measure it.",
        f"  found    {checkpoint} · {tokenizer}",
        "  missing  text: best what it was trained on, or was validated on",
        f"  do one   {measure} --data {text}       {kinds}",
    ]
    if place is not None:
        lines.append(f"           {measure} --demo-data          bundled text: not your data, so no verdict")
    lines.append(f"           {measure} --objective train.py:objective")
    return "\n".join(lines)


def _is_hugging_face(checkpoint: Checkpoint) -> bool:
    config: Mapping[str, object] = checkpoint.config or {}
    return "Hugging Face" in checkpoint.kind and ("model_type" in config or "architectures" in config)


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"

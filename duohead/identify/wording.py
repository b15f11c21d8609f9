"""The words around passkeys, as an option, and how a chat template frames them.

Which heads look like retrieval heads should not hang on one phrase or on text that a chat model never meets, so the
phrases can be replaced by a file and the questions asked in the model's own turns. Use `Wording.load("needles.toml")`;
`ChatFrame.of(tokenizer)` finds the three strings that a template puts around what is said.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ORDINAL = "{ordinal}"
CHAT = ("auto", "yes", "no")
# Not words of any template, without spaces that one might strip.
_SAID = ("QxFirstSaidxQ", "QxFirstAnswerxQ", "QxThenSaidxQ", "QxThenAnswerxQ")


@dataclass(frozen=True)
class Wording:
    """Phrases of the passkey task; `needle` and `question` hold ``{ordinal}`` once.

    A sample reads ``intro``, text with ``needle`` + passkey + ``needle_end`` in it, ``outro``, and for every passkey
    ``question``, a line end (in a chat: the turn of the model), ``answer`` + passkey + ``answer_end``.
    Raises ValueError for a phrase that is no text and an ordinal that is missing or out of place.
    """

    intro: str = "What follows is a long text with several passkeys in it.\n\n"
    needle: str = "\n\nKeep these words in mind, they are the {ordinal} passkey:"
    needle_end: str = ".\n\n"
    outro: str = "\n\nThe text ends here.\n\n"
    question: str = "Which words were the {ordinal} passkey?"
    answer: str = "The passkey:"
    answer_end: str = ".\n\n"

    def __post_init__(self) -> None:
        for field in fields(self):
            phrase = getattr(self, field.name)
            if not isinstance(phrase, str):
                raise ValueError(f"wording {field.name!r} must be a text, got {phrase!r}")
            wanted = field.name in ("needle", "question")
            if phrase.count(ORDINAL) != wanted:
                rule = f"must hold {ORDINAL} once" if wanted else f"must not hold {ORDINAL}"
                raise ValueError(
                    f"wording {field.name!r} {rule}, got {phrase!r}; it is where 'first', 'second' and so on go"
                )

    @classmethod
    def load(cls, path: str | Path) -> Wording:
        """The phrases in a JSON or TOML file; those that it leaves out keep their defaults.

        Raises ValueError for a file that cannot be read, a name that is no phrase, and what `Wording` refuses.
        """
        found = _mapping(Path(path))
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(found) - set(known))
        if unknown:
            raise ValueError(
                f"wording file {str(path)!r} has no use for {', '.join(unknown)}; the phrases are {', '.join(known)}"
            )
        return cls(**found)


def _mapping(path: Path) -> dict[str, Any]:
    readers: dict[str, Any] = {".json": json.loads, ".toml": tomllib.loads}
    if path.suffix not in readers:
        raise ValueError(f"wording file must end in .json or .toml, got {str(path)!r}")
    try:
        found = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"wording file {str(path)!r} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"wording file {str(path)!r} must hold names and phrases, got {type(found).__name__}"
        )
    return found


@dataclass(frozen=True)
class ChatFrame:
    """What a template writes: before the first user's words, between them and the model's, and after the model's."""

    opening: str
    reply: str
    next: str

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFrame:
        """The frame of the tokenizer's template.

        Raises ValueError if there is none, or if it does not repeat what is said word for word.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "chat='yes' needs a tokenizer with a chat template, and this one has none; use chat='no' or 'auto'"
            )
        roles = ("user", "assistant") * 2
        turns = [{"role": role, "content": said} for role, said in zip(roles, _SAID, strict=True)]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        parts = []
        for said in _SAID:
            before, found, text = text.partition(said)
            if not found:
                raise ValueError(
                    "the tokenizer's chat template does not repeat what user and model say in two turns each; "
                    "use chat='no' (--chat no)"
                )
            parts.append(before)
        return cls(*parts[:3])


def chat_frame(tokenizer: Any, chat: str) -> ChatFrame | None:
    """The frame that the option ``chat`` means for a tokenizer: "auto" takes a template where there is one.

    Raises ValueError for another option and what `ChatFrame.of` refuses.
    """
    if chat not in CHAT:
        raise ValueError(f"chat must be one of {', '.join(CHAT)}, got {chat!r}")
    if chat == "no" or (chat == "auto" and not getattr(tokenizer, "chat_template", None)):
        return None
    return ChatFrame.of(tokenizer)

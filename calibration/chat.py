"""Conversations as text: the messages that a table holds, written out by the model's chat template.

Left out: tools that a conversation could call, and images or sound in it, which are refused.
"""

import re
from typing import Any

from qmoe.calibration.pieces import Chat, Document, Reading
from qmoe.errors import CalibrationError

# Names of those who speak, where messages are written as from and value.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
            "bot": "assistant"}  # fmt: skip
KEYS = (("role", "content"), ("from", "value"))
# Messages that a program printed instead of storing: as Python prints them, or as JSON in a cell.
PRINTED = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")


def document(value: Any, where: str) -> Document | None:
    """Text or a conversation from a table's cell, None for one that is empty; CalibrationError for
    anything else, which only Python's way to print it would make text of. where: names the cell."""
    if value is None:
        return None
    if isinstance(value, str):
        if PRINTED.match(value):
            raise CalibrationError(
                f"{where} holds messages printed into a string; store them as a list of messages "
                "(.jsonl or .parquet), so that the chat template can write them"
            )
        return value if value.strip() else None
    if isinstance(value, dict):
        value = _turned(value)
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        chat = [_message(message, where) for message in value]
        return chat if any(message["content"].strip() for message in chat) else None
    raise CalibrationError(
        f"{where} holds {_kind(value)}; expected text, or messages with role and content (or from "
        "and value)"
    )


def render(tokenizer: Any, chat: Chat, reading: Reading) -> str | None:
    """A conversation as the model's chat template writes it, None (and noted) if it refuses;
    CalibrationError for a tokenizer without a template."""
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "the text holds messages, and the model's tokenizer has no chat template; give plain "
            "text, or put the model's chat_template.jinja into its folder"
        )
    from jinja2 import TemplateError  # here, because only conversations need it

    reading.chats += 1
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False)
        return text
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        reading.refused += 1
        reading.reason = reading.reason or str(error).partition("\n")[0] or type(error).__name__
        return None


def _turned(value: dict[str, Any]) -> Any:
    """Messages stored as one list of speakers and one of what they say."""
    for keys in KEYS:
        lists: list[Any] = [value.get(key) for key in keys]
        if all(isinstance(each, list) for each in lists) and len(set(map(len, lists))) == 1:
            return [dict(zip(keys, pair, strict=True)) for pair in zip(*lists, strict=True)]
    return value


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """With a role and a content that is text; a null is what tables fill missing keys with."""
    given = {key: value for key, value in message.items() if value is not None}
    keys = next((keys for keys in KEYS if keys[0] in given), None)
    # Calls of tools may stand without a content.
    silent = keys is not None and keys[1] not in message and "tool_calls" not in given
    if keys is None or silent or not isinstance(given[keys[0]], str):
        raise CalibrationError(
            f"{where} holds a list with {str(sorted(message))[:200]}; expected messages with role "
            "and content (or from and value)"
        )
    role = given.pop(keys[0])
    content = _content(given.pop(keys[1], ""), where)
    return given | {"role": SPEAKERS.get(role, role), "content": content}


def _content(content: Any, where: str) -> str:
    """What a message says; lists of parts are joined if all of them are text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            texts.append(text)
        else:
            kind = part.get("type") if isinstance(part, dict) else None
            raise CalibrationError(
                f"{where} holds a message with {kind or _kind(part)} in it; expected text alone"
            )
    return "".join(texts)


def _kind(value: Any) -> str:
    if isinstance(value, list) and value:
        return f"a list of {type(value[0]).__name__}"
    if isinstance(value, dict):
        return f"an object with {str(sorted(map(str, value)))[:200]}"
    return f"a value of type {type(value).__name__}"

"""Requests from a JSONL file of the user's.

Each line is one OpenAI messages list, or an object with it under `messages`:

    [{"role": "user", "content": "Why is the sky blue?"}]
    {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "cat.png"}},
        {"type": "text", "text": "What is this?"}]}]}

(one line each in the file). An image is a path relative to the file, a `data:` URI, or an http(s)
address that the server fetches itself. Blank lines are skipped.

An object may also carry `"answer"`, the right answer as text, and `"group"`, a name under which it
is counted: the report then has the accuracy of every arm, in all and by group.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sglang_moelb.ab.images import check_image, file_uri
from sglang_moelb.ab.measure import KINDS
from sglang_moelb.ab.types import AbError, Message, Request

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class _Counts:
    num_images: int = 0
    num_chars: int = 0
    num_pixels: int = 0

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(
            self.num_images + other.num_images,
            self.num_chars + other.num_chars,
            self.num_pixels + other.num_pixels,
        )


def file_workload(path: Path, num_requests: int | None = None) -> tuple[Request, ...]:
    """The first `num_requests` requests of `path`, or all. Raises `AbError` naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AbError(
            f"--workload {path}: cannot be read ({error}). Give `demo` or a UTF-8 JSONL file."
        ) from error
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise AbError(f"--workload {path}: has no requests. Write one OpenAI messages list a line.")
    if num_requests is not None and num_requests > len(numbered):
        raise AbError(
            f"--num-requests {num_requests}: {path} has only {len(numbered)}. Give that or less."
        )
    chosen = numbered[:num_requests]
    return tuple(_parse(i, line, path, number) for i, (number, line) in enumerate(chosen))


def _parse(request_id: int, line: str, path: Path, number: int) -> Request:
    where = f"{path} line {number}"
    try:
        tree = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise AbError(f"{where}: not valid JSON ({error}). Each line is one JSON value.") from error
    fields = tree if isinstance(tree, dict) else {"messages": tree}
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise AbError(f'{where}: must be a messages list, or an object with "messages".')
    parsed = [_message(message, path.parent, where) for message in messages]
    answer, group = _answer(fields, where)
    counts = sum((count for _, count in parsed), _Counts())
    if not counts.num_chars and not counts.num_images:
        raise AbError(f"{where}: the prompt is empty. Give some text or an image.")
    return Request(
        request_id=request_id,
        messages=tuple(message for message, _ in parsed),
        num_images=counts.num_images,
        num_chars=counts.num_chars,
        num_pixels=counts.num_pixels,
        answer=answer,
        group=group,
    )


def _answer(fields: dict[str, Any], where: str) -> tuple[str | None, str]:
    answer, group = fields.get("answer"), fields.get("group", "")
    if answer is not None and not (isinstance(answer, str) and answer.strip()):
        raise AbError(f'{where}: "answer" must be text that is not empty, found {answer!r}.')
    if not isinstance(group, str) or group in KINDS:
        raise AbError(
            f'{where}: "group" must be a name other than {", ".join(KINDS)}, found {group!r}.'
        )
    if group and answer is None:
        raise AbError(f'{where}: has a "group" and no "answer". Give the answer, or no group.')
    return answer, group


def _message(message: Any, folder: Path, where: str) -> tuple[Message, _Counts]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise AbError(f'{where}: each message needs a "role", one of {", ".join(ROLES)}.')
    content = message.get("content")
    if isinstance(content, str):
        return message, _Counts(num_chars=len(content.strip()))
    if not isinstance(content, list):
        raise AbError(f'{where}: "content" must be text or a list of parts, found {content!r}.')
    parts = [_part(part, folder, where) for part in content]
    return (
        {**message, "content": [part for part, _ in parts]},
        sum((count for _, count in parts), _Counts()),
    )


def _part(part: Any, folder: Path, where: str) -> tuple[Message, _Counts]:
    match part:
        case {"type": "text", "text": str(text)}:
            return part, _Counts(num_chars=len(text.strip()))
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            uri, num_pixels = _image(url, folder, where)
            image = {"type": "image_url", "image_url": {"url": uri}}
            return image, _Counts(num_images=1, num_pixels=num_pixels)
    raise AbError(
        f'{where}: a part must be {{"type": "text", "text": ...}} or {{"type": "image_url", '
        f'"image_url": {{"url": ...}}}}, found {str(part)[:80]}.'
    )


def _image(url: str, folder: Path, where: str) -> tuple[str, int]:
    if url.startswith(("http://", "https://")):
        return url, 0
    if not url.startswith("data:"):
        return file_uri(folder / url, where)
    try:
        content = base64.b64decode(url.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise AbError(f"{where}: the data: URI is not base64 ({error}).") from error
    return check_image(content, f"{where}: the data: URI")

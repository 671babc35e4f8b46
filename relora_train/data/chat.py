"""Conversations -> text by a chat template, with the parts of it that are answers.

Templates are rendered by transformers, in its sandbox, as `tokenizer.apply_chat_template` renders them. A template that
marks answers by {% generation %} says itself what is learned. For any other, an answer begins where the text that asks
for it (add_generation_prompt) ends. It goes on as far as rendering the conversation up to it and the whole conversation
agree, up to a special token or white space at its end.

A template that asks for the date gets a fixed one, so that the same conversations give the same bytes on any day. The
name of a special token in a message is broken in two by `BROKEN`, so that no message can forge one.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from relora_train.data.left_out import Fault
from relora_train.data.tokenizer import DocumentTokenizer, named_token
from relora_train.data.tokenizer_files import CHAT_TEMPLATE_FILE
from relora_train.errors import TokenizerError

CHAT_RULE = "marked answers, else from the text that asks to where the rendered conversations part, right-stripped; 1"

BROKEN = "\ufdd1"
"""Between the two halves of a special token's name in a message; text on both sides is encoded by itself."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PLAIN_KEYS = {"role", "content"}
"""transformers changes nothing in a message of two strings under these keys, so jinja may render it directly."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIXED_DATE = """\
{%- macro strftime_now(format) -%}
{{ {"%Y-%m-%d": "2024-07-26", "%B %d, %Y": "July 26, 2024"}.get(format, "26 Jul 2024") }}{%- endmacro -%}"""


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and what it is rendered with beside messages."""

    text: str
    special_tokens: Mapping[str, str]
    """Tokens by role, such as eos_token."""

    controls: tuple[str, ...]
    """Names of special tokens, which no message may forge."""

    def parts(self, messages: Sequence[Any], where: str) -> list[str]:
        """Return the rendered text in parts: 0, 2, … are given, 1, 3, … are answers. Raises Fault."""
        chat = [{key: self._unforged(value) for key, value in m.items() if value is not None} for m in messages]
        is_plain = all(m.keys() == _PLAIN_KEYS and type(m["role"]) is type(m["content"]) is str for m in chat)
        render = partial(self._render, where=where, is_plain=is_plain)
        text, spans = render(chat) if self._marks_answers else self._compared(chat, where, render)
        parts, done = list[str](), 0
        for start, end in spans:
            if end > start:
                parts += [text[done:start], text[start:end]]
                done = end
        if not parts:
            raise Fault(f"{where}: the chat template marks no answer in this conversation.", "no answer")
        return [*parts, text[done:]] if done < len(text) else parts

    @cached_property
    def _marks_answers(self) -> bool:
        return _MARKED.search(self.text) is not None

    @cached_property
    def _compiled(self) -> tuple[Any, Any, dict[str, Any]] | None:
        """The template as transformers compiles it, its tracker of marks, and all it is given but the messages.

        Rendering so takes 40 % of the time of `render_jinja_template`, and one answer may need two renderings.
        """
        from transformers.utils import chat_template_utils

        try:
            compiled = chat_template_utils._compile_jinja_template(self._dated)
            track = compiled.environment.activate_tracker
        except AttributeError:  # both are private to transformers: without them all is as it was, at half the speed
            return None
        return compiled, track, {**compiled.globals, **self.special_tokens, "tools": None, "documents": None}

    @cached_property
    def _dated(self) -> str:
        return _FIXED_DATE + self.text if "strftime_now" in self.text else self.text

    def _compared(
        self, chat: list[dict[str, Any]], where: str, render: Callable[..., tuple[str, Any]]
    ) -> tuple[str, list[tuple[int, int]]]:
        whole, spans = render(chat)[0], list[tuple[int, int]]()
        for number, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            asked, _ = render(chat[:number], asks=True)
            start = end = len(asked)
            if whole.startswith(asked):
                answered = whole if number == len(chat) - 1 else render(chat[: number + 1])[0]
                end = self._common_end(answered, whole)
            answer = whole[start:end].rstrip()
            if not answer or message.get("content", "").strip() not in answer:
                raise Fault(
                    f"{where}: the chat template writes message {number + 1}, an answer, differently from what came "
                    "before it, so that no one can tell which tokens are the answer. Mark answers in the template by "
                    "{% generation %} … {% endgeneration %}, and name its file in data.instructions.chat_template.",
                    "answers not to be told apart",
                )
            spans.append((start, start + len(answer)))
        return whole, spans

    def _common_end(self, answered: str, whole: str) -> int:
        """Return how far two texts agree, without a part of a special token that the second goes on with."""
        end = len(answered)
        if not whole.startswith(answered):
            longest = min(end, len(whole))
            end = bisect_left(range(1, longest + 1), True, key=lambda size: answered[:size] != whole[:size])
        for token in self.controls:
            place = whole.find(token, max(0, end - len(token) + 1), end + len(token) - 1)
            if 0 <= place < end:
                return place
        return end

    def _render(
        self, chat: list[dict[str, Any]], where: str, *, is_plain: bool, asks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text, and where the answers that the template marks stand in it."""
        try:
            if is_plain and self._compiled:
                compiled, track, known = self._compiled
                context = compiled.new_context({**known, "messages": chat, "add_generation_prompt": asks}, shared=True)
                if not self._marks_answers:
                    return "".join(compiled.root_render_func(context)), []
                blocks, marked = list[str](), list[tuple[int, int]]()
                with track(blocks, marked):
                    for block in compiled.root_render_func(context):
                        blocks.append(block)  # one by one, for the tracker measures them
                return "".join(blocks), marked
            from transformers.utils.chat_template_utils import render_jinja_template

            texts, spans = render_jinja_template(
                [chat],
                chat_template=self._dated,
                add_generation_prompt=asks,
                return_assistant_tokens_mask=self._marks_answers,
                **self.special_tokens,
            )
        except Exception as error:  # a template raises whatever its expressions raise
            raise Fault(
                f"{where}: the chat template fails on this conversation: {type(error).__name__}: {error}. "
                "Repair or remove the conversation, or give another template in data.instructions.chat_template.",
                "the chat template fails",
            ) from None
        return texts[0], spans[0] if spans else []

    def _unforged(self, value: Any) -> Any:
        if isinstance(value, str):
            for token in self.controls:
                if token in value:
                    value = value.replace(token, token[0] + BROKEN + token[1:])
            return value
        if isinstance(value, Mapping):
            return {key: self._unforged(inner) for key, inner in value.items()}
        return [self._unforged(inner) for inner in value] if isinstance(value, list) else value


def find_template(path: str | None, tokenizer: DocumentTokenizer | None, eos_token: str) -> ChatTemplate:
    """Return the template in a file, else the tokenizer's own. Raises TokenizerError.

    tokenizer: None for one that is yet to be trained, which knows eos_token alone.
    """
    if path is not None:
        try:
            text: str | None = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(
                f"data.instructions.chat_template {path} cannot be read: {error}. Name a file that holds a Jinja "
                "template."
            ) from None
    else:
        text = own_template(tokenizer) if tokenizer else None
    if not text:
        raise TokenizerError(
            "data.instructions.messages need a chat template, and the tokenizer has none"
            + ("" if tokenizer else ": a tokenizer that is trained here has none")
            + ". Name a file that holds one in data.instructions.chat_template."
        )
    if tokenizer is None:
        return ChatTemplate(text, {"eos_token": eos_token}, (eos_token,))
    named = {role: token for role in _SPECIAL if (token := named_token(tokenizer.config_text, role))}
    added = json.loads(tokenizer.json_text)["added_tokens"]
    controls = (token["content"] for token in added if token["special"] and len(token["content"]) > 1)
    return ChatTemplate(text, named, tuple(sorted(controls, key=len, reverse=True)))


def own_template(tokenizer: DocumentTokenizer) -> str | None:
    """Return the template that comes with a tokenizer: a file beside it, or a part of its configuration."""
    if CHAT_TEMPLATE_FILE in tokenizer.others:
        return tokenizer.others[CHAT_TEMPLATE_FILE].decode()
    found = json.loads(tokenizer.config_text).get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found if isinstance(found, str) else None

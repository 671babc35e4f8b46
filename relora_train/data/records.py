"""A record of a source -> its document: a text, or an example in parts.

Parts of messages and of a prompt with its completion: given text and answers in turn. Parts of a labelled text: the
text, the second text if there are pairs, and the class.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from relora_train.data.chat import BROKEN, ROLES, ChatTemplate
from relora_train.data.fields import text_of, value_of
from relora_train.data.left_out import NULL, Fault
from relora_train.data.splitting import PART, split_digest
from relora_train.settings.data import Holds, InstructionsConfig, LabelsConfig, SourceConfig

Document = str | tuple[str, ...]
"""A text, or the parts of an example."""


@dataclass(frozen=True)
class RecordReader:
    """The settings by which records become documents."""

    data: SourceConfig
    template: ChatTemplate | None = None
    """Only for messages."""

    first_of_class: dict[str, str] = field(default_factory=dict, compare=False)
    """The place of the first text of each class. Filled as records are read."""

    @property
    def are_texts(self) -> bool:
        """True if a document is one field's text."""
        return self.data.holds == "texts"

    @cached_property
    def fields(self) -> dict[str, str]:
        """The fields that are read, each with the setting that names it."""
        if instructions := self.data.instructions:
            names = {key: getattr(instructions, key) for key in ("messages", "prompt", "completion")}
            return {name: f"data.instructions.{key}" for key, name in names.items() if name is not None}
        found = {self.data.text_field: "data.text_field"}
        if labels := self.data.labels:
            if labels.text_pair_field is not None:
                found[labels.text_pair_field] = "data.labels.text_pair_field"
            found[labels.field] = "data.labels.field"
        return found

    def read(self, record: Mapping[str, Any], where: str) -> Document | Fault:
        """Return a record's document, NULL where its text is null, or its fault."""
        if self.are_texts:
            return text_of(record, self.data.text_field, where)
        try:
            if self.data.labels is not None:
                found = self._labelled(record, self.data.labels, where)
            elif self.template is not None:
                found = self._conversation(record, self.template, where)
            else:
                found = self._answered(record, cast(InstructionsConfig, self.data.instructions), where)
        except Fault as fault:
            return fault.with_traceback(None)  # NULL is one object: it would grow with each raise
        if any(PART in part for part in found):
            return Fault(f"{where} holds U+FDD0, which is no character. Remove it.", "a noncharacter")
        return tuple(found)

    def _answered(self, record: Mapping[str, Any], instructions: InstructionsConfig, where: str) -> list[str]:
        names = {"prompt": instructions.prompt, "completion": instructions.completion}
        prompt, completion = (
            text_of(record, str(name), where, f"data.instructions.{key}") for key, name in names.items()
        )
        if isinstance(prompt, Fault):
            raise prompt
        if completion is NULL or (isinstance(completion, str) and not completion.strip()):
            raise Fault(f"{where}: the completion is empty. Repair or remove the record.", "an empty answer")
        if isinstance(completion, Fault):
            raise completion
        return [prompt, completion]

    def _conversation(self, record: Mapping[str, Any], template: ChatTemplate, where: str) -> list[str]:
        name = next(iter(self.fields))
        messages = value_of(record, name, where, self.fields[name])
        if isinstance(messages, Fault):
            raise messages
        if not isinstance(messages, list) or not messages:
            what = "an empty list" if messages == [] else f"a {type(messages).__name__}, not a list of messages"
            raise Fault(
                f"{where}: the messages are {what}. Write them as [{{'role': 'user', 'content': …}}, …], or name "
                "another field in data.instructions.messages.",
                "no list of messages",
            )
        for number, message in enumerate(messages, start=1):
            self._check_message(message, f"{where}, message {number}")
        if not any(message["role"] == "assistant" for message in messages):
            raise Fault(f"{where} has no message of the assistant, so there is nothing to learn.", "no answer")
        return template.parts(messages, where)

    @staticmethod
    def _check_message(message: Any, where: str) -> None:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            found = f"role {role!r}" if role is not None else "no role"
            raise Fault(f"{where} has {found}. Roles are {', '.join(ROLES)}.", "an unknown role")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise Fault(f"{where}: its content is a {type(content).__name__}, not text.", "content that is no text")
        if BROKEN in (content or ""):
            raise Fault(f"{where} holds U+FDD1, which is no character. Remove it.", "a noncharacter")
        try:
            (content or "").encode()
        except UnicodeEncodeError as error:
            half = f"character {error.start} is half of a surrogate pair ({error.object[error.start]!r})"
            raise Fault(
                f"{where}: {half}, which no encoding can hold. Repair it.", "half of a surrogate pair"
            ) from None
        if role == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
            raise Fault(f"{where}: the answer is empty. Repair or remove the conversation.", "an empty answer")

    def _labelled(self, record: Mapping[str, Any], labels: LabelsConfig, where: str) -> list[str]:
        names = {self.data.text_field: "data.text_field"}
        if labels.text_pair_field is not None:
            names[labels.text_pair_field] = "data.labels.text_pair_field"
        parts = list[str]()
        for name, setting in names.items():
            text = text_of(record, name, where, setting)
            if isinstance(text, Fault):
                raise text
            parts.append(text)
        label = value_of(record, labels.field, where, "data.labels.field")
        if label is NULL or label == "":
            raise Fault(f"{where} has no class in {labels.field!r}. Label or remove it.", "no class")
        if isinstance(label, Fault):
            raise label
        if isinstance(label, bool) or not isinstance(label, int | str):
            what = f"{where}: the class in {labels.field!r} is a {type(label).__name__}, not a whole number or a name."
            raise Fault(f"{what} Name another field in data.labels.field.", f"no class in {labels.field!r}")
        if not parts[0]:
            raise NULL
        self.first_of_class.setdefault(str(label), where)
        return [*parts, str(label)]


def document_digest(document: Document, holds: Holds) -> int:
    """Return the digest that says which side a document goes to; a labelled text's is of the text, not its class."""
    return split_digest(document[:-1] if holds == "labels" else document)


def text_in(document: Document) -> str:
    """Return a document as one text."""
    return document if isinstance(document, str) else "".join(document)


def class_order(names: Mapping[str, Any]) -> tuple[str, ...]:
    """Return classes in order: by number where all are whole numbers, else by name."""
    try:
        return tuple(sorted(names, key=int))
    except ValueError:
        return tuple(sorted(names))

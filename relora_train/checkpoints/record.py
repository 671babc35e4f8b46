"""Records that a store keeps as JSON."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from relora_train.errors import CheckpointCorruptError
from relora_train.storage.base import ObjectStore, find_bytes


class StoredRecord(BaseModel):
    """A record that a store keeps as one JSON object. A reader refuses unknown fields and versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_bytes(self) -> bytes:
        """Return readable JSON: the same bytes for the same record."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes, *, uri: str, advice: str) -> Self:
        """Return the record. Raise CheckpointCorruptError, with what is wrong and the advice, if it is damaged."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            why = first["msg"].removeprefix("Value error, ")
            raise CheckpointCorruptError(
                f"{uri} is damaged or of another version: it is not a valid {cls.__name__}: {where}: {why}. {advice}"
            ) from None

    @classmethod
    def find(cls, store: ObjectStore, key: str, *, advice: str) -> tuple[Self, str] | None:
        """Return the record at a key and its etag, or None if there is none."""
        found = find_bytes(store, key)
        return found and (cls.parse(found[0], uri=f"{store.uri}/{key}", advice=advice), found[1])

"""Records as JSON: read strictly from data, a file or the package's own files by name; written compactly."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from prunet_zoo.errors import SpecError, describe_validation, unknown_name

ModelT = TypeVar("ModelT", bound="Frozen")


class Frozen(BaseModel):
    """Immutable record with compact JSON: fields at their default are left out.

    Data (`parse`) is read strictly: true or "64" is no integer. In Python code, pydantic's usual conversions apply.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def of_another_kind(cls, data: dict[str, Any]) -> str | None:
        """What a message says of data that is another kind of record; None: nothing."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, without the fields that are at their default."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_json(self) -> str:
        """Return JSON text with one block (or layer) a line."""
        return dump_compact(self.to_dict()) + "\n"


def stable_hash(data: Any) -> str:
    """12 hex digits of sha256 over canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def dump_compact(data: Any, indent: str = "") -> str:
    """JSON text in which an object or list without inner lists of objects stands on one line."""
    deeper = indent + "  "
    if isinstance(data, dict) and any(_is_nested(v) for v in data.values()):
        rows = (f"{deeper}{json.dumps(k)}: {dump_compact(v, deeper)}" for k, v in data.items())
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(data, list) and any(isinstance(v, dict) for v in data):
        return "[\n" + ",\n".join(deeper + dump_compact(v, deeper) for v in data) + f"\n{indent}]"
    return json.dumps(data, ensure_ascii=False)


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))


def parse(cls: type[ModelT], data: Any, what: str) -> ModelT:
    """Validate ``data`` as ``cls``, strictly as JSON: nothing is converted but tuples (lists) and records (objects).

    Raises:
        SpecError: naming the field, or what JSON cannot express.
    """
    if not isinstance(data, dict):
        raise SpecError(f"{what} must be a JSON object, got {type(data).__name__}")
    other = cls.of_another_kind(data)
    if other is not None:
        raise SpecError(f"{what} {other}")
    try:
        text = json.dumps(data, default=_record)
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecError(f"{what} must be plain JSON data: {error}") from None
    try:
        return cls.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise describe_validation(error, what) from None


def _record(value: Any) -> dict[str, Any]:
    if isinstance(value, Frozen):
        return value.to_dict()
    raise TypeError(
        f"{type(value).__name__} ({value!r:.80}) is neither object, list, text, number, true, false nor null"
    )


def read_json(path: str | Path, what: str) -> Any:
    """Read a JSON file; raises `SpecError` when it is missing or not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{what}: no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{what}: cannot read {path}: {error}") from None
    except json.JSONDecodeError as error:
        raise SpecError(f"{what}: {path} is not JSON (line {error.lineno}: {error.msg})") from None


def load_named(cls: type[ModelT], source: Any, folder: str, what: str) -> ModelT:
    """Resolve a name of package data in ``folder``, a ``.json`` path, a dict or a ready object to a ``cls``."""
    if isinstance(source, cls):
        return source
    if isinstance(source, dict):
        return parse(cls, source, what)
    text = str(source)
    if text.endswith(".json") or "/" in text or "\\" in text:
        return parse(cls, read_json(text, what), f"{what} {text}")
    known = list_named(folder)
    if text not in known:
        raise unknown_name(what, text, known, "A path must end in .json.")
    entry = resources.files("prunet_zoo") / folder / f"{text}.json"
    return parse(cls, json.loads(entry.read_text(encoding="utf-8")), f"{what} {text}")


def list_named(folder: str) -> list[str]:
    """Names of the JSON files that the package ships in ``folder``."""
    entries = (resources.files("prunet_zoo") / folder).iterdir()
    return sorted(e.name.removesuffix(".json") for e in entries if e.name.endswith(".json"))

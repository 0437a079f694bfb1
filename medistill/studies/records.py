"""Records of studies: read from plain values, and kept as files that are whole or absent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from medistill.errors import ConfigError
from medistill.release.durable import output_errors, replace_durably

Record = TypeVar("Record")


def read_record(record: type[Record], values: Mapping[str, Any]) -> Record:
    """Plain values as a frozen record, every field checked.

    Raises:
        ConfigError: With every problem and its dotted path.
    """
    try:
        return TypeAdapter(record).validate_python(dict(values))
    except ValidationError as error:
        lines = []
        for entry in error.errors():
            path = ".".join(map(str, entry["loc"]))
            lines.append(f"{path}: {entry['msg']}" if path else entry["msg"].removeprefix("Value error, "))
        raise ConfigError("\n".join(lines)) from None


def keep_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as a JSON file of schema version 1; a number that is not finite becomes null.

    Raises:
        OutputError: If it cannot be written.
    """
    text = json.dumps(_strict({"schema_version": 1, **values}), indent=1, allow_nan=False)
    keep(path, (text + "\n").encode())


def keep(path: Path, content: bytes) -> None:
    """Write a file that is whole or absent.

    Raises:
        OutputError: If it cannot be written.
    """
    with output_errors(path):
        replace_durably(path, content)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

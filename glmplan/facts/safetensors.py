"""What a local checkpoint folder holds: tensor names and bytes, from safetensors headers or the index.

A safetensors file begins with an 8-byte little-endian length and that many bytes of JSON (format 0.4, huggingface).
Only headers are read; nothing is deserialised but JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmplan.errors import UsageError
from glmplan.facts.model_config import read_json

HEADER_LIMIT_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensors:
    """Bytes by tensor name, where headers were read; else only the index's total. `files` counts shards seen."""

    bytes_by_name: dict[str, int]
    total_bytes: int
    files: int
    origin: str
    file_bytes: int | None = None


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of one file; a truncated or foreign file is a UsageError with both sizes."""
    try:
        size = os.path.getsize(path)
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, HEADER_LIMIT_BYTES):
                raise UsageError(
                    f"{path} is truncated or not safetensors: its header claims {length:,} bytes and the file has {size:,}.",
                    "Download that file again.",
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}.", "Check the path and its permissions.") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UsageError(f"{path} has a header that is not JSON.", "Download that file again.") from None
    if not isinstance(header, dict):
        raise UsageError(f"{path} has a header that is not an object.", "Download that file again.")
    _check_end(path, header, size - 8 - length)
    return header


def _check_end(path: Path, header: dict[str, Any], stored: int) -> None:
    try:
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        if any(type(begin) is not int or type(stop) is not int or not 0 <= begin <= stop for begin, stop in spans):
            raise ValueError("a tensor ends before it begins")
        end = max((stop for _, stop in spans), default=0)
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path} has an entry whose data_offsets are no pair of numbers.", "Download it again.") from None
    if end != stored:
        raise UsageError(
            f"{path} is incomplete: its tensors end at byte {end:,} but {stored:,} bytes follow the header.",
            "Download that file again.",
        )


def read_checkpoint(folder: Path) -> StoredTensors | None:
    """Tensor bytes of a folder: from all shards' headers, else the index's total, else None."""
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX_NAME
    listed: dict[str, str] = {}
    total = None
    if index.is_file():
        raw = read_json(index)
        weight_map = raw.get("weight_map")
        listed = weight_map if isinstance(weight_map, dict) else {}
        metadata = raw.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
    missing = sorted(set(listed.values()) - {shard.name for shard in shards})
    if shards and missing:
        raise UsageError(
            f"{folder} lacks {len(missing)} of {len(set(listed.values()))} shards that its index names, first {missing[0]}.",
            "Finish the download.",
        )
    named = set(listed.values())
    if shards:
        return _from_headers(folder, [shard for shard in shards if shard.name in named] if named else shards)
    if isinstance(total, int) and total > 0:
        return StoredTensors({}, total, 0, f"index total of {folder}")
    return None


def _from_headers(folder: Path, shards: list[Path]) -> StoredTensors:
    found: dict[str, int] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = int(end) - int(begin)
    origin = f"safetensors headers of {folder} ({len(shards)} files)"
    file_bytes = sum(shard.stat().st_size for shard in shards)
    return StoredTensors(found, sum(found.values()), len(shards), origin, file_bytes)

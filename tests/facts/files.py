"""Real safetensors files, written by hand: an 8-byte length, JSON, data."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path


def write_safetensors(path: Path, sizes: Mapping[str, int], metadata: dict[str, str] | None = None) -> Path:
    """A file of U8 tensors with these sizes. The data is a hole in the file, so a large one costs nothing."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)
    return path


def write_index(folder: Path, shards: Mapping[str, str], total: int | None = None) -> None:
    """model.safetensors.index.json: tensor name to file name."""
    metadata = {} if total is None else {"total_size": total}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": shards}))

"""What the tuner says, line by line, the tables that came back, and what was gained over the engine's default.

Times are microseconds of one GEMM; a gain is the default's time over the tuned one's, 1 where they are the same.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, ValidationError

from glmplan.errors import UsageError
from glmplan.facts.base import Frozen
from glmplan.kernels.engines.sglang_tables import NAME, read_table

if TYPE_CHECKING:
    from glmplan.fleet.tune_order import Tuning


class Event(Frozen):
    """One event of the tuner (`kernels.engines.sglang_tune.Event`); names that a newer tuner adds are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)

    kind: Literal["shape", "rows", "kept", "done"]
    shape: str
    n: int
    k: int
    step: int
    steps: int
    rows: int | None = None
    default_us: float | None = None
    tuned_us: float | None = None
    file: str | None = None


class TableLine(Frozen):
    """One table as the program on the host prints it."""

    kind: Literal["table"]
    file: str
    table: dict[str, dict[str, int]]
    gains: dict[str, Any] | None = None


class RowGain(Frozen):
    """One number of rows; None where the engine's default cannot run at all."""

    rows: int
    default_us: float | None
    tuned_us: float | None


class TunedShape(Frozen):
    """One weight [n, k]. `gain` is the geometric mean over `rows`; `measured` False for a table that was there before."""

    name: str
    n: int
    k: int
    file: str
    measured: bool
    gain: float | None
    rows: tuple[RowGain, ...]


class Tuned(Frozen):
    """What `glmplan tune --json` prints. `complete` False: the time was over, or it was interrupted; run it again."""

    schema_version: Literal[1] = 1
    host: str
    gpu: str
    gpu_index: int
    python: str
    engine_version: str
    tp_size: int
    out: str
    complete: bool
    interrupted: bool
    shapes_wanted: int | None
    shapes: tuple[TunedShape, ...]

    @classmethod
    def of(
        cls, tuning: Tuning, host: str, events: Iterable[Event], tables: Tables, interrupted: bool, timed_out: bool
    ) -> Tuned:
        """From the events and the tables that came back."""
        ended = {(event.n, event.k): event for event in events if event.kind in ("kept", "done")}
        wanted = [event.steps for event in events]
        return cls(
            host=host, gpu=tuning.gpu, gpu_index=tuning.gpu_index, python=tuning.python,
            engine_version=tuning.engine_version, tp_size=tuning.tp_size, out=str(tuning.out),
            complete=not interrupted and not timed_out, interrupted=interrupted,
            shapes_wanted=wanted[-1] if wanted else None,
            shapes=tuple(_shape(event, tables) for event in ended.values() if event.file),
        )  # fmt: skip


def parse_line(line: str) -> Event | TableLine | None:
    """An event, a table, or None for what libraries print."""
    if not line.startswith("{"):
        return None
    try:
        raw = json.loads(line)
        return (TableLine if raw.get("kind") == "table" else Event).model_validate(raw)
    except (ValueError, ValidationError, AttributeError):
        return None


@dataclass
class Tables:
    """Tables and gains by file name."""

    tables: dict[str, Any] = field(default_factory=dict)
    gains: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Tables:
        """What lies in a folder; a table that cannot be read is refused by name."""
        found = cls()
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is not a folder.", "Name a folder for the tables: --out.")
        for path in sorted(folder.glob("*.json")):
            if NAME.fullmatch(path.name):
                found.tables[path.name] = {str(rows): config for rows, config in read_table(path).items()}
        for path in sorted((folder / "gains").glob("*.json")):
            if path.name in found.tables:
                found.gains[path.name] = _read_gains(path)
        return found

    def add(self, line: TableLine, folder: Path) -> None:
        """Keep a table that came back, and write it; what is no table of GEMM sizes is refused."""
        if not NAME.fullmatch(line.file):
            raise UsageError(f"The host sent a table named {line.file!r}.", "Use the same glmplan on both sides.")
        if self.tables.get(line.file) == line.table and (folder / line.file).exists():
            return
        if line.gains is not None:
            _write(folder / "gains" / line.file, line.gains)
            self.gains[line.file] = line.gains
        _write(folder / line.file, line.table, read_table)
        self.tables[line.file] = line.table


def _read_gains(path: Path) -> Any:
    """What an earlier run measured; refused by name where it is no JSON, as its table would be."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"The gains {path} cannot be read: {error}.", "Remove the file.") from None


def _write(path: Path, content: object, check: Callable[[Path], object] | None = None) -> None:
    """The whole file or none of it; none too when `check` raises for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tune-")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(content, stream, indent=1)
                stream.write("\n")
            if check is not None:
                check(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", "Choose another folder: --out.") from None


def _shape(event: Event, tables: Tables) -> TunedShape:
    name = Path(event.file or "").name
    told = tables.gains.get(name)
    found = told.get("gains") if isinstance(told, dict) else None
    rows = tuple(
        RowGain(rows=int(count), default_us=_finite(one.get("default_us")), tuned_us=_finite(one.get("tuned_us")))
        for count, one in (found.items() if isinstance(found, dict) else ())
        if count.isdecimal() and isinstance(one, dict)
    )
    return TunedShape(
        name=event.shape, n=event.n, k=event.k, file=name, measured=event.kind == "done", gain=mean_gain(rows), rows=rows
    )


def mean_gain(rows: Iterable[RowGain]) -> float | None:
    """The geometric mean of default over tuned; None where nothing was measured."""
    logs = [math.log(one.default_us / one.tuned_us) for one in rows if one.default_us and one.tuned_us]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None

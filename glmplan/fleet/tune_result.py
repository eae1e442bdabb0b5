"""What the tuner says, line by line, the tables that came back, and what was gained over the engine's default.

Times are microseconds of one GEMM, of experts both GEMMs and the sorting; a gain is the default's time over the tuned one's,
1 where they are the same. Tables of experts lie in a folder of their own, below `configs`.
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
from glmplan.kernels.engines import sglang_expert_tables as experts
from glmplan.kernels.engines.sglang_tables import NAME, read_table

if TYPE_CHECKING:
    from glmplan.fleet.tune_order import Tuning

PARTIAL = "partial"


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
    experts: int | None = None
    row_count: int | None = None

    @property
    def size(self) -> str:
        """2624x6144, or 256x256x6144 for 256 experts."""
        return f"{self.n}x{self.k}" if self.experts is None else f"{self.experts}x{self.n}x{self.k}"


class TableLine(Frozen):
    """One table as the program on the host prints it."""

    kind: Literal["table"]
    file: str
    table: dict[str, dict[str, int]]
    gains: dict[str, Any] | None = None


class PartialLine(Frozen):
    """What is known so far of a shape that is found row by row."""

    kind: Literal["partial"]
    file: str
    content: dict[str, Any]


class RowGain(Frozen):
    """One number of rows; None where the engine's default cannot run at all."""

    rows: int
    default_us: float | None
    tuned_us: float | None


class TunedShape(Frozen):
    """One weight [n, k], or `experts` each n wide in a hidden size of k. `gain` is the geometric mean over `rows`;
    `measured` is False for a table that was there before."""

    name: str
    experts: int | None = None
    n: int
    k: int
    file: str
    measured: bool
    gain: float | None
    rows: tuple[RowGain, ...]

    @property
    def size(self) -> str:
        """N x K, or experts, width and hidden size."""
        return f"{self.n} x {self.k}" if self.experts is None else f"{self.experts} x {self.n} x {self.k}"


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
    experts_out: str | None = None
    complete: bool
    interrupted: bool
    shapes_wanted: int | None
    shapes: tuple[TunedShape, ...]

    @property
    def where(self) -> str:
        """The folders of the tables, in words."""
        named = {str(self.experts_out or self.out) if shape.experts is not None else self.out for shape in self.shapes}
        return " and ".join(sorted(named)) or self.out

    @classmethod
    def of(
        cls, tuning: Tuning, host: str, events: Iterable[Event], tables: Tables, interrupted: bool, timed_out: bool
    ) -> Tuned:
        """From the events and the tables that came back."""
        ended = {(event.experts, event.n, event.k): event for event in events if event.kind in ("kept", "done")}
        wanted = [event.steps for event in events]
        return cls(
            host=host, gpu=tuning.gpu, gpu_index=tuning.gpu_index, python=tuning.python,
            engine_version=tuning.engine_version, tp_size=tuning.tp_size, out=str(tuning.out),
            experts_out=None if tuning.experts_out is None else str(tuning.experts_out),
            complete=not interrupted and not timed_out, interrupted=interrupted,
            shapes_wanted=wanted[-1] if wanted else None,
            shapes=tuple(_shape(event, tables) for event in ended.values() if event.file),
        )  # fmt: skip


def parse_line(line: str) -> Event | TableLine | PartialLine | None:
    """An event, a table, what is known of one, or None for what libraries print."""
    if not line.startswith("{"):
        return None
    try:
        raw = json.loads(line)
        kinds: dict[str, type[TableLine | PartialLine]] = {"table": TableLine, "partial": PartialLine}
        return kinds.get(raw.get("kind"), Event).model_validate(raw)
    except (ValueError, ValidationError, AttributeError, TypeError, RecursionError):
        return None


@dataclass
class Tables:
    """Tables, gains and what is known of unfinished ones, by path below their folder: a name for a GEMM's, configs/... for
    those of experts."""

    tables: dict[str, Any] = field(default_factory=dict)
    gains: dict[str, Any] = field(default_factory=dict)
    partial: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, experts_folder: Path | None = None) -> Tables:
        """What lies in the folders; a table that cannot be read is refused by name."""
        found = cls()
        for where in filter(None, (folder, experts_folder)):
            if where.exists() and not where.is_dir():
                raise UsageError(f"{where} is not a folder.", "Name a folder for the tables: --out.")
        found._take(folder, sorted(folder.glob("*.json")))
        if experts_folder is not None:
            found._take(experts_folder, sorted((experts_folder / experts.CONFIGS).glob("triton_*/*.json")))
            for path in sorted((experts_folder / PARTIAL / experts.CONFIGS).glob("triton_*/*.part")):
                found.partial[str(path.relative_to(experts_folder / PARTIAL))] = _read_json(path)
        return found

    def _take(self, folder: Path, paths: Iterable[Path]) -> None:
        for path in paths:
            name = str(path.relative_to(folder))
            if not (NAME.fullmatch(name) or experts.PLACE.fullmatch(name)):
                continue
            table = read_table(path, tma="/" in name)
            self.tables[name] = {str(rows): config for rows, config in table.items()}
            if (folder / "gains" / name).exists():
                self.gains[name] = _read_json(folder / "gains" / name)

    def add(self, line: TableLine, folder: Path) -> None:
        """Keep a table that came back, and write it; what is no table of this kind is refused."""
        if not (NAME.fullmatch(line.file) or experts.PLACE.fullmatch(line.file)):
            raise UsageError(f"The host sent a table named {line.file!r}.", "Use the same glmplan on both sides.")
        self._drop_partial(line.file, folder)
        if self.tables.get(line.file) == line.table and (folder / line.file).exists():
            return
        if line.gains is not None:
            _write(folder / "gains" / line.file, line.gains)
            self.gains[line.file] = line.gains
        _write(folder / line.file, line.table, read_table)
        self.tables[line.file] = line.table

    def add_partial(self, line: PartialLine, folder: Path) -> None:
        """Keep what is known so far, for the next run."""
        if not experts.PLACE.fullmatch(line.file.removesuffix(".part")):
            raise UsageError(f"The host sent a file named {line.file!r}.", "Use the same glmplan on both sides.")
        _write(folder / PARTIAL / line.file, line.content)
        self.partial[line.file] = line.content

    def _drop_partial(self, name: str, folder: Path) -> None:
        self.partial.pop(f"{name}.part", None)
        (folder / PARTIAL / f"{name}.part").unlink(missing_ok=True)


def _read_json(path: Path) -> Any:
    """What an earlier run measured; refused by name where it is no JSON, as its table would be."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"What was measured, {path}, cannot be read: {error}.", "Remove the file.") from None


def require_writable(folder: Path) -> None:
    """Before hours of measuring, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}.", "Choose another folder: --out.") from None


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
    name = _below(event)
    told = tables.gains.get(name)
    found = told.get("gains") if isinstance(told, dict) else None
    rows = tuple(
        RowGain(rows=int(count), default_us=_finite(one.get("default_us")), tuned_us=_finite(one.get("tuned_us")))
        for count, one in (found.items() if isinstance(found, dict) else ())
        if count.isdecimal() and isinstance(one, dict)
    )
    return TunedShape(
        name=event.shape, experts=event.experts, n=event.n, k=event.k, file=name, measured=event.kind == "done",
        gain=mean_gain(rows), rows=rows,
    )  # fmt: skip


def _below(event: Event) -> str:
    """Its table as it is named below the folder."""
    parts = Path(event.file or "").parts
    return "/".join(parts[-1:] if event.experts is None else parts[-3:])


def mean_gain(rows: Iterable[RowGain]) -> float | None:
    """The geometric mean of default over tuned; None where nothing was measured."""
    logs = [math.log(one.default_us / one.tuned_us) for one in rows if one.default_us and one.tuned_us]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None

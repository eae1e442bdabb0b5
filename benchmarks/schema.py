"""The JSON Schema of `glmplan size --json`.  Run:  python benchmarks/schema.py [--write]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from glmplan.planning.plan import Plan

PLACE = Path(__file__).resolve().parent.parent / "docs" / "schema" / "plan.schema.json"


def schema_text() -> str:
    """The schema as it is published."""
    return json.dumps(Plan.model_json_schema(mode="serialization"), indent=1) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PLACE.parent.mkdir(parents=True, exist_ok=True)
        PLACE.write_text(schema_text())
    else:
        print(schema_text(), end="")

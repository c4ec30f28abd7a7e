"""Writes ``<dataset>.json`` as APAR's get_trace did, from native results.

The old format repeats the whole answer at every step, so its size is quadratic: one question at a time is in memory.
"""

import json
import os
from pathlib import Path
from typing import Any

from protocol.legacy_trace import legacy_trace
from protocol.trace import RequestTrace
from traces.results import Record, ResultFile, is_finished

_OURS = ("model", "method", "parameters", "answers", "traces", "error", "left_out")


def legacy_path(results: ResultFile) -> Path:
    """Where the legacy export of these results lies."""
    return results.path.with_suffix(".json")


def write_legacy(results: ResultFile) -> Path:
    """Export all answered questions; the bytes are those of ``json.dumps(list, ensure_ascii=False, indent=4)``."""
    path = legacy_path(results)
    fresh = path.with_suffix(".json.new")
    with fresh.open("w", encoding="utf-8", newline="\n") as file:
        separator = "[\n    "
        for record in filter(is_finished, results):
            item = json.dumps(_legacy_record(record), ensure_ascii=False, indent=4)
            file.write(separator + item.replace("\n", "\n    "))
            separator = ",\n    "
        file.write("[]" if separator.startswith("[") else "\n]")
    os.replace(fresh, path)
    return path


def _legacy_record(record: Record) -> dict[str, Any]:
    question = {key: value for key, value in record.items() if key not in _OURS}
    traces = [legacy_trace(RequestTrace.model_validate(trace)) for trace in record["traces"]]
    return {**question, "model": record["model"], "traces": [trace.model_dump(mode="json") for trace in traces]}

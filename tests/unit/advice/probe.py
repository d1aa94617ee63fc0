"""The probe: queries with the ids of the sections that answer them, and what a search gets right of them.

`python -m tests.unit.advice.probe` prints the table of docs/adr/0080 and 0082.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud.advice import manual as manuals
from cloud.advice.advise import Facts, Reason
from cloud.advice.embedding import Embedder
from cloud.advice.retrieval import Index, Query

PROBE: dict[str, Any] = json.loads((Path(__file__).parents[2] / "files" / "advice_probe.json").read_bytes())


@dataclass(frozen=True)
class Measured:
    """Shares, 0 to 1: first hit right; right one among three; question refused; off-topic question answered."""

    top_1: float
    recall_at_3: float
    refused: float
    answered_off_topic: float


def measure(index: Index, *, calibrate: bool | None = None) -> Measured:
    """Ask every question; `calibrate` chooses the half the floors were chosen on, or the other, None both."""

    def half(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [e for e in entries if calibrate is None or e["calibrate"] == calibrate]

    questions, off_topic = half(PROBE["questions"]), half(PROBE["off_topic"])
    found = [(index.search(Query(q["text"])), q["expect"]) for q in questions]
    ranks = [[hit.section.id in expect for hit in f.hits[:3]] for f, expect in found]
    return Measured(
        top_1=sum(r[0] for r in ranks) / len(ranks),
        recall_at_3=sum(any(r) for r in ranks) / len(ranks),
        refused=sum(not f.answers for f, _ in found) / len(found),
        answered_off_topic=sum(index.search(Query(q["text"])).answers for q in off_topic) / len(off_topic),
    )


def facts(alert: dict[str, Any]) -> Facts:
    """Read an alert of the probe."""
    evidence = tuple(Reason(e["name"], e["value"], e["deviation"]) for e in alert["evidence"])
    names = ("failure_type", "severity", "rule", "worst_cell", "worst_cell_deviation_v")
    return Facts(**{name: alert[name] for name in names}, evidence=evidence)


if __name__ == "__main__":
    for embedder in (None, Embedder.load()):
        index = Index(manuals.load(), embedder)
        for calibrate, label in ((True, "chosen on"), (False, "held out"), (None, "both")):
            m = measure(index, calibrate=calibrate)
            print(f"{index.method:7s} {label:10s} top-1 {m.top_1:.2f}  recall@3 {m.recall_at_3:.2f}  "
                  f"refused {m.refused:.2f}  off-topic answered {m.answered_off_topic:.2f}")  # fmt: skip

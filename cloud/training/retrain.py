"""A challenger from the lake's samples and people's verdicts, held against the champion on one frozen set.

Reads from top to bottom: check everything that could fail before minutes of work; label and featurise the samples; join
them to the base dataset; train; score both on the same windows; compare; decide; report. The champion's folder and the
base dataset are only read. Who wins serves nowhere by this: a person publishes.
"""

import asyncio
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cloud.lake.lake import url_name
from cloud.store.fleet_store import FleetStore
from cloud.store.training_rows import judged_alerts, last_seen, makes
from cloud.training import champion as champions
from cloud.training.appended import append, frozen_sha256
from cloud.training.compare import Contestant, Figure, Frozen, compare
from cloud.training.config import TrainingConfig
from cloud.training.dataset import DatasetInfo, Windows, read_info, read_split, read_split_episodes
from cloud.training.lake_reading import LakeReading
from cloud.training.lake_split import side_of
from cloud.training.sample_labels import Known, known_alert
from cloud.training.sampled import SAMPLED, SELECTED, Read, SampledWindow, read_samples
from cloud.training.scoring import Heads
from cloud.training.split import TEST
from cloud.training.train import Step, train_models
from cloud.training.vehicle import NATURAL, feature_runner
from cloud.training.verdict import Verdict, decide
from edge_agent.contract.errors import SourceError
from edge_agent.contract.signals import Catalogue

DATASET_FOLDER, MODELS_FOLDER = "dataset", "models"
JUDGED = ("confirmed", "early", "false_alarm")  # meanings that come from a person's verdict on that very alert


@dataclass(frozen=True, slots=True)
class Places:
    """Where a run reads and writes; `database` and `lake` are URLs."""

    data: Path
    champion: Path
    lake: str
    database: str
    output: Path

    @property
    def dataset(self) -> Path:
        """The joined dataset."""
        return self.output / DATASET_FOLDER

    @property
    def models(self) -> Path:
        """The challenger."""
        return self.output / MODELS_FOLDER


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to; `samples` and `labels` are those that the challenger learned from."""

    verdict: Verdict
    figures: tuple[Figure, ...]
    samples: int
    labels: int
    frozen_sha256: str
    report: dict[str, Any]


def retrain(
    places: Places,
    *,
    config: TrainingConfig,
    catalogue: Catalogue,
    on_step: Step,
    champion_release: int | None = None,
) -> Result:
    """Run it all. `champion_release` None: not known, so that any model's alert may be the champion's own.

    Raises `ConfigError` for folders that would be written over or that cannot be compared, `SourceError` for a lake or
    dataset that is missing, damaged, or gives nothing to learn from, `BundleError` for a champion that cannot be
    loaded, `UnavailableError` where store or lake are away.
    """
    on_step("checking champion and dataset", 0.0)
    champions.check_output(places.output, (places.dataset, places.models), (places.champion, places.data))
    info = read_info(places.data)
    record = champions.read_record(places.champion)
    runner = feature_runner(catalogue, info.window)
    champions.check_catalogue(places.data, info, catalogue, tuple(runner.feature_names))
    champions.check_fits(places.champion, record, places.data, info, info.features_sha256)
    thresholds = champions.read_thresholds(places.champion)
    Heads(places.champion, places.data, catalogue)  # whether its models load, before minutes of work

    on_step("asking the store for people's verdicts", 0.04)
    alerts, made_by, seen_at_s = asyncio.run(_from_store(places.database))

    lake = LakeReading(places.lake)
    read = read_samples(
        lake,
        alerts,
        runner=runner,
        catalogue=catalogue,
        window=info.window,
        horizon_s=config.labels.horizon_s,
        observed_until_s=seen_at_s,
        champion_release=champion_release,
        on_sample=lambda n: on_step(f"features of sample {n}", 0.06) if n % 50 == 1 else None,
    )
    sides = {
        vehicle: side_of(vehicle, info.split, record.split, config.challenger.held_out_share)
        for vehicle in sorted({w.vehicle_id for w in read.windows})
    }
    learned = [w for w in read.windows if sides[w.vehicle_id] != TEST]
    _require_labels(places, read, learned, lake.damaged)

    on_step("joining samples to the base dataset", 0.15)
    joined = append(places.data, info, read.windows, sides, places.dataset, makes=made_by)
    train_models(
        places.dataset,
        places.models,
        config=msgspec.structs.replace(config, window=info.window),
        catalogue=catalogue,
        on_step=lambda what, share: on_step(what, 0.2 + 0.5 * share),
    )

    frozen = Frozen.of(read_split(places.dataset, TEST, joined), read_split_episodes(places.data, TEST))
    contestants = []
    for number, (who, models, limits) in enumerate(
        (("champion", places.champion, thresholds), ("challenger", places.models, None))
    ):
        on_step(f"scoring the {who} on the frozen set", 0.72 + 0.1 * number)
        scores = Heads(models, places.dataset, catalogue).score(frozen.windows)
        contestants.append(Contestant(scores, limits or champions.read_thresholds(models)))
    on_step("comparing", 0.92)
    figures = compare(
        frozen, contestants[0], contestants[1], samples=config.challenger.bootstrap_samples, seed=config.seed
    )
    verdict = decide(figures, config.challenger)
    name = frozen_sha256(frozen.windows)
    labels = len({_alert(w) for w in learned if w.label.meaning in JUDGED})
    report = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": verdict.winner,
        "reasons": list(verdict.reasons),
        "rule": msgspec.to_builtins(config.challenger),
        "champion": {
            "models": str(places.champion), "release": champion_release, "created": record.created,
            "data_sha256": record.data_sha256,
        },
        "challenger": {
            "models": str(places.models), "dataset": str(places.dataset), "data_sha256": joined.data_sha256,
        },
        "samples": _samples(read, learned, lake.damaged, labels),
        "frozen": {"sha256": name, **_frozen(frozen.windows)},
        "figures": [figure_json(f) for f in figures],
        "notes": _notes(frozen.windows, info),
    }  # fmt: skip
    on_step("done", 1.0)
    return Result(verdict, tuple(figures), len(learned), labels, name, report)


async def _from_store(url: str) -> tuple[dict[str, list[Known]], dict[str, str], dict[str, float]]:
    store = FleetStore.over(url)
    try:
        await store.prepare()
        async with store.reading() as connection:
            alerts = await judged_alerts(connection)
            known = {v: [known_alert(a) for a in of_vehicle] for v, of_vehicle in alerts.items()}
            return known, await makes(connection), await last_seen(connection)
    finally:
        await store.close()


def _require_labels(places: Places, read: Read, learned: list[SampledWindow], damaged: list[str]) -> None:
    if read.samples == 0:
        files = f" ({len(damaged)} damaged files; {damaged[0]})" if damaged else ""
        raise SourceError(
            f"lake {url_name(places.lake)}: holds no sample that can be read{files}; there is nothing to learn from"
        )
    if any(w.label.meaning in JUDGED for w in learned):
        return
    name = url_name(places.lake)
    if any(w.label.meaning in JUDGED for w in read.windows):
        raise SourceError(
            f"lake {name}: every vehicle with a judged alert is a held-out one; nothing is left to learn from: "
            f"wait for alerts of more vehicles to be judged"
        )
    most = f"; most: {read.unused.most_common(1)[0][0]}" if read.unused else ""
    raise SourceError(
        f"lake {name}: none of its {read.samples} samples has a usable verdict of a person{most}; confirm "
        f"alerts or call them false alarms first (POST /v1/alerts/ID/confirm, …/false-alarm)"
    )


def _alert(w: SampledWindow) -> tuple[str, str]:
    return w.vehicle_id, w.label.alert.alert_id if w.label.alert is not None else ""


def _samples(read: Read, learned: list[SampledWindow], damaged: list[str], labels: int) -> dict[str, Any]:
    held_out = {w.vehicle_id for w in read.windows} - {w.vehicle_id for w in learned}
    return {
        "read": read.samples,
        "learned_from": len(learned),
        "learned_alerts": labels,
        "learned_vehicles": len({w.vehicle_id for w in learned}),
        "held_out": len(read.windows) - len(learned),
        "held_out_vehicles": len(held_out),
        "meanings": dict(sorted(read.used.items())),
        "unused": dict(read.unused.most_common()),
        "fresh_states": read.fresh_states,
        "damaged_files": len(damaged),
        "lines": [*damaged, *read.lines],
    }


def _frozen(windows: Windows) -> dict[str, Any]:
    natural, sampled = windows.variant == NATURAL, windows.variant == SAMPLED
    failing: Counter[str] = Counter()
    selected = windows.variant == SELECTED
    for mask, name in ((natural, "base"), (sampled, "lake")):
        failing[name] = len(np.unique(windows.vehicle[mask & (windows.type_index >= 0)]))
    return {
        "vehicles": len(np.unique(windows.vehicle)),
        "windows": len(windows),
        "base_vehicles": len(np.unique(windows.vehicle[natural])),
        "base_failing_vehicles": failing["base"],
        "lake_vehicles": len(np.unique(windows.vehicle[sampled])),
        "lake_failing_vehicles": failing["lake"],
        "lake_windows": int(sampled.sum()),
        "champions_own_windows": int(selected.sum()),
    }


def figure_json(figure: Figure) -> dict[str, Any]:
    """Return a figure as plain JSON values; what could not be computed is null."""
    flat = asdict(figure) | {"gain": figure.gain}
    flat["difference"] = {name: _number(value) for name, value in flat["difference"].items()}
    return {name: _number(value) if isinstance(value, float) else value for name, value in flat.items()}


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _notes(windows: Windows, info: DatasetInfo) -> list[str]:
    about = _frozen(windows)
    bias = (
        "Windows that the champion's own alerts chose teach, and are shown, but decide nothing: there it finds every "
        "failure and every false alarm is its own. What decides is recorded, or was chosen by chance, by a guard or "
        "by another release."
    )
    notes = [
        bias,
        "A label is what a person said; a wrong verdict teaches, and judges, wrongly.",
        "Sampled windows have no say in the thresholds' false-alarm budget, which is a rate a month.",
    ]
    if about["lake_vehicles"] == 0:
        notes.append(
            "No sampled window of a held-out vehicle was chosen by anything but the champion: both were compared on "
            "the base test vehicles alone."
        )
    if about["base_failing_vehicles"] + about["lake_failing_vehicles"] < 20:
        notes.append(
            f"Only {about['base_failing_vehicles']} base and {about['lake_failing_vehicles']} held-out vehicles fail "
            f"in the frozen set. A difference inside its interval is none."
        )
    if info.counts.get(TEST, {}).get("vehicles", 0) == 0:
        notes.append("The base dataset has no test vehicle.")
    return notes

"""The loop closed on a real lake and store: a failure that the champion has never seen, judged by people, is learned.

And its opposites: useless verdicts change nothing, and whatever is missing, cut or foreign is one clear line.
"""

import asyncio
import hashlib
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cloud import __main__ as command
from cloud.store.fleet_store import FleetStore
from cloud.store.training_rows import last_training_run
from cloud.training import retrain_command
from cloud.training.appended import frozen_sha256
from cloud.training.compare import Figure
from cloud.training.dataset import read_info, read_split, read_split_episodes
from cloud.training.lake_split import side_of
from cloud.training.prepare import prepare_dataset
from cloud.training.retrain import Places, Result, retrain
from cloud.training.retraining_report import render, write_report
from cloud.training.sampled import SAMPLED, SELECTED, read_samples
from cloud.training.split import TEST, TRAIN
from cloud.training.train import train_models
from edge_agent.contract.errors import BundleError, ConfigError, SourceError
from edge_agent.contract.samples import pack, unpack
from edge_agent.contract.signals import FAILURE_TYPES
from edge_agent.pipeline import drift
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.outcomes import AlertChange, Sampled, Scored
from edge_agent.pipeline.sampling import SamplingLimits
from export.bundle import build
from firmware_sim import faults, fleet
from tests import lakes
from tests.lakes import CATALOGUE, RUNNER, Driven, TestAlert

NEW = "charging_fault"
# the autoencoder has no part in what is shown here
CONFIG = msgspec.structs.replace(
    lakes.CONFIG, autoencoder=msgspec.structs.replace(lakes.CONFIG.autoencoder, epochs=3, least_steps=100)
)


@dataclass(frozen=True, slots=True)
class Field:
    """A champion that never saw a charging fault, its dataset, and a fleet in the field that has them."""

    folder: Path
    driven: dict[str, Driven]

    @property
    def data(self) -> Path:
        return self.folder / "datasets"

    @property
    def champion(self) -> Path:
        return self.folder / "models"

    def alerts(self) -> list[TestAlert]:
        """One alert a failing vehicle that charges, confirmed: a guard's (isolation, inlet), which needs no model."""
        found = []
        for driven in self.driven.values():
            rows = charging(driven)
            if driven.vehicle.episode is not None and len(rows):
                row = int(rows[min(3, len(rows) - 1)])
                found.append(lakes.alert_at(driven, row, NEW, "confirm", origin="guard"))
        return found

    def samples(self, alerts: list[TestAlert]) -> list[lakes.LakeSample]:
        """Windows around every alert, and at random of vehicles without one."""
        found = []
        for alert in alerts:
            driven = self.driven[alert.vehicle_id]
            found += lakes.around(driven, int(alert.alert_id.rpartition("-")[2]), alert)
        random = np.random.default_rng(3)
        for driven in self.driven.values():
            if driven.vehicle.episode is None:
                rows = {*random.choice(len(driven.windows), 5, replace=False).tolist(), *charging(driven)[::7][:5]}
                found += [lakes.sample(driven, int(row)) for row in sorted(rows)]
        return found


def charging(driven: Driven) -> np.ndarray:
    strata = np.array([drift.stratum(w, CATALOGUE) for w in driven.windows])
    failing = driven.vehicle.episode is not None
    return np.flatnonzero((strata == "charging") & ((driven.level() >= 2) | (not failing)))


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Field:
    folder = tmp_path_factory.mktemp("field")
    spec = fleet.FleetSpec(vehicles=48, days=3, hours=0.8, seed=11, faulty=0.55)
    fleet.generate(spec, folder / "raw", workers=1, on_progress=lambda vehicles, frames: None)
    labels = pq.read_table(folder / "raw" / "labels.parquet")
    never = pc.equal(labels["failure_type"], NEW)
    for vehicle in labels.filter(never)["vehicle_id"].to_pylist():
        shutil.rmtree(folder / "raw" / "raw_frames" / f"vehicle_id={vehicle}")
    pq.write_table(labels.filter(pc.invert(never)), folder / "raw" / "labels.parquet")
    with ThreadPoolExecutor(2) as executor:
        prepare_dataset(
            folder / "raw", folder / "datasets", config=CONFIG, catalogue=CATALOGUE, mapping=lakes.MAPPING,
            executor=executor, on_vehicle=lambda done, total: None,
        )  # fmt: skip
    train_models(folder / "datasets", folder / "models", config=CONFIG, catalogue=CATALOGUE, on_step=lambda *_: None)
    there = fleet.FleetSpec(vehicles=60, days=2, hours=1.0, seed=77, faulty=0.0)
    vehicles = lakes.vehicles(there, "CH", [None] * 42)
    for n, vehicle in enumerate(vehicles):
        if n % 3:
            episode = faults.sudden(
                NEW, "high", after_s=fleet.START_S, ramp_s=6 * 3600.0, cell=0, variant=faults.variants(NEW)[n % 2]
            )
            vehicles[n] = replace(vehicle, episode=episode)
    return Field(folder, {d.vehicle_id: d for d in lakes.drive(there, vehicles, folder / "recordings")})


def filled(field: Field, folder: Path, alerts: list[TestAlert]) -> Places:
    """A lake and a store with these alerts and their samples."""
    lakes.write_lake(str(folder / "lake"), field.samples(alerts))
    asyncio.run(lakes.write_store(f"sqlite:///{folder / 'fleet.db'}", alerts, seen=field.driven))
    return Places(
        field.data, field.champion, str(folder / "lake"), f"sqlite:///{folder / 'fleet.db'}", folder / "retraining"
    )


def run(places: Places, config=CONFIG) -> Result:
    return retrain(places, config=config, catalogue=CATALOGUE, on_step=lambda what, share: None)


def figure(result: Result, name: str, part: str) -> Figure:
    return next(f for f in result.figures if (f.name, f.part) == (name, part))


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def learned(field: Field, tmp_path_factory: pytest.TempPathFactory) -> tuple[Places, Result, dict[str, str]]:
    before = contents(field.champion) | contents(field.data)
    places = filled(field, tmp_path_factory.mktemp("learned"), field.alerts())
    return places, run(places), before


@pytest.mark.slow
def test_a_failure_that_the_champion_never_saw_is_learned_from_peoples_verdicts(
    learned: tuple[Places, Result, dict[str, str]],
) -> None:
    _, result, _ = learned
    assert result.verdict.winner == "challenger", result.verdict.reasons
    new, base = figure(result, f"pr_auc.{NEW}", "all"), figure(result, "pr_auc.types", "base")
    assert new.vehicles >= CONFIG.challenger.least_vehicles
    assert new.difference.low > 0  # the true reason: it knows the new failure, on vehicles that it has not seen
    assert new.challenger > 0.8 > new.champion
    found = figure(result, "event_recall", "lake")
    assert found.champion == 0.0
    assert found.difference.low > 0
    assert base.gain > -CONFIG.challenger.pr_auc_margin
    assert any("PR-AUC over the failure types" in reason for reason in result.verdict.reasons)


@pytest.mark.slow
def test_what_only_the_champions_own_alerts_show_is_learned_and_decides_nothing(field: Field, tmp_path: Path) -> None:
    """The same vehicles and verdicts, but the champion's alerts of a wrong type brought the windows."""
    own = [replace(a, origin="model", failure_type="battery_degradation", label_type=NEW) for a in field.alerts()]
    result = run(filled(field, tmp_path, own))
    assert figure(result, "event_recall", "alerts").difference.low > 0
    assert not any((f.name, f.part) == (f"pr_auc.{NEW}", "all") for f in result.figures)
    assert result.report["frozen"]["champions_own_windows"] > 0
    info = read_info(tmp_path / "retraining" / "dataset")
    assert SELECTED in read_split(tmp_path / "retraining" / "dataset", TRAIN, info).variant
    assert result.verdict.winner == "champion", result.verdict.reasons


@pytest.mark.slow
def test_champion_and_base_dataset_are_only_read(field: Field, learned: tuple[Places, Result, dict[str, str]]) -> None:
    assert contents(field.champion) | contents(field.data) == learned[2]


@pytest.mark.slow
def test_no_held_out_vehicle_and_no_test_vehicle_is_learned_from(
    learned: tuple[Places, Result, dict[str, str]],
) -> None:
    places, result, _ = learned
    info = read_info(places.dataset)
    train, frozen = read_split(places.dataset, TRAIN, info), read_split(places.dataset, TEST, info)
    assert not set(train.vehicle.tolist()) & set(frozen.vehicle.tolist())
    assert {"CH_", "EV_"} <= {v[:3] for v in frozen.vehicle.tolist()}
    assert frozen_sha256(frozen) == result.frozen_sha256 == result.report["frozen"]["sha256"]
    base = read_split(places.data, TEST, read_info(places.data))
    assert np.array_equal(frozen.features[~np.isin(frozen.variant, [SAMPLED, SELECTED])], base.features, equal_nan=True)
    episodes = read_split_episodes(places.dataset, TEST)
    assert any(e.failure_type == NEW for v, of in episodes.items() if v.startswith("CH_") for e in of)


@pytest.fixture(scope="module")
def bundle(learned: tuple[Places, Result, dict[str, str]]) -> LoadedBundle:
    """The challenger, exported."""
    places, _, _ = learned
    path = places.output / "bundle"
    build(places.models, places.dataset, path, catalogue=CATALOGUE, release=2, created="2026-02-01T00:00:00.000Z")
    return load_bundle(path, CATALOGUE)


@pytest.mark.slow
def test_the_challenger_is_a_bundle_like_any_other(bundle: LoadedBundle) -> None:
    assert NEW in bundle.manifest.failure_types


@pytest.mark.slow
def test_the_challenger_on_a_vehicle_alerts_on_the_failure_and_samples_it(
    field: Field, bundle: LoadedBundle, little: Places
) -> None:
    """The vehicle's own pipeline, its own samples, and the features that training computes from them."""
    failing = [
        v for v in field.driven if side_of(v, {}, {}, 0.3) == TEST and field.driven[v].vehicle.episode is not None
    ]
    alerted, compared = 0, 0
    for vehicle in (v for v in failing if len(charging(field.driven[v])) > 10):
        arrivals = lakes.arrivals_of(field.folder / "recordings" / f"{vehicle}.parquet")
        pipeline = Pipeline(
            CATALOGUE, vehicle_id=vehicle, bundle=bundle, cells=arrivals[0].cell_voltage.shape[1],
            probes=arrivals[0].cell_temperature.shape[1], sampling=SamplingLimits(bytes_a_day=10**7, random_share=0.3),
        )  # fmt: skip
        outcomes = [o for block in arrivals for o in pipeline.push(block)] + list(pipeline.flush())
        alerted += any(isinstance(o, AlertChange) and o.failure_type == NEW for o in outcomes)
        scored = {o.window.end_s: o.scores for o in outcomes if isinstance(o, Scored)}
        sampled = [o for o in outcomes if isinstance(o, Sampled) and o.reason == "random"]
        lake = [lakes.from_vehicle(vehicle, o) for o in sampled]
        read = read_lake(little, [replace(s, vehicle_id="nobody's alerts") for s in lake], [])
        assert read.fresh_states == 0
        for window in read.windows:
            close = np.isclose(window.features, scored[window.end_s].features, rtol=1e-2, atol=1e-2, equal_nan=True)
            assert close.mean() > 0.97  # what int16 lost moves an extreme or a slope of a still signal
            compared += 1
    assert alerted > 0
    assert compared > 10


@pytest.mark.slow
def test_useless_verdicts_leave_the_champion(field: Field, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    said = []
    for alert in field.alerts():
        kind = str(random.choice([*FAILURE_TYPES, "nothing"]))
        said.append(
            replace(alert, action="false-alarm", label_type=None)
            if kind == "nothing"
            else replace(alert, label_type=kind)
        )
    result = run(filled(field, tmp_path, said))
    assert result.verdict.winner == "champion", result.verdict.reasons
    assert result.verdict.reasons


@pytest.mark.slow
def test_the_reports_are_strict_json_and_a_page_without_scripts(
    learned: tuple[Places, Result, dict[str, str]], tmp_path: Path
) -> None:
    _, result, _ = learned
    page = write_report(result.report, result.figures, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the report")

    read = json.loads((tmp_path / "retraining_report.json").read_text(), parse_constant=refuse)
    assert read["frozen"]["sha256"] == result.frozen_sha256
    assert {f["name"] for f in read["figures"]} >= {
        "pr_auc.types",
        "event_recall",
        "false_alarms",
        "severity_steps_off",
    }
    assert read["samples"]["learned_alerts"] == result.labels > 0
    assert "The challenger is better" in page.read_text()
    assert "<script" not in render(result.report, result.figures)


# --- what may be wrong, before minutes of work ---


@pytest.fixture(scope="module")
def little(field: Field, tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A lake of a few samples, with a judged alert on a vehicle that learns."""
    learning = [a for a in field.alerts() if side_of(a.vehicle_id, {}, {}, 0.3) == TRAIN][:2]
    folder = tmp_path_factory.mktemp("little")
    some = [s for s in field.samples(learning) if s.reason == "alert" or s.vehicle_id == "CH_003"]
    lakes.write_lake(str(folder / "lake"), some)
    asyncio.run(lakes.write_store(f"sqlite:///{folder / 'fleet.db'}", learning, seen=field.driven))
    return Places(field.data, field.champion, str(folder / "lake"), f"sqlite:///{folder / 'fleet.db'}", folder / "out")


def read_lake(places: Places, samples, alerts: list[TestAlert]):
    from cloud.training.retrain import _from_store  # noqa: PLC0415

    known, _, seen = asyncio.run(_from_store(places.database))
    seen = dict.fromkeys((s.vehicle_id for s in samples), lakes.NOW) | seen
    return read_samples(
        samples, known, runner=RUNNER, catalogue=CATALOGUE, window=CONFIG.window, horizon_s=CONFIG.labels.horizon_s,
        observed_until_s=seen, champion_release=1, on_sample=lambda done: None,
    )  # fmt: skip


@pytest.mark.slow
def test_a_samples_features_are_the_vehicles_own_by_its_carried_state(field: Field, little: Places) -> None:
    driven = field.driven["CH_003"]
    last = len(driven.windows) - 1
    carried = read_lake(little, [lakes.sample(driven, last)], [])
    expected, pooled, _ = RUNNER.run(driven.windows[last], driven.states[last])
    assert carried.fresh_states == 0
    np.testing.assert_allclose(carried.windows[0].pooled, pooled, atol=0.05, rtol=2e-3)
    slow = [i for i, name in enumerate(RUNNER.feature_names) if name.startswith("trend") or "_trend" in name] or [-1]
    np.testing.assert_allclose(carried.windows[0].features[slow], expected[slow], atol=1e-2, rtol=2e-2)
    fresh = read_lake(little, [lakes.sample(driven, last, state_id="of an older release")], [])
    assert fresh.fresh_states == 1
    # a vehicle never seen before: what its state would have said is not known, or is another number
    assert not np.allclose(fresh.windows[0].features, carried.windows[0].features, equal_nan=True)


@pytest.mark.slow
def test_a_sample_of_another_schema_or_that_is_cut_is_left_out_and_named(field: Field, little: Places) -> None:
    good = lakes.sample(field.driven["CH_003"], 3)
    window = unpack(good.packed)
    foreign = replace(
        good, sample_id="foreign", end_s=1.0,
        packed=pack(replace(window, signals=("Pump.Flow", *window.signals[1:]))),
    )  # fmt: skip
    cut = replace(good, sample_id="cut", end_s=2.0, packed=good.packed[: len(good.packed) // 2])
    read = read_lake(little, [good, foreign, cut], [])
    assert (len(read.windows), read.unused["cannot be used here"]) == (1, 2)
    assert any("foreign" in line and "another schema" in line for line in read.lines)
    assert any("cut" in line and "ends in the middle" in line for line in read.lines)


@pytest.mark.slow
def test_a_lake_file_cut_in_the_middle_is_skipped_and_named(field: Field, little: Places, tmp_path: Path) -> None:
    shutil.copytree(little.lake, tmp_path / "lake")
    victim = min((tmp_path / "lake").rglob("*.parquet"))
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    result = run(replace(little, lake=str(tmp_path / "lake"), output=tmp_path / "out"))
    assert result.report["samples"]["damaged_files"] == 1
    assert victim.name in result.report["samples"]["lines"][0]
    assert result.verdict.winner == "champion"  # two judged alerts, none held out: nothing that could decide


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ("no lake", SourceError, "is not there"),
        ("an empty lake", SourceError, "holds no sample"),
        ("no labels", SourceError, "none of its"),
        ("an unknown type", SourceError, "unknown failure type 'gearbox'"),
        ("the champion's folder", ConfigError, "would write over"),
        ("a parent of the champion's", ConfigError, "would write over"),
        ("another feature set", ConfigError, "another feature set"),
        ("a dataset that the champion learned from", ConfigError, "has learned from"),
        ("an appended dataset", ConfigError, "already holds samples"),
        ("no champion", SourceError, "training.json"),
        ("a champion cut short", BundleError, "lgbm_failure_predictor.txt"),
    ],
)
def test_what_is_wrong_is_one_clear_line(
    field: Field, little: Places, tmp_path: Path, wrong: str, error: type[Exception], words: str
) -> None:
    places = replace(little, output=tmp_path / "out")
    if wrong == "no lake":
        places = replace(places, lake=str(tmp_path / "nowhere"))
    elif wrong == "an empty lake":
        (tmp_path / "lake").mkdir()
        places = replace(places, lake=str(tmp_path / "lake"))
    elif wrong in {"no labels", "an unknown type"}:
        said = [replace(a, action=None, label_type=None) for a in field.alerts()[:3]]
        if wrong == "an unknown type":
            said = [replace(a, action="confirm", label_type="gearbox") for a in said]
        lakes.write_lake(
            str(tmp_path / "lake"), [s for a in said for s in lakes.around(field.driven[a.vehicle_id], 9, a)]
        )
        asyncio.run(lakes.write_store(f"sqlite:///{tmp_path / 's.db'}", said))
        places = replace(places, lake=str(tmp_path / "lake"), database=f"sqlite:///{tmp_path / 's.db'}")
    elif wrong == "the champion's folder":
        places = replace(places, output=field.champion)
    elif wrong == "a parent of the champion's":
        places = replace(places, output=field.folder)
    elif wrong == "no champion":
        places = replace(places, champion=tmp_path / "none")
    else:
        for folder in ("datasets", "models"):
            shutil.copytree(getattr(field, "data" if folder == "datasets" else "champion"), tmp_path / folder)
        places = replace(places, data=tmp_path / "datasets", champion=tmp_path / "models")
        _spoil(wrong, places)
    before = contents(field.champion) | contents(field.data)
    with pytest.raises(error) as caught:
        run(places)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(field.champion) | contents(field.data) == before


def _spoil(wrong: str, places: Places) -> None:
    record, info = places.champion / "training.json", places.data / "dataset.json"
    training, dataset = json.loads(record.read_text()), json.loads(info.read_text())
    if wrong == "another feature set":
        training["features_sha256"] = "0" * 64
    elif wrong == "a dataset that the champion learned from":
        tested = next(v for v, split in dataset["split"].items() if split == TEST)
        training["split"][tested] = TRAIN
    elif wrong == "an appended dataset":
        dataset["counters"]["lake.windows"] = 7
    else:
        booster = places.champion / "lgbm_failure_predictor.txt"
        booster.write_bytes(booster.read_bytes()[:400])
    record.write_text(json.dumps(training))
    info.write_text(json.dumps(dataset))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["fleet-cloud", "retrain", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def test_a_database_that_is_not_there_ends_with_one_line_and_makes_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "--database", f"sqlite:///{tmp_path / 'none.db'}") == 69
    assert "is not there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_database_server_that_is_away_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--if-due", "--database", "postgresql://anna:secret@127.0.0.1:9/fleet") == 69
    error = capsys.readouterr().err
    assert error.startswith("fleet-cloud: error: store postgresql")
    assert "secret" not in error
    assert error.count("\n") == 1


def test_if_due_ends_well_and_trains_nothing_when_nothing_is_due(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    asyncio.run(lakes.write_store(url, []))
    assert call(monkeypatch, "--if-due", "--database", url, "--output", str(tmp_path / "out")) == 0
    told = capsys.readouterr().out
    assert "nothing is due" in told
    for trigger in ("drift_alerts", "age_days", "new_samples", "performance_drop"):
        assert trigger in told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_prints_the_verdict_and_records_the_run(
    little: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = json.loads((Path(command.__file__).parent / "config.json").read_text())
    small["autoencoder"] |= {"epochs": 3, "least_steps": 60}
    (tmp_path / "config.json").write_text(json.dumps(small))
    code = call(
        monkeypatch, "--config", str(tmp_path / "config.json"), "--data", str(little.data), "--models",
        str(little.champion), "--lake", little.lake, "--database", little.database, "--output", str(tmp_path / "out"),
    )  # fmt: skip
    told = capsys.readouterr().out
    assert code == 0
    assert "verdict: champion" in told
    assert "PR-AUC over the failure types" in told
    report = json.loads((tmp_path / "out" / "retraining_report.json").read_text())

    async def recorded():
        store = FleetStore.over(little.database)
        async with store.reading() as connection:
            found = await last_training_run(connection)
        await store.close()
        return found

    kept = asyncio.run(recorded())
    assert kept is not None
    assert (kept.verdict, kept.frozen_sha256, kept.labels) == ("champion", report["frozen"]["sha256"], 2)
    assert json.loads(kept.report) == report


@pytest.mark.slow
def test_a_store_that_went_away_meanwhile_costs_the_row_not_the_report(
    little: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    database = tmp_path / "fleet.db"
    shutil.copyfile(little.database.removeprefix("sqlite:///"), database)
    small = json.loads((Path(command.__file__).parent / "config.json").read_text())
    small["autoencoder"] |= {"epochs": 3, "least_steps": 60}
    (tmp_path / "config.json").write_text(json.dumps(small))
    written = retrain_command.record

    async def lost(url: str, run: object) -> int:
        database.with_name("fleet.db-wal").unlink(missing_ok=True)
        database.with_name("fleet.db-shm").unlink(missing_ok=True)
        database.write_bytes(b"no database " * 1000)
        return await written(url, run)  # type: ignore[arg-type]

    monkeypatch.setattr(retrain_command, "record", lost)
    monkeypatch.setattr(retrain_command, "PAUSE_S", 0.01)
    code = call(
        monkeypatch, "--config", str(tmp_path / "config.json"), "--data", str(little.data), "--models",
        str(little.champion), "--lake", little.lake, "--database", f"sqlite:///{database}", "--output",
        str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 69
    assert "its report stays" in capsys.readouterr().err
    assert (tmp_path / "out" / "retraining_report.json").is_file()

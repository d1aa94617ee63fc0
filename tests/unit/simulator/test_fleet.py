"""What `firmware-sim generate` writes."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES
from firmware_sim import fleet, sensors, vehicle
from firmware_sim.fleet import FleetSpec
from firmware_sim.sensors import CATALOGUE, VECTOR_EVERY_S

SPEC = FleetSpec(vehicles=17, days=2, hours=0.5, seed=7, faulty=0.9)


def quiet(_done: int, _frames: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    fleet.generate(SPEC, folder, workers=1, on_progress=quiet)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_the_same_seed_gives_the_same_files_whatever_the_number_of_workers(written: Path, tmp_path: Path) -> None:
    fleet.generate(SPEC, tmp_path, workers=2, on_progress=quiet)
    assert len(fleet.batches(SPEC)) > 1, "two workers have something to share"
    assert digests(tmp_path) == digests(written)


def test_another_seed_gives_another_fleet(written: Path, tmp_path: Path) -> None:
    other = FleetSpec(vehicles=1, days=1, hours=0.5, seed=8)
    fleet.generate(other, tmp_path, workers=1, on_progress=quiet)
    name = "raw_frames/vehicle_id=EV_0001/part-0.parquet"
    assert digests(tmp_path)[name] != digests(written)[name]


def test_a_vehicle_has_a_file_with_every_signal_at_one_hertz_and_its_cells_every_ten_seconds(written: Path) -> None:
    about = {v["vehicle_id"]: v for v in pq.read_table(written / "vehicles.parquet").to_pylist()}
    assert len(about) == SPEC.vehicles
    for name, row in about.items():
        # ParquetFile: read_table would take the folder's name for a column
        table = pq.ParquetFile(written / "raw_frames" / f"vehicle_id={name}" / "part-0.parquet").read()
        assert table.column_names == [
            "time",
            *(s.name for s in CATALOGUE.scalars),
            *(s.name for s in CATALOGUE.vectors),
        ]
        time_s = table["time"].to_numpy()
        steps = np.diff(time_s)
        assert (steps >= 1).all()
        assert (steps > 1).sum() <= SPEC.days * fleet.PERIODS - 1, "a gap is a night, nothing else"
        widths = {"cell_voltage": row["cells"], "cell_temperature": row["probes"]}
        for signal in CATALOGUE.vectors:
            present = table[signal.name].is_valid().to_numpy(zero_copy_only=False)
            assert present.sum() == len(time_s) // VECTOR_EVERY_S
            assert {len(v) for v in table[signal.name].drop_null().to_pylist()} == {widths[signal.role]}


def test_the_labels_say_when_each_severity_was_reached(written: Path) -> None:
    labels = pq.read_table(written / "labels.parquet").to_pylist()
    assert len(labels) == round(SPEC.faulty * SPEC.vehicles)
    assert {row["failure_type"] for row in labels} == set(FAILURE_TYPES), "the types take turns"
    for row in labels:
        reached = [row[f"{s}_s"] for s in SEVERITIES]
        known = [t for t in reached if t is not None]
        assert reached[: len(known)] == known, "no severity is reached before the one below it"
        assert [row["onset_s"], *known] == sorted([row["onset_s"], *known])
        assert all(fleet.START_S <= t <= SPEC.end_s for t in [row["onset_s"], *known, row["end_s"]])
        assert row["failure_s"] is None or row["failure_s"] >= row["onset_s"]
        if not row["predictable"]:
            assert row["failure_type"] == "thermal_runaway_risk"
            assert row["onset_s"] == row["failure_s"]


def test_the_three_regimes_of_a_thermal_runaway_are_all_there() -> None:
    spec = FleetSpec(vehicles=40, days=5, hours=1.0, seed=2, faulty=0.5)
    regimes = {}
    for number, assigned in fleet.assign(spec).items():
        made = fleet.build_vehicle(spec, number, assigned)
        if made.episode and made.episode.failure_type == "thermal_runaway_risk":
            regimes[made.episode.regime] = made.episode.failure_s - made.episode.onset_s
    assert regimes["none"] == 0
    assert 300 <= regimes["minutes"] <= 1500
    assert regimes["days"] > 3600


def test_a_vehicle_that_burnt_down_sends_no_more(written: Path) -> None:
    lost = [r for r in pq.read_table(written / "labels.parquet").to_pylist() if r["failure_type"].startswith("thermal")]
    assert lost
    for row in lost:
        path = written / "raw_frames" / f"vehicle_id={row['vehicle_id']}" / "part-0.parquet"
        last = pq.ParquetFile(path).read(["time"])["time"].to_numpy()[-1]
        assert row["failure_s"] < last < row["failure_s"] + SPEC.period_s


def test_no_failure_type_belongs_to_one_make() -> None:
    spec = FleetSpec(vehicles=60, days=5, hours=1.5, seed=1, faulty=0.5)
    makes: dict[str, set[str]] = {}
    for number, assigned in fleet.assign(spec).items():
        makes.setdefault(assigned[0], set()).add(fleet.build_vehicle(spec, number, assigned).make.name)
    assert all(len(names) >= 2 for names in makes.values()), makes


def test_the_fleet_has_old_healthy_packs_trailers_mountains_heat_and_cold() -> None:
    fleet_of = [vehicle.build(1, n, f"EV_{n:04d}") for n in range(1, 101)]
    assert any(v.soh < 0.85 for v in fleet_of)
    assert any(v.style.towing > 0 for v in fleet_of)
    assert any(v.style.hilliness > 2 for v in fleet_of)
    assert any(v.climate.heat_wave[2] > 0 for v in fleet_of)
    assert min(v.climate.mean_c for v in fleet_of) < 0
    assert max(v.climate.mean_c for v in fleet_of) > 25
    assert {v.make.cells for v in fleet_of} == {87, 96, 108}


def test_sensors_misbehave_in_all_their_ways() -> None:
    """Wrong values, frozen ones, one signal missing, all silent: hard negatives, at known places."""
    made = vehicle.build(1, 1, "EV_0001")
    spec = FleetSpec(vehicles=1, days=1, hours=1.0, seed=1, faulty=0.0)
    base = next(fleet.simulate(spec, [made]))[0]
    assert base is not None
    planned = sensors.plan_artefacts(np.random.default_rng(0), 0.0, 3600 * 50)
    assert {a.kind for a in planned} == {"wrong", "frozen", "missing", "silent"}
    scalars = base.scalars.astype(float)
    t = np.arange(len(scalars), dtype=float)
    before = scalars.copy()
    reader = sensors.Sensors(made)
    reader._misbehave(
        scalars,
        t,
        [
            sensors.Artefact("wrong", 0, 10, 11, 123.0),
            sensors.Artefact("frozen", 3, 20, 60),
            sensors.Artefact("missing", 4, 20, 30),
            sensors.Artefact("silent", -1, 100, 110),
        ],
    )
    assert scalars[10, 0] == 123.0
    assert (scalars[20:60, 3] == before[19, 3]).all()
    assert np.isnan(scalars[20:30, 4]).all()
    assert np.isnan(scalars[100:110]).all()
    assert np.isfinite(scalars[110]).any()


def test_a_smaller_fleet_inherits_no_vehicle_of_a_larger_one(tmp_path: Path) -> None:
    for vehicles in (3, 1):
        spec = FleetSpec(vehicles=vehicles, days=1, hours=0.1, seed=1)
        fleet.generate(spec, tmp_path, workers=1, on_progress=quiet)
        (tmp_path / "raw_frames" / "mine.txt").write_text("not the generator's")
        assert len(list((tmp_path / "raw_frames").glob("vehicle_id=*"))) == vehicles
    assert (tmp_path / "raw_frames" / "mine.txt").exists()


def test_generation_json_says_how_to_make_the_same_again(written: Path) -> None:
    about = json.loads((written / "generation.json").read_text())
    again = FleetSpec(**{k: about[k] for k in ("vehicles", "days", "hours", "seed", "faulty")})
    assert again == SPEC
    assert about["severity_levels"]["inverter_overheating"]["solder"]["inverter_resistance_factor"][0] == 1.0


def test_an_output_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnavailableError, match="cannot write to") as error:
        fleet.generate(SPEC, tmp_path / "file", workers=1, on_progress=quiet)
    assert "\n" not in str(error.value)

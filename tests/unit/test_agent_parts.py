"""Configuration, clock, saved state and log lines: the agent's small parts."""

import json
import logging
from pathlib import Path

import pytest

from edge_agent import health, logs
from edge_agent.clock import RELEASE_FLOOR_S, ScaledClock, SystemClock, TimeFloor, from_iso
from edge_agent.config import load_config, parse_config
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.messages import Current, decode_current, decode_status
from edge_agent.pipeline.alerts import iso
from edge_agent.reporting import retained_current

GOOD = """
vehicle_id = "EV_1"
data_dir = "data"
[source]
mapping = "m.toml"
dbc = "/etc/v.dbc"
interface = "socketcan"
channel = "can0"
"""


class FakeClock:
    def __init__(self, wall_s: float = 1.8e9, monotonic_s: float = 100.0) -> None:
        self.wall_s, self.monotonic_s = wall_s, monotonic_s
        self.boot_id, self.trusted_rate = "boot", True

    def wall(self) -> float:
        return self.wall_s

    def monotonic(self) -> float:
        return self.monotonic_s


def test_paths_are_relative_to_the_configuration() -> None:
    config = parse_config(GOOD, "c.toml", Path("/srv/agent"))
    assert (config.data_dir, config.source.mapping, config.source.dbc) == ("/srv/agent/data", "/srv/agent/m.toml",
                                                                          "/etc/v.dbc")  # fmt: skip
    assert config.bundle == ""
    assert config.mqtt.port == 1883


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[source]", "[sorce]"), "unknown key 'sorce'; did you mean 'source'?"),
        (("channel", "chanel"), "unknown key 'source.chanel'; did you mean 'channel'?"),
        (('data_dir = "data"', ""), "missing required field `data_dir`"),
        (('"EV_1"', "7"), r"Expected `str`, got `int` - at `$.vehicle_id`"),
        (('"EV_1"', '"../x"'), "is not allowed"),
        (('"EV_1"', '"'), "not valid TOML"),
        (("[source]", "speed = 0\n[source]"), "speed"),
    ],
)
def test_a_typo_is_refused_with_the_nearest_key(change: tuple[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(GOOD.replace(*change), "c.toml", Path("/"))
    assert says in str(error.value)
    assert str(error.value).startswith("config c.toml: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["ca", "certificate", "key"])
def test_a_missing_file_of_tls_is_refused_with_its_key(tmp_path: Path, key: str) -> None:
    for name in {"ca", "certificate", "key"} - {key}:
        (tmp_path / f"{name}.pem").touch()
    path = tmp_path / "agent.toml"
    path.write_text(GOOD + '[mqtt]\nca = "ca.pem"\ncertificate = "certificate.pem"\nkey = "key.pem"\n')
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"config {path}: mqtt.{key} {tmp_path / key}.pem: no such file"
    (tmp_path / f"{key}.pem").touch()
    assert load_config(path).mqtt.ca == str(tmp_path / "ca.pem")


def test_a_scaled_clock_keeps_wall_and_monotonic_in_step_and_is_never_trusted() -> None:
    base = FakeClock()
    scaled = ScaledClock(base, 60.0)
    offset = scaled.wall() - scaled.monotonic()
    base.monotonic_s += 10
    assert scaled.monotonic() == pytest.approx(700.0)
    assert scaled.wall() - scaled.monotonic() == pytest.approx(offset)
    assert not scaled.trusted_rate
    assert ScaledClock(base, 1.0).trusted_rate


def test_the_system_clock_knows_its_boot_and_never_runs_backwards() -> None:
    clock = SystemClock()
    times = [clock.monotonic() for _ in range(100)]
    assert times == sorted(times)
    assert len(clock.boot_id) >= 32


def test_a_clock_of_1970_is_not_trusted() -> None:
    floor = TimeFloor()
    assert not floor.trusts(5.0, 5.0)
    assert floor.trusts(RELEASE_FLOOR_S + 1, 5.0)


def test_the_floor_rises_by_a_peers_time_and_never_falls() -> None:
    floor = TimeFloor()
    floor.heard(RELEASE_FLOOR_S + 1e7, 50.0)
    floor.heard(RELEASE_FLOOR_S, 60.0)
    assert floor.floor_s == RELEASE_FLOOR_S + 1e7
    assert not floor.trusts(RELEASE_FLOOR_S + 5, 65.0)


def test_a_step_of_the_wall_clock_ends_its_trust_at_once() -> None:
    floor, now = TimeFloor(), RELEASE_FLOOR_S + 1e7
    floor.heard(now, 100.0)
    assert floor.trusts(now + 10, 110.0)
    assert not floor.trusts(now + 10 + 2 * 86_400, 110.0)
    assert not floor.trusts(now + 10 - 2 * 86_400, 110.0)


def test_iso_times_go_there_and_back() -> None:
    assert iso(0.0004) == "1970-01-01T00:00:00.000Z"
    assert iso(1_800_000_000.9996) == "2027-01-15T08:00:01.000Z"
    assert from_iso("2027-01-15T08:00:01.000Z") == 1_800_000_001.0
    with pytest.raises(ValueError, match="no zone"):
        from_iso("2027-01-15T08:00:01")


def saved(**changes: object) -> health.SavedState:
    state = {"timeline": "boot-1", "saved_s": 1000.0, "wall_offset_s": 5000.0, "floor_s": 0.0, "active": {},
             "pipeline": b"bytes"}  # fmt: skip
    return health.SavedState(**{**state, **changes})  # type: ignore[arg-type]


def test_the_saved_state_comes_back_whole_or_not_at_all(tmp_path: Path) -> None:
    assert health.load_state(tmp_path) is None
    current = Current(alert_id="a", failure_type="charging_fault", severity="low", since="s", time="t")
    state = saved(active={"charging_fault|guard": current})
    health.save_state(tmp_path, state)
    assert health.load_state(tmp_path) == state
    whole = (tmp_path / health.STATE_FILE).read_bytes()
    for cut in range(0, len(whole), 7):
        (tmp_path / health.STATE_FILE).write_bytes(whole[:cut])
        assert health.load_state(tmp_path) is None
    for flip in range(len(whole)):
        (tmp_path / health.STATE_FILE).write_bytes(whole[:flip] + bytes([whole[flip] ^ 1]) + whole[flip + 1 :])
        assert health.load_state(tmp_path) is None


def test_saved_times_move_to_the_new_boots_timeline_and_never_into_the_future() -> None:
    # saved at wall 6000; now another boot, 40 s old, wall 6100
    assert health.shift_s(saved(), timeline="boot-2", now_s=40.0, wall_offset_s=6060.0) == -1060.0
    assert health.shift_s(saved(), timeline="boot-1", now_s=1010.0, wall_offset_s=5000.0) == 0.0
    # a wall clock that begins in 1970 again: what was saved is at the latest now
    assert health.shift_s(saved(), timeline="boot-2", now_s=40.0, wall_offset_s=0.0) == -960.0


def test_the_last_will_says_offline_and_nothing_else() -> None:
    status = decode_status(health.offline("boot"))
    assert (status.state, status.boot_id) == ("offline", "boot")
    assert set(json.loads(health.offline("boot"))) <= {"state", "boot_id", "schemaversion", "time", "clock_trusted"}


def test_current_says_the_most_severe_of_model_and_guard_and_clears_with_the_last() -> None:
    def current(severity: str) -> Current:
        return Current(alert_id=severity, failure_type="thermal_runaway_risk", severity=severity,  # type: ignore[arg-type]
                       since="s", time="t")  # fmt: skip

    active = {"thermal_runaway_risk|model": current("low"), "thermal_runaway_risk|guard": current("critical")}
    assert decode_current(retained_current(active, "thermal_runaway_risk")).severity == "critical"
    del active["thermal_runaway_risk|guard"]
    assert decode_current(retained_current(active, "thermal_runaway_risk")).severity == "low"
    assert retained_current(active, "charging_fault") == b""


def test_a_log_line_is_one_line_and_splits_back_into_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logs.configure("text")
    logs.event(logger.getChild("x"), "alert", type="a", detail='two\nlines "quoted"', p=0.123456, none=None)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert line.rstrip().split(" ", 3)[1:] == ["info", "alert", 'type=a detail="two\\nlines \\"quoted\\"" p=0.1235']
    logs.configure("json")
    logs.event(logger, "alert", level=logging.WARNING, type="a")
    assert json.loads(capsys.readouterr().out).items() >= {"event": "alert", "level": "warning", "type": "a"}.items()
    logger.handlers.clear()
    logger.propagate = True

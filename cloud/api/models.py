"""The bodies of the API, with the words and examples that the OpenAPI page shows.

JSON has no NaN: a number that is not known is null, both ways. NaN, Infinity and numbers too large for a double are
refused on the way in (422) and become null on the way out.
"""

import math
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from edge_agent.contract.topics import VEHICLE_ID

MAX_CELLS = 1_024  # the largest packs have some 200 in series; trucks some 400
MAX_SIGNALS = 512
LATEST_TIME_S = 1e11  # as the pipeline's: milliseconds taken for seconds
EXAMPLE_FRAME: dict[str, Any] = {
    "time": "2026-03-01T08:30:00Z",
    "signals": {
        "Vehicle.Speed": 52.4,
        "Vehicle.Powertrain.TractionBattery.CurrentVoltage": 371.2,
        "Vehicle.Powertrain.TractionBattery.CurrentCurrent": -38.5,
        "Vehicle.Powertrain.Inverter.Temperature": None,
    },
    "cell_voltage": [3.861, 3.859, None],
    "cell_temperature": [24.5, 25.0],
}
EXAMPLE_BATCH: dict[str, Any] = {"vehicle_id": "EV_001", "make": "sim", "period_s": 1.0, "frames": [EXAMPLE_FRAME]}
EXAMPLE_SINGLE: dict[str, Any] = {
    "vehicle_id": "EV_001", "time": 1772353800.0, "signals": {"Vehicle.Speed": 52.4},
}  # fmt: skip


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, bool) else value


def _time(value: Any) -> Any:
    if isinstance(value, str):
        text = value[:-1] + "+00:00" if value.endswith(("Z", "z")) else value
        try:
            read = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError("must be an ISO 8601 time, as 2026-03-01T08:30:00Z, or Unix seconds") from None
        seconds = (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf
    else:
        raise ValueError("must be an ISO 8601 time, as 2026-03-01T08:30:00Z, or Unix seconds")  # noqa: TRY004 - pydantic's
    if not 0 <= seconds <= LATEST_TIME_S:
        raise ValueError("must lie between 1970 and the year 5138; Unix times are in seconds, not milliseconds")
    return seconds


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be printable characters: no NUL, no line end, no control character")
    return value


# true and false are 1 and 0 (is charging, cable connected); text is no number
Number = Annotated[float | None, BeforeValidator(_number), WithJsonSchema({"type": ["number", "boolean", "null"]})]
FrameTime = Annotated[
    float,
    BeforeValidator(_time),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "number", "minimum": 0, "maximum": 1e11}]}
    ),
]
Values = Annotated[list[Number], Field(max_length=MAX_CELLS)]
VehicleId = Annotated[str, Field(pattern=f"^{VEHICLE_ID.pattern}$", examples=["EV_001"])]


class Request(BaseModel):
    """Base of what comes in: strict types, no unknown field, only finite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, regex_engine="python-re")


class Frame(Request):
    """One instant of a vehicle. What did not arrive is left out or null; nothing has to be there in every frame."""

    time: FrameTime = Field(description="When it was measured: ISO 8601 (UTC if it names no zone) or Unix seconds.")
    signals: Annotated[dict[str, Number], Field(max_length=MAX_SIGNALS)] = Field(
        default={},
        description="Values by the catalogue's names (COVESA VSS), in its units; current is positive INTO the battery.",
    )
    cell_voltage: Values = Field(default=[], description="Every cell, volt, always in the same order; null = no value.")
    cell_temperature: Values = Field(default=[], description="Every probe, degrees Celsius; null = no value.")


class Telemetry(Request):
    """Raw frames of one vehicle: a list in `frames`, or one frame's fields at the top level."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_BATCH, EXAMPLE_SINGLE]})

    vehicle_id: VehicleId
    make: Annotated[str, Field(max_length=64), AfterValidator(_printable)] | None = Field(
        default=None, description="Chooses nothing yet; shown back."
    )
    period_s: Annotated[float, Field(gt=0, le=3_600)] | None = Field(
        default=None, description="How often this vehicle reports; 1 s unless said. Coverage counts against it."
    )
    frames: list[Frame] = Field(default=[], description="In any order; the same time twice counts once.")
    time: FrameTime | None = None
    signals: Annotated[dict[str, Number], Field(max_length=MAX_SIGNALS)] | None = None
    cell_voltage: Values | None = None
    cell_temperature: Values | None = None

    @property
    def inline(self) -> bool:
        """Whether the one frame's fields stand at the top level."""
        return self.time is not None

    @model_validator(mode="after")
    def _one_way(self) -> "Telemetry":
        inline = [n for n in ("time", "signals", "cell_voltage", "cell_temperature") if getattr(self, n) is not None]
        if self.frames and inline:
            raise ValueError(f"give either frames or one frame's own fields, not both ({inline[0]} is there too)")
        if not self.frames:
            if self.time is None:
                raise ValueError("frames is empty, and there is no time at the top level for a single frame")
            self.frames = [
                Frame.model_construct(
                    time=self.time, signals=self.signals or {}, cell_voltage=self.cell_voltage or [],
                    cell_temperature=self.cell_temperature or [],
                )
            ]  # fmt: skip
        return self


class Answer(BaseModel):
    """Base of what goes out: no NaN, no infinity, whatever a number was computed by."""

    model_config = ConfigDict(ser_json_inf_nan="null", protected_namespaces=())


class Service(Answer):
    """The health check: the process answers."""

    service: str = Field(examples=["voltwatch"])
    version: str = Field(examples=["0.1.0"])
    status: Literal["ok"] = "ok"
    docs: str = Field(examples=["/docs"])
    health: str = Field(examples=["/health"])


class StoreHealth(Answer):
    """The database."""

    ok: bool
    name: str = Field(examples=["sqlite+aiosqlite:///var/voltwatch.db"])
    detail: str = ""
    newest_ingest_id: int | None = Field(default=None, description="Of the newest event; grows with every one stored.")


class BrokerHealth(Answer):
    """The MQTT collector of this process."""

    configured: bool
    connected: bool
    address: str = ""
    protocol: str = Field(default="", examples=["MQTT 5"])
    connected_since: str | None = None
    detail: str = Field(default="", description="Why it is not connected or commits nothing, or soon will not.")


class BundleHealth(Answer):
    """The model bundle that scores frames which come over HTTP."""

    loaded: bool
    release: int | None = None
    name: str = ""
    sha256: str = ""
    heads: list[str] = []
    detail: str = Field(default="", examples=["no bundle: guards only"])


class LakeHealth(Answer):
    """The lake that samples for training are moved into. While it cannot be used they wait in the store."""

    ok: bool
    name: str = Field(examples=["var/lake", "s3://fleet/lake"])
    detail: str = ""
    files: int | None = Field(default=None, description="null until it was looked at.")
    bytes: int | None = None


class RefusedCount(Answer):
    """Messages refused for one reason, with the newest example."""

    reason: str = Field(examples=["malformed"])
    count: int
    last_time: str
    last_topic: str
    last_detail: str


class Health(Answer):
    """Everything about this process: `ok`, `degraded` (it works, and `problems` says what is missing) or `down`."""

    status: Literal["ok", "degraded", "down"]
    problems: list[str] = Field(examples=[["broker 127.0.0.1:1883: Connection refused"]])
    version: str
    time: str
    uptime_s: float
    store: StoreHealth
    broker: BrokerHealth
    bundle: BundleHealth
    lake: LakeHealth
    collector: dict[str, int] = Field(description="Counters of the collector since the process started.")
    telemetry: dict[str, int] = Field(description="Counters of frames over HTTP and WebSocket since the start.")
    refused: list[RefusedCount] = Field(description="MQTT messages refused, ever.")
    parked: int = Field(description="Messages of a newer major version, kept until a release understands them.")
    losses: dict[str, int] = Field(description="Loss records of the vehicles, and how many messages they name.")


class WindowProgress(Answer):
    """How far the coming window is. The first score needs a whole one: 300 s unless the bundle says otherwise."""

    length_s: float = Field(examples=[300.0])
    filled_s: float = Field(examples=[184.0], description="So much of the coming window has passed.")
    remaining_s: float = Field(examples=[116.0], description="Seconds of telemetry until the next score.")
    stride_s: float = Field(examples=[60.0], description="After the first, a score comes every so many seconds.")


class TypePrediction(Answer):
    """One failure type: its calibrated probability, where it raises, and how severe it would be."""

    probability: float | None
    raise_at: float | None = None
    severity: dict[str, float | None] = {}


class Prediction(Answer):
    """The scores of one window."""

    time: str = Field(examples=["2026-03-01T08:35:00.000Z"], description="The newest frame of the window.")
    failure_probability: float | None = Field(description="null where the bundle has no such head.")
    types: dict[str, TypePrediction] = {}
    anomaly_score: float | None = None
    worst_cell: int | None = Field(default=None, description="0-based.")
    worst_cell_deviation_v: float | None = None
    stratum: str = Field(examples=["driving"])
    coverage: float | None = Field(examples=[0.98], description="Share of the expected frames that came.")
    model_release: int | None


class NoScoreOut(Answer):
    """A window without a score, and why."""

    time: str
    reason: str = Field(examples=["low_coverage"])
    detail: str


class Evidence(Answer):
    """One reason for an alert."""

    name: str
    value: float | None = None
    deviation: float | None = Field(default=None, description="How far from normal, in robust standard deviations.")
    unit: str = ""


class AlertOut(Answer):
    """A change of an alert that these frames caused."""

    alert_id: str
    transition: Literal["raised", "escalated", "cleared"]
    failure_type: str
    severity: Literal["low", "medium", "high", "critical"]
    origin: Literal["model", "guard"]
    rule: str = ""
    since: str
    time: str
    model_release: int | None = None
    evidence: list[Evidence] = []


class TelemetryReply(Answer):
    """What became of the frames."""

    vehicle_id: str
    frames_accepted: int = Field(description="Without those that came too late or were sent again: see `notes`.")
    window: WindowProgress
    prediction: Prediction | None = Field(description="Of the newest window scored by these frames; null if none was.")
    predictions: int = Field(description="How many windows these frames scored.")
    no_scores: list[NoScoreOut] = []
    alerts: list[AlertOut] = []
    notes: list[str] = Field(default=[], examples=[["no bundle: guards only, nothing is predicted"]])


class SocketError(Answer):
    """The answer to a message on the socket that could not be used; the socket stays open."""

    error: dict[str, Any] = Field(description="The same problem that a post would be answered with.")


class OpenAlert(Answer):
    """An alert that is not cleared."""

    alert_id: str
    failure_type: str
    severity: str
    state: str
    origin: str
    since: str


class Model(Answer):
    """What scores this vehicle."""

    release: int | None
    name: str = ""
    sha256: str = ""


class Vehicle(Answer):
    """One vehicle as it was last heard of."""

    vehicle_id: str
    state: Literal["online", "offline", "unknown"]
    channel: Literal["mqtt", "http"]
    make: str = ""
    source: str = ""
    first_seen: str
    last_seen: str = Field(description="On the server's clock.")
    last_arrival: str | None = Field(description="The newest telemetry, on the vehicle's clock.")
    clock_trusted: bool
    model: Model
    scores: dict[str, float | None] = Field(description="Of the newest window.")
    state_of_charge_percent: float | None = None
    problems: list[str] = []
    counters: dict[str, int] = {}
    outbox: dict[str, int] = Field(default={}, description="Messages waiting in the vehicle, by stream.")
    open_alerts: list[OpenAlert] = []


class VehiclePage(Answer):
    """A page of vehicles, by id. `next` is the cursor of the following page, null on the last."""

    vehicles: list[Vehicle]
    next: str | None = None


class Work(Answer):
    """Where the work about an alert stands, and the label that people gave it."""

    state: Literal["new", "acknowledged", "confirmed", "false_alarm", "resolved"] = Field(
        default="new", description="new: nobody has looked at it."
    )
    verdict: Literal["confirmed", "false_alarm"] | None = Field(
        default=None, description="The label; it stays when the work is resolved."
    )
    failure_type: str | None = Field(default=None, description="What it really was, where a person corrected the type.")
    severity: str | None = Field(default=None, description="How severe it really was, where a person corrected it.")
    updated: str | None = Field(default=None, description="The newest action; server time.")
    possible: list[str] = Field(default=[], examples=[["acknowledge", "confirm", "false-alarm"]])


class Alert(Answer):
    """One alert, folded from its transitions. `received` and `updated` are server time, the rest the vehicle's."""

    alert_id: str
    vehicle_id: str
    failure_type: str
    severity: str
    state: Literal["raised", "escalated", "cleared"]
    origin: Literal["model", "guard"]
    rule: str = ""
    since: str = Field(description="When the first window or arrival showed it; the vehicle's clock.")
    time: str = Field(description="The newest transition; the vehicle's clock.")
    cleared: str | None
    received: str = Field(description="When the server stored its first transition.")
    updated: str = Field(description="When the server stored its newest transition.")
    ingest_id: int = Field(description="Order of arrival at the server, which lists are in.")
    transitions: int
    clock_trusted: bool = Field(description="False: the vehicle had no trusted clock, its times may be anything.")
    replayed: bool = Field(description="Told later than it happened: a backlog or a recording.")
    model_release: int | None
    model_name: str = ""
    failure_probability: float | None = None
    type_probability: float | None = None
    severity_probability: dict[str, float | None] = {}
    anomaly_score: float | None = None
    worst_cell: int | None = None
    worst_cell_deviation_v: float | None = None
    evidence: list[Evidence] = []
    work: Work


class AlertPage(Answer):
    """A page of alerts, newest arrival first. `next` is the cursor of the following page, null on the last."""

    alerts: list[Alert]
    next: str | None = None


class TypeThreshold(Answer):
    """Hysteresis of one failure type."""

    raise_at: float | None
    clear_below: float | None


class DecisionRule(Answer):
    """How windows become an alert."""

    k: int = Field(description="Windows over the threshold …")
    n: int = Field(description="… of the last so many.")
    clear_windows: int
    cooldown_s: float = Field(description="Pause before the same alert again; a rise in severity always passes.")


class Policy(Answer):
    """Thresholds that one stated policy gives, with what was measured for them on vehicles each head has not seen."""

    description: str
    failure: float | None
    anomaly: float | None
    types: dict[str, TypeThreshold]
    measured: dict[str, float | None] = {}


class ThresholdsOut(Answer):
    """The thresholds in force, and the other stated policies of the same bundle."""

    bundle: BundleHealth
    active: str | None = Field(examples=["false_alarm_budget"])
    types: dict[str, TypeThreshold] = Field(description="Of the policy in force, by failure type.")
    failure: float | None
    anomaly: float | None
    decision: DecisionRule | None
    policies: dict[str, Policy]

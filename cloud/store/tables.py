"""The tables, in SQLAlchemy Core. What they look like on disk is decided by the migrations; a test holds both together.

`*_at_s` is the server's clock in Unix seconds. `time`, `since` and the like are what the vehicle claimed, kept as text:
its clock may be anything, so nothing is ordered by them. Order is `ingest_id`, the order of commits.
"""

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)
# SQLite counts rows up by itself only for a column that is exactly INTEGER
Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
VehicleId = sa.String(64)

vehicle = sa.Table(
    "vehicle", metadata,
    sa.Column("vehicle_id", VehicleId, primary_key=True),
    sa.Column("first_seen_at_s", sa.Double, nullable=False),
    sa.Column("last_seen_at_s", sa.Double, nullable=False),
    sa.Column("channel", sa.String(16), nullable=False),  # how it reports: mqtt or http
    sa.Column("state", sa.String(16), nullable=False),  # online, offline or unknown
    sa.Column("make", sa.Text, nullable=False, server_default=""),
    sa.Column("source", sa.Text, nullable=False, server_default=""),
    sa.Column("model_release", sa.BigInteger),
    sa.Column("model_name", sa.Text, nullable=False, server_default=""),
    sa.Column("model_sha256", sa.Text, nullable=False, server_default=""),
    sa.Column("clock_trusted", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("last_arrival", sa.Text),  # the newest telemetry, on the vehicle's clock
    sa.Column("scores", sa.Text, nullable=False, server_default="{}"),  # JSON, of the newest window
    sa.Column("status", sa.Text, nullable=False, server_default="{}"),  # JSON: the rest of the newest status
)  # fmt: skip

event = sa.Table(
    "event", metadata,
    sa.Column("ingest_id", Id, primary_key=True, autoincrement=True),
    sa.Column("vehicle_id", VehicleId, nullable=False),
    sa.Column("stream_id", sa.String(128), nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("event_id", sa.String(128), nullable=False),
    sa.Column("type", sa.String(128), nullable=False),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("time", sa.String(40), nullable=False),
    sa.Column("boot_id", sa.String(128), nullable=False),
    sa.Column("clock_trusted", sa.Boolean, nullable=False),
    sa.Column("replayed", sa.Boolean, nullable=False),
    sa.Column("alert_id", sa.String(128)),
    sa.Column("received_at_s", sa.Double, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),  # the very bytes: unknown fields of a newer minor survive
    sa.UniqueConstraint("vehicle_id", "stream_id", "seq"),
    sa.Index(None, "vehicle_id", "alert_id"),
    sa.Index(None, "vehicle_id", "event_id"),
    sqlite_autoincrement=True,
)  # fmt: skip

# one row an alert, recomputed from its events whatever order they came in (cloud.store.alert_fold)
alert = sa.Table(
    "alert", metadata,
    sa.Column("vehicle_id", VehicleId, primary_key=True),
    sa.Column("alert_id", sa.String(128), primary_key=True),
    sa.Column("ingest_id", sa.BigInteger, nullable=False),  # of its first event here: paging stays stable
    sa.Column("last_ingest_id", sa.BigInteger, nullable=False),
    sa.Column("received_at_s", sa.Double, nullable=False),
    sa.Column("updated_at_s", sa.Double, nullable=False),
    sa.Column("failure_type", sa.String(128), nullable=False),
    sa.Column("origin", sa.String(16), nullable=False),
    sa.Column("rule", sa.Text, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # raised, escalated or cleared
    sa.Column("severity", sa.String(16), nullable=False),  # of the newest transition that was not its end
    sa.Column("since", sa.Text, nullable=False),
    sa.Column("time", sa.String(40), nullable=False),  # of the newest transition
    sa.Column("cleared_time", sa.String(40)),
    sa.Column("transitions", sa.Integer, nullable=False),
    sa.Column("clock_trusted", sa.Boolean, nullable=False),
    sa.Column("replayed", sa.Boolean, nullable=False),
    sa.Column("model_release", sa.BigInteger),
    sa.Column("model_name", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),  # JSON: the transition that shows most (the newest not its end)
    sa.Index(None, "ingest_id", unique=True),
    sa.Index(None, "vehicle_id", "state"),
    sa.Index(None, "alert_id"),  # an operator names an alert alone
)  # fmt: skip

current = sa.Table(
    "current", metadata,
    sa.Column("vehicle_id", VehicleId, primary_key=True),
    sa.Column("failure_type", sa.String(128), primary_key=True),
    sa.Column("alert_id", sa.String(128), nullable=False),
    sa.Column("severity", sa.String(16), nullable=False),
    sa.Column("received_at_s", sa.Double, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)  # fmt: skip

loss = sa.Table(
    "loss", metadata,
    sa.Column("ingest_id", sa.BigInteger, primary_key=True, autoincrement=False),  # of the event that told it
    sa.Column("vehicle_id", VehicleId, nullable=False),
    sa.Column("stream_id", sa.String(128), nullable=False),
    sa.Column("stream", sa.String(128), nullable=False),
    sa.Column("first_seq", sa.BigInteger, nullable=False),
    sa.Column("last_seq", sa.BigInteger),
    sa.Column("count", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.String(128), nullable=False),
    sa.Column("time", sa.String(40), nullable=False),
    sa.Index(None, "vehicle_id", "stream_id"),
)  # fmt: skip

# a newer major version: kept raw until a release that understands it; the vehicle is not told it arrived
parked = sa.Table(
    "parked", metadata,
    sa.Column("parked_id", Id, primary_key=True, autoincrement=True),
    sa.Column("vehicle_id", VehicleId, nullable=False),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("body_sha256", sa.String(64), nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("received_at_s", sa.Double, nullable=False),
    sa.UniqueConstraint("vehicle_id", "topic", "body_sha256"),
)  # fmt: skip

refused = sa.Table(
    "refused", metadata,
    sa.Column("reason", sa.String(64), primary_key=True),
    sa.Column("count", sa.BigInteger, nullable=False),
    sa.Column("last_topic", sa.Text, nullable=False),
    sa.Column("last_detail", sa.Text, nullable=False),
    sa.Column("last_payload", sa.LargeBinary, nullable=False),
    sa.Column("last_at_s", sa.Double, nullable=False),
)  # fmt: skip

# the pipeline of a vehicle whose raw frames come over HTTP or WebSocket: its one owner process stops and starts with it
pipeline_state = sa.Table(
    "pipeline_state", metadata,
    sa.Column("vehicle_id", VehicleId, primary_key=True),
    sa.Column("make", sa.Text, nullable=False),
    sa.Column("period_s", sa.Double, nullable=False),
    sa.Column("cells", sa.Integer, nullable=False),
    sa.Column("probes", sa.Integer, nullable=False),
    sa.Column("snapshot", sa.LargeBinary, nullable=False),
    sa.Column("updated_at_s", sa.Double, nullable=False),
)  # fmt: skip

# one row a stored drift event: where in time and against which bins its counts belong; the counts are in event.body
drift = sa.Table(
    "drift", metadata,
    sa.Column("ingest_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("vehicle_id", VehicleId, nullable=False),
    sa.Column("reference", sa.String(128), nullable=False),  # sha256 of the bins; a release unknown here waits for it
    sa.Column("model_release", sa.BigInteger, nullable=False),
    sa.Column("stratum", sa.String(16), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),  # the span's end by a trusted or replayed clock, else the arrival
    sa.Column("windows", sa.BigInteger, nullable=False),
    sa.Column("problem", sa.Text, nullable=False, server_default=""),  # why its counts are set aside; empty: counted
    sa.Index(None, "reference", "at_s"),
    sa.Index(None, "vehicle_id", "at_s"),
)  # fmt: skip

# the bins of every release that ever served here: counts of an old one stay readable
drift_reference = sa.Table(
    "drift_reference", metadata,
    sa.Column("reference", sa.String(64), primary_key=True),  # sha256, hex
    sa.Column("model_release", sa.BigInteger, nullable=False),
    sa.Column("model_name", sa.Text, nullable=False),
    sa.Column("window_spec", sa.Text, nullable=False),  # JSON of the contract's WindowSpec
    sa.Column("body", sa.LargeBinary, nullable=False),  # drift_reference.json, the very bytes
    sa.Column("first_seen_at_s", sa.Double, nullable=False),
)  # fmt: skip

# one row an episode: a variable of a vehicle, a make or the fleet that left its reference, until it came back
drift_alert = sa.Table(
    "drift_alert", metadata,
    sa.Column("drift_alert_id", Id, primary_key=True, autoincrement=True),
    sa.Column("scope", sa.String(16), nullable=False),  # vehicle, make or fleet
    sa.Column("scope_id", sa.Text, nullable=False),  # its id; empty for the fleet
    sa.Column("reference", sa.String(64), nullable=False),
    sa.Column("model_release", sa.BigInteger, nullable=False),
    sa.Column("stratum", sa.String(16), nullable=False),
    sa.Column("variable", sa.Text, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),  # signal, feature or score
    sa.Column("measure", sa.String(32), nullable=False),  # psi
    sa.Column("value", sa.Double, nullable=False),  # the newest while it is open
    sa.Column("threshold", sa.Double, nullable=False),
    sa.Column("windows", sa.BigInteger, nullable=False),
    sa.Column("vehicles", sa.Integer, nullable=False),
    sa.Column("raised_at_s", sa.Double, nullable=False),
    sa.Column("updated_at_s", sa.Double, nullable=False),
    sa.Column("cleared_at_s", sa.Double),
    sa.Index(None, "scope", "scope_id", "cleared_at_s"),
    sqlite_autoincrement=True,
)  # fmt: skip

sample = sa.Table(
    "sample", metadata,
    sa.Column("vehicle_id", VehicleId, primary_key=True),
    sa.Column("sample_id", sa.String(128), primary_key=True),
    sa.Column("ingest_id", sa.BigInteger, nullable=False),  # of its first part here
    sa.Column("reason", sa.String(16), nullable=False),  # alert or random
    sa.Column("alert_id", sa.String(128), nullable=False),
    sa.Column("failure_type", sa.String(128), nullable=False),
    sa.Column("stratum", sa.String(16), nullable=False),
    sa.Column("end_time", sa.String(40), nullable=False),
    sa.Column("clock_trusted", sa.Boolean, nullable=False, server_default=sa.false()),  # what `end_time` is worth
    sa.Column("elapsed_s", sa.Double, nullable=False),
    sa.Column("coverage", sa.Double, nullable=False),
    sa.Column("state_id", sa.String(128), nullable=False),
    sa.Column("model_release", sa.BigInteger),
    sa.Column("parts", sa.Integer, nullable=False),
    sa.Column("length", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("received_at_s", sa.Double, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # waiting (for parts), whole, lake, or broken
    sa.Column("detail", sa.Text, nullable=False, server_default=""),  # why it is broken
    sa.Column("lake_file", sa.Text, nullable=False, server_default=""),
    sa.Column("stored_at_s", sa.Double),  # in the lake
    sa.Index(None, "ingest_id", unique=True),
    sa.Index(None, "state", "stored_at_s"),
    sa.Index(None, "vehicle_id", "alert_id"),
)  # fmt: skip

# parts until their sample lies in the lake
sample_part = sa.Table(
    "sample_part", metadata,
    sa.Column("vehicle_id", VehicleId, primary_key=True),
    sa.Column("sample_id", sa.String(128), primary_key=True),
    sa.Column("part", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("ingest_id", sa.BigInteger, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
)  # fmt: skip

# who did what about an alert, and why: never changed, never removed
alert_action = sa.Table(
    "alert_action", metadata,
    sa.Column("action_id", Id, primary_key=True, autoincrement=True),
    sa.Column("vehicle_id", VehicleId, nullable=False),
    sa.Column("alert_id", sa.String(128), nullable=False),
    sa.Column("action", sa.String(16), nullable=False),  # acknowledge, confirm, false-alarm or resolve
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("failure_type", sa.String(128)),  # what it really was, where that differs
    sa.Column("severity", sa.String(16)),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Index(None, "vehicle_id", "alert_id"),
    sqlite_autoincrement=True,
)  # fmt: skip

# where an alert's work stands, folded from its actions (cloud.alert_work); no row: nobody has looked at it
alert_work = sa.Table(
    "alert_work", metadata,
    sa.Column("vehicle_id", VehicleId, primary_key=True),
    sa.Column("alert_id", sa.String(128), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),  # acknowledged, confirmed, false_alarm or resolved
    sa.Column("verdict", sa.String(16)),  # confirmed or false_alarm: the label; kept when it is resolved
    sa.Column("failure_type", sa.String(128)),  # the label's type and severity where a person corrected them
    sa.Column("severity", sa.String(16)),
    sa.Column("updated_at_s", sa.Double, nullable=False),
    sa.Index(None, "verdict"),
    sa.Index(None, "state"),
)  # fmt: skip

training_run = sa.Table(
    "training_run", metadata,
    sa.Column("run_id", Id, primary_key=True, autoincrement=True),
    sa.Column("started_at_s", sa.Double, nullable=False),
    sa.Column("finished_at_s", sa.Double, nullable=False),
    sa.Column("champion_release", sa.BigInteger),
    sa.Column("verdict", sa.String(32), nullable=False),  # challenger, or champion
    sa.Column("samples", sa.BigInteger, nullable=False),  # of the lake that it learned from
    sa.Column("labels", sa.BigInteger, nullable=False),  # of operators among them
    sa.Column("frozen_sha256", sa.String(64), nullable=False),  # the set that both were held against
    sa.Column("report", sa.Text, nullable=False),  # JSON: figures, reasons, where the models lie
    sa.Index(None, "finished_at_s"),
    sqlite_autoincrement=True,
)  # fmt: skip

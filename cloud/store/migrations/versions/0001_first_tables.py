"""First tables"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "alert",
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("alert_id", sa.String(length=128), nullable=False),
        sa.Column("ingest_id", sa.BigInteger(), nullable=False),
        sa.Column("last_ingest_id", sa.BigInteger(), nullable=False),
        sa.Column("received_at_s", sa.Double(), nullable=False),
        sa.Column("updated_at_s", sa.Double(), nullable=False),
        sa.Column("failure_type", sa.String(length=128), nullable=False),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("rule", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("severity", sa.String(length=16), nullable=False),
        sa.Column("since", sa.Text(), nullable=False),
        sa.Column("time", sa.String(length=40), nullable=False),
        sa.Column("cleared_time", sa.String(length=40), nullable=True),
        sa.Column("transitions", sa.Integer(), nullable=False),
        sa.Column("clock_trusted", sa.Boolean(), nullable=False),
        sa.Column("replayed", sa.Boolean(), nullable=False),
        sa.Column("model_release", sa.BigInteger(), nullable=True),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("vehicle_id", "alert_id", name=op.f("pk_alert")),
    )
    with op.batch_alter_table("alert", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_alert_ingest_id"), ["ingest_id"], unique=True)
        batch_op.create_index(batch_op.f("ix_alert_vehicle_id_state"), ["vehicle_id", "state"], unique=False)

    op.create_table(
        "current",
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("failure_type", sa.String(length=128), nullable=False),
        sa.Column("alert_id", sa.String(length=128), nullable=False),
        sa.Column("severity", sa.String(length=16), nullable=False),
        sa.Column("received_at_s", sa.Double(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("vehicle_id", "failure_type", name=op.f("pk_current")),
    )
    op.create_table(
        "event",
        sa.Column(
            "ingest_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("stream_id", sa.String(length=128), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("event_id", sa.String(length=128), nullable=False),
        sa.Column("type", sa.String(length=128), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("time", sa.String(length=40), nullable=False),
        sa.Column("boot_id", sa.String(length=128), nullable=False),
        sa.Column("clock_trusted", sa.Boolean(), nullable=False),
        sa.Column("replayed", sa.Boolean(), nullable=False),
        sa.Column("alert_id", sa.String(length=128), nullable=True),
        sa.Column("received_at_s", sa.Double(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("ingest_id", name=op.f("pk_event")),
        sa.UniqueConstraint("vehicle_id", "stream_id", "seq", name=op.f("uq_event_vehicle_id_stream_id_seq")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("event", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_event_vehicle_id_alert_id"), ["vehicle_id", "alert_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_event_vehicle_id_event_id"), ["vehicle_id", "event_id"], unique=False)

    op.create_table(
        "loss",
        sa.Column("ingest_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("stream_id", sa.String(length=128), nullable=False),
        sa.Column("stream", sa.String(length=128), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=True),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(length=128), nullable=False),
        sa.Column("time", sa.String(length=40), nullable=False),
        sa.PrimaryKeyConstraint("ingest_id", name=op.f("pk_loss")),
    )
    with op.batch_alter_table("loss", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_loss_vehicle_id_stream_id"), ["vehicle_id", "stream_id"], unique=False)

    op.create_table(
        "parked",
        sa.Column(
            "parked_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("received_at_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("parked_id", name=op.f("pk_parked")),
        sa.UniqueConstraint("vehicle_id", "topic", "body_sha256", name=op.f("uq_parked_vehicle_id_topic_body_sha256")),
    )
    op.create_table(
        "pipeline_state",
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("make", sa.Text(), nullable=False),
        sa.Column("period_s", sa.Double(), nullable=False),
        sa.Column("cells", sa.Integer(), nullable=False),
        sa.Column("probes", sa.Integer(), nullable=False),
        sa.Column("snapshot", sa.LargeBinary(), nullable=False),
        sa.Column("updated_at_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("vehicle_id", name=op.f("pk_pipeline_state")),
    )
    op.create_table(
        "refused",
        sa.Column("reason", sa.String(length=64), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("last_topic", sa.Text(), nullable=False),
        sa.Column("last_detail", sa.Text(), nullable=False),
        sa.Column("last_payload", sa.LargeBinary(), nullable=False),
        sa.Column("last_at_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("reason", name=op.f("pk_refused")),
    )
    op.create_table(
        "vehicle",
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("first_seen_at_s", sa.Double(), nullable=False),
        sa.Column("last_seen_at_s", sa.Double(), nullable=False),
        sa.Column("channel", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("make", sa.Text(), server_default="", nullable=False),
        sa.Column("source", sa.Text(), server_default="", nullable=False),
        sa.Column("model_release", sa.BigInteger(), nullable=True),
        sa.Column("model_name", sa.Text(), server_default="", nullable=False),
        sa.Column("model_sha256", sa.Text(), server_default="", nullable=False),
        sa.Column("clock_trusted", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("last_arrival", sa.Text(), nullable=True),
        sa.Column("scores", sa.Text(), server_default="{}", nullable=False),
        sa.Column("status", sa.Text(), server_default="{}", nullable=False),
        sa.PrimaryKeyConstraint("vehicle_id", name=op.f("pk_vehicle")),
    )


def downgrade() -> None:
    op.drop_table("vehicle")
    op.drop_table("refused")
    op.drop_table("pipeline_state")
    op.drop_table("parked")
    with op.batch_alter_table("loss", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_loss_vehicle_id_stream_id"))

    op.drop_table("loss")
    with op.batch_alter_table("event", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_event_vehicle_id_event_id"))
        batch_op.drop_index(batch_op.f("ix_event_vehicle_id_alert_id"))

    op.drop_table("event")
    op.drop_table("current")
    with op.batch_alter_table("alert", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_alert_vehicle_id_state"))
        batch_op.drop_index(batch_op.f("ix_alert_ingest_id"))

    op.drop_table("alert")

"""Drift, samples, work and training"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("alert", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_alert_alert_id"), ["alert_id"], unique=False)

    op.create_table(
        "alert_action",
        sa.Column(
            "action_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("alert_id", sa.String(length=128), nullable=False),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("failure_type", sa.String(length=128), nullable=True),
        sa.Column("severity", sa.String(length=16), nullable=True),
        sa.Column("at_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("action_id", name=op.f("pk_alert_action")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("alert_action", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_alert_action_vehicle_id_alert_id"), ["vehicle_id", "alert_id"], unique=False
        )

    op.create_table(
        "alert_work",
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("alert_id", sa.String(length=128), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("verdict", sa.String(length=16), nullable=True),
        sa.Column("failure_type", sa.String(length=128), nullable=True),
        sa.Column("severity", sa.String(length=16), nullable=True),
        sa.Column("updated_at_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("vehicle_id", "alert_id", name=op.f("pk_alert_work")),
    )
    with op.batch_alter_table("alert_work", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_alert_work_state"), ["state"], unique=False)
        batch_op.create_index(batch_op.f("ix_alert_work_verdict"), ["verdict"], unique=False)

    op.create_table(
        "drift",
        sa.Column("ingest_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("reference", sa.String(length=128), nullable=False),
        sa.Column("model_release", sa.BigInteger(), nullable=False),
        sa.Column("stratum", sa.String(length=16), nullable=False),
        sa.Column("at_s", sa.Double(), nullable=False),
        sa.Column("windows", sa.BigInteger(), nullable=False),
        sa.Column("problem", sa.Text(), server_default="", nullable=False),
        sa.PrimaryKeyConstraint("ingest_id", name=op.f("pk_drift")),
    )
    with op.batch_alter_table("drift", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_drift_reference_at_s"), ["reference", "at_s"], unique=False)
        batch_op.create_index(batch_op.f("ix_drift_vehicle_id_at_s"), ["vehicle_id", "at_s"], unique=False)

    op.create_table(
        "drift_alert",
        sa.Column(
            "drift_alert_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("scope_id", sa.Text(), nullable=False),
        sa.Column("reference", sa.String(length=64), nullable=False),
        sa.Column("model_release", sa.BigInteger(), nullable=False),
        sa.Column("stratum", sa.String(length=16), nullable=False),
        sa.Column("variable", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("measure", sa.String(length=32), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("threshold", sa.Double(), nullable=False),
        sa.Column("windows", sa.BigInteger(), nullable=False),
        sa.Column("vehicles", sa.Integer(), nullable=False),
        sa.Column("raised_at_s", sa.Double(), nullable=False),
        sa.Column("updated_at_s", sa.Double(), nullable=False),
        sa.Column("cleared_at_s", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("drift_alert_id", name=op.f("pk_drift_alert")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("drift_alert", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_drift_alert_scope_scope_id_cleared_at_s"),
            ["scope", "scope_id", "cleared_at_s"],
            unique=False,
        )

    op.create_table(
        "drift_reference",
        sa.Column("reference", sa.String(length=64), nullable=False),
        sa.Column("model_release", sa.BigInteger(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("window_spec", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("first_seen_at_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("reference", name=op.f("pk_drift_reference")),
    )
    op.create_table(
        "sample",
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("sample_id", sa.String(length=128), nullable=False),
        sa.Column("ingest_id", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(length=16), nullable=False),
        sa.Column("alert_id", sa.String(length=128), nullable=False),
        sa.Column("failure_type", sa.String(length=128), nullable=False),
        sa.Column("stratum", sa.String(length=16), nullable=False),
        sa.Column("end_time", sa.String(length=40), nullable=False),
        sa.Column("clock_trusted", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("elapsed_s", sa.Double(), nullable=False),
        sa.Column("coverage", sa.Double(), nullable=False),
        sa.Column("state_id", sa.String(length=128), nullable=False),
        sa.Column("model_release", sa.BigInteger(), nullable=True),
        sa.Column("parts", sa.Integer(), nullable=False),
        sa.Column("length", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("received_at_s", sa.Double(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("detail", sa.Text(), server_default="", nullable=False),
        sa.Column("lake_file", sa.Text(), server_default="", nullable=False),
        sa.Column("stored_at_s", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("vehicle_id", "sample_id", name=op.f("pk_sample")),
    )
    with op.batch_alter_table("sample", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_sample_ingest_id"), ["ingest_id"], unique=True)
        batch_op.create_index(batch_op.f("ix_sample_state_stored_at_s"), ["state", "stored_at_s"], unique=False)
        batch_op.create_index(batch_op.f("ix_sample_vehicle_id_alert_id"), ["vehicle_id", "alert_id"], unique=False)

    op.create_table(
        "sample_part",
        sa.Column("vehicle_id", sa.String(length=64), nullable=False),
        sa.Column("sample_id", sa.String(length=128), nullable=False),
        sa.Column("part", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("ingest_id", sa.BigInteger(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("vehicle_id", "sample_id", "part", name=op.f("pk_sample_part")),
    )
    op.create_table(
        "training_run",
        sa.Column("run_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("started_at_s", sa.Double(), nullable=False),
        sa.Column("finished_at_s", sa.Double(), nullable=False),
        sa.Column("champion_release", sa.BigInteger(), nullable=True),
        sa.Column("verdict", sa.String(length=32), nullable=False),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("labels", sa.BigInteger(), nullable=False),
        sa.Column("frozen_sha256", sa.String(length=64), nullable=False),
        sa.Column("report", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_training_run")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("training_run", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_training_run_finished_at_s"), ["finished_at_s"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("alert", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_alert_alert_id"))

    with op.batch_alter_table("training_run", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_training_run_finished_at_s"))

    op.drop_table("training_run")
    op.drop_table("sample_part")
    with op.batch_alter_table("sample", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_sample_vehicle_id_alert_id"))
        batch_op.drop_index(batch_op.f("ix_sample_state_stored_at_s"))
        batch_op.drop_index(batch_op.f("ix_sample_ingest_id"))

    op.drop_table("sample")
    op.drop_table("drift_reference")
    with op.batch_alter_table("drift_alert", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_drift_alert_scope_scope_id_cleared_at_s"))

    op.drop_table("drift_alert")
    with op.batch_alter_table("drift", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_drift_vehicle_id_at_s"))
        batch_op.drop_index(batch_op.f("ix_drift_reference_at_s"))

    op.drop_table("drift")
    with op.batch_alter_table("alert_work", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_alert_work_verdict"))
        batch_op.drop_index(batch_op.f("ix_alert_work_state"))

    op.drop_table("alert_work")
    with op.batch_alter_table("alert_action", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_alert_action_vehicle_id_alert_id"))

    op.drop_table("alert_action")

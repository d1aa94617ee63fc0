"""`edge-agent replay`: a recording through the very pipeline that runs live, at full speed, with a summary.

Promises: the same recording, mapping, bundle and vehicle give the same alerts, drift counts and samples with the same
stream ids and numbers, so that publishing twice stores once; with `--publish` it ends only when the collector has
everything, or says that it has not. It publishes events only: what is retained on `current/…` and `status` belongs to
the vehicle itself, which may be on the road meanwhile. A bad bundle is an error here: nobody replays for the guards
alone without saying so.
"""

import logging
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import msgspec
import numpy as np

from edge_agent.agent import load_catalogue
from edge_agent.config import BrokerConfig
from edge_agent.contract import messages, topics
from edge_agent.contract.errors import ConfigError, MessageError, SourceError, UnavailableError
from edge_agent.delivery.mqtt import Link
from edge_agent.delivery.outbox import STREAMS, Outbox
from edge_agent.delivery.uplink import Limits, Uplink
from edge_agent.mappings import read_mapping
from edge_agent.pipeline.alerts import iso
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.drift import PUBLISH_S
from edge_agent.pipeline.outcomes import NoScore, Outcome, Scored
from edge_agent.pipeline.reports import Report, reports
from edge_agent.pipeline.sampling import SamplingLimits
from edge_agent.reporting import append
from edge_agent.sources.replay import Recording, open_recording

NAMESPACE = uuid.UUID("0b9a4f0e-6d83-5a3c-8f1e-2b7c5d9e4a61")  # ours alone; never change it: stream ids would change
LIMITS = Limits(
    backlog_per_s=500.0, outstanding=256, window=32, ack_timeout_s=5.0
)  # one person waits for one recording
MAX_BYTES = 4 * 2**30  # of a recording's messages: some 300 kB a day, so that not even years of it are shed

log = logging.getLogger("voltwatch.replay")


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What to replay and where the results go. `broker` None = nothing is published."""

    recording: Path
    mapping: Path
    bundle: Path
    vehicle_id: str = ""
    schema: str = ""
    alerts: Path | None = None
    summary: Path | None = None
    broker: BrokerConfig | None = None
    data_dir: Path | None = None
    timeout_s: float = 30.0


@dataclass(slots=True)
class Summary:
    """What a recording contained. Times are Unix seconds."""

    recording: str
    vehicle_id: str
    frames: int = 0
    first_s: float | None = None
    last_s: float | None = None
    windows_scored: int = 0
    windows_no_score: dict[str, int] = field(default_factory=dict)
    no_score_details: Counter[str] = field(default_factory=Counter)
    masked: dict[str, dict[str, int]] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    cells: int = 0
    probes: int = 0
    unmapped: tuple[str, ...] = ()
    alerts: list[dict[str, Any]] = field(default_factory=list)
    worst_cell: int | None = None
    worst_cell_deviation_v: float | None = None
    model: str = ""
    model_release: int | None = None
    elapsed_s: float = 0.0

    @property
    def alerts_raised(self) -> int:
        """How many alerts began; escalations and recoveries belong to one of them."""
        return sum(alert["transition"] == "raised" for alert in self.alerts)

    def as_json(self) -> bytes:
        """Return the summary as a JSON document."""
        table: dict[str, Any] = {
            "recording": self.recording, "vehicle_id": self.vehicle_id, "frames": self.frames,
            "first_time": None if self.first_s is None else iso(self.first_s),
            "last_time": None if self.last_s is None else iso(self.last_s),
            "windows_scored": self.windows_scored, "windows_no_score": self.windows_no_score,
            "values_masked": self.masked, "rows_rejected": self.rejected, "cells": self.cells, "probes": self.probes,
            "signals_not_in_the_recording": list(self.unmapped), "alerts": self.alerts,
            "alerts_raised": self.alerts_raised, "worst_cell": self.worst_cell,
            "worst_cell_deviation_v": self.worst_cell_deviation_v, "model": self.model,
            "model_release": self.model_release, "elapsed_s": round(self.elapsed_s, 3),
            "frames_per_s": round(self.frames / self.elapsed_s) if self.elapsed_s else None,
        }  # fmt: skip
        return msgspec.json.format(msgspec.json.encode(table), indent=2) + b"\n"


def replay(options: ReplayOptions, out: TextIO | None = None) -> Summary:
    """Replay one recording and print its summary to `out` (standard output).

    Raises `SourceError`, `ConfigError`, `BundleError`; with a broker `UnavailableError` when the collector did not
    acknowledge everything in time.
    """
    catalogue = load_catalogue(options.schema)
    named = read_mapping(options.mapping)
    mapping = named.mapping
    bundle = load_bundle(options.bundle, catalogue, mapping.source.make)
    vehicle_id = _vehicle_id(options, mapping.source.vehicle_id)
    recording = open_recording(options.recording, mapping, catalogue, origin=named.origin)
    pipeline = Pipeline(
        catalogue, vehicle_id=vehicle_id, period_s=mapping.source.period_s, cells=recording.bound.cells(),
        probes=recording.bound.probes(), bundle=bundle, expected=tuple(mapping.signals),
    )  # fmt: skip
    summary = Summary(options.recording.name, vehicle_id, cells=pipeline.cells, probes=pipeline.probes,
                      unmapped=recording.bound.missing(), model=bundle.manifest.name,
                      model_release=bundle.manifest.release)  # fmt: skip
    began_s = time.monotonic()
    said = list(_run(recording, pipeline, bundle, summary))
    summary.elapsed_s = time.monotonic() - began_s
    _finish(summary, recording, pipeline)
    # One id for everything that decides what is said: publishing again says the same under the same numbers.
    identity = f"{recording.content_hash}|{named.text.decode()}|{bundle.sha256}|{vehicle_id}"
    stream_id = str(uuid.uuid5(NAMESPACE, identity))
    _write_files(options, summary, [report for report in said if report.stream == "alert"], vehicle_id, stream_id)
    print_summary(summary, out or sys.stdout)
    if options.broker is not None:
        publisher = _Publisher(options, options.broker, vehicle_id=vehicle_id, stream_id=stream_id)
        delivered = publisher.publish(said, summary)
        print(
            f"published    messages: {delivered}, this summary among them, all acknowledged by the collector",
            file=out or sys.stdout,
        )
    return summary


def _vehicle_id(options: ReplayOptions, mapped: str) -> str:
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "_" for c in options.recording.stem)[:64]
    try:
        return topics.check_vehicle_id(options.vehicle_id or mapped or stem)
    except MessageError as error:
        raise ConfigError(f"{error}; give one with --vehicle") from error


def _run(recording: Recording, pipeline: Pipeline, bundle: LoadedBundle, summary: Summary) -> Iterator[Report]:
    """Push every block, note what came of it; yields what is to be said."""
    progress = _Progress(recording.rows)
    for block in recording.blocks():
        if summary.frames == 0 and np.isfinite(block.time_s).any():
            summary.first_s = float(np.nanmin(block.time_s))
        summary.frames += len(block)
        yield from _note(pipeline.push(block), bundle, summary)
        progress.show(summary)
    yield from _note(pipeline.flush(), bundle, summary)
    progress.clear()


def _note(outcomes: list[Outcome], bundle: LoadedBundle, summary: Summary) -> Iterator[Report]:
    for outcome in outcomes:
        said = reports(outcome, vehicle_id=summary.vehicle_id, bundle=bundle)
        yield from said
        if isinstance(outcome, Scored):
            summary.windows_scored += 1
            scores = outcome.scores
            if scores.worst_cell is not None and scores.worst_cell >= 0:
                summary.worst_cell = scores.worst_cell
                summary.worst_cell_deviation_v = messages.finite(scores.worst_cell_deviation_v)
        elif isinstance(outcome, NoScore):
            summary.no_score_details[f"{outcome.reason}: {outcome.detail}"] += 1
        for report in said:
            alert = report.data
            if not isinstance(alert, messages.Alert):
                continue
            summary.alerts.append(
                {"time": report.time, "transition": alert.transition, "failure_type": alert.failure_type,
                 "severity": alert.severity, "origin": alert.origin, "rule": alert.rule, "since": alert.since,
                 "probability": alert.type_probability}
            )  # fmt: skip


def _finish(summary: Summary, recording: Recording, pipeline: Pipeline) -> None:
    if summary.frames == 0:
        raise SourceError(f"{recording.path}: holds no rows")
    summary.windows_no_score = dict(sorted(pipeline.no_score_reasons.items()))
    summary.last_s = pipeline.last_arrival_s
    for (signal, reason), count in sorted(recording.masked.counts.items()):
        summary.masked.setdefault(signal, {})[reason] = count
    summary.rejected = {
        name: n for name, n in sorted(pipeline.counters.items()) if name.startswith(("rows_", "values_")) and n
    }


def _envelope(vehicle_id: str, report: Report, stream_id: str, seq: int) -> messages.Event:
    return messages.event(
        report.data, event_id=report.event_id, vehicle_id=vehicle_id, time=report.time, stream_id=stream_id, seq=seq,
        boot_id=f"replay-{stream_id}",  # a recording has no boot; its order is its own
        clock_trusted=False, replayed=True, subject=report.subject,
    )  # fmt: skip


def _write_files(
    options: ReplayOptions, summary: Summary, alerts: list[Report], vehicle_id: str, stream_id: str
) -> None:
    try:
        if options.alerts is not None:
            with options.alerts.open("wb") as file:
                for seq, report in enumerate(alerts, start=1):
                    file.write(messages.encode(_envelope(vehicle_id, report, stream_id, seq)) + b"\n")
        if options.summary is not None:
            options.summary.write_bytes(summary.as_json())
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written: {error.strerror}") from error


def stream_ids(stream_id: str) -> dict[str, str]:
    """Return the ids of a replay's streams; counts and samples depend on their limits too, alerts do not."""
    limits = f"{PUBLISH_S}|{astuple(SamplingLimits())}"
    return {"alert": stream_id} | {
        name: str(uuid.uuid5(NAMESPACE, f"{stream_id}|{name}|{limits}")) for name in ("drift", "sample")
    }


class _Publisher:
    """Sends what a replay said and its summary, and waits for the collector."""

    def __init__(self, options: ReplayOptions, broker: BrokerConfig, *, vehicle_id: str, stream_id: str) -> None:
        self._options = options
        self._broker = broker
        self._vehicle_id = vehicle_id
        self._stream_id = stream_id

    def publish(self, said: list[Report], summary: Summary) -> int:
        """Return how many messages the collector acknowledged: all. Raises `UnavailableError` otherwise."""
        with self._folder() as folder:
            outbox = Outbox(
                folder, notice_topic=topics.notice(self._vehicle_id), build_loss=self._loss,
                stream_ids=stream_ids(self._stream_id), reserve_bytes=0, max_bytes=MAX_BYTES,
            )  # fmt: skip
            uplink = Uplink(outbox.stream_ids, STREAMS, random.SystemRandom().random, LIMITS)
            client_id = f"voltwatch-replay-{self._vehicle_id}"
            link = Link(self._broker, self._vehicle_id, outbox, uplink, client_id=client_id, will=None)
            try:
                count = self._append_all(outbox, said, summary)
                link.start()
                self._wait(link, outbox, count)
            finally:
                if link.stop():
                    outbox.close()
            return count

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """Give the queue a directory: a lasting one where the user named a data directory."""
        if self._options.data_dir is not None:
            yield self._options.data_dir / "replay" / self._stream_id
            return
        with tempfile.TemporaryDirectory(prefix="voltwatch-replay-") as folder:
            yield Path(folder)

    def _append_all(self, outbox: Outbox, said: list[Report], summary: Summary) -> int:
        envelope = partial(_envelope, self._vehicle_id)
        for report in said:
            append(outbox, report, envelope)
        last = iso(summary.last_s or 0.0)
        body = messages.ReplaySummary(
            recording=summary.recording[:512],
            first_time=None if summary.first_s is None else iso(summary.first_s),
            last_time=None if summary.last_s is None else last,
            frames=summary.frames,
            windows_scored=summary.windows_scored,
            windows_no_score=summary.windows_no_score,
            values_masked=sum(sum(reasons.values()) for reasons in summary.masked.values()),
            alerts=summary.alerts_raised,
            worst_cell=summary.worst_cell,
            worst_cell_deviation_v=summary.worst_cell_deviation_v,
            model_release=summary.model_release,
        )
        event_id = f"{self._stream_id}/summary"
        append(outbox, Report("alert", event_id, topics.notice(self._vehicle_id), last, "", body), envelope)
        return len(said) + 1

    def _wait(self, link: Link, outbox: Outbox, count: int) -> None:
        """Wait until everything is acknowledged; the time-out begins again with every ack."""
        left, deadline_s = -1, time.monotonic()
        while True:
            waiting = sum(len(seqs) for seqs in outbox.waiting().values())
            if link.settled and waiting == 0:
                return
            if waiting != left:
                left, deadline_s = waiting, time.monotonic() + self._options.timeout_s
            if time.monotonic() > deadline_s:
                why = link.problem or "the broker is there, but no collector acknowledges"
                kept = (
                    f"kept in {self._options.data_dir}; run it again to deliver the rest"
                    if self._options.data_dir is not None
                    else "run it again to deliver them (what the collector has is stored once)"
                )
                raise UnavailableError(f"{waiting} of {count} messages not delivered: {why}; {kept}")
            time.sleep(0.05)

    def _loss(self, loss: messages.Loss, stream_id: str, seq: int) -> bytes:
        report = Report("alert", f"{stream_id}/{seq}", "", iso(0.0), "", loss)
        return messages.encode(_envelope(self._vehicle_id, report, stream_id, seq))


class _Progress:
    """A line on standard error that says how far it is, on a terminal only."""

    def __init__(self, rows: int | None) -> None:
        self._rows = rows
        self._shown_s = 0.0
        self._on = sys.stderr.isatty()

    def show(self, summary: Summary) -> None:
        if self._on and time.monotonic() > self._shown_s + 0.1:
            self._shown_s = time.monotonic()
            share = f" {summary.frames / self._rows:4.0%}" if self._rows else ""
            sys.stderr.write(f"\r{summary.frames:,} frames{share}, {summary.windows_scored} windows\033[K")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._on:
            sys.stderr.write("\r\033[K")


def print_summary(summary: Summary, out: TextIO) -> None:
    """Print what a person wants to know, one subject a line."""
    rate = f" ({summary.frames / summary.elapsed_s:,.0f} frames/s)" if summary.elapsed_s else ""
    lines = [f"{summary.recording}: vehicle {summary.vehicle_id}, {summary.model} release {summary.model_release}"]
    if summary.first_s is not None and summary.last_s is not None:
        hours = (summary.last_s - summary.first_s) / 3600
        lines.append(f"time         {iso(summary.first_s)} to {iso(summary.last_s)} ({hours:,.1f} h)")
    lines.append(f"frames       {summary.frames:,} in {summary.elapsed_s:.1f} s{rate}")
    lines.append(f"vectors      {summary.cells} cell voltages, {summary.probes} temperatures")
    lines.append(f"windows      {summary.windows_scored:,} scored, {sum(summary.windows_no_score.values()):,} without")
    for reason, count in summary.no_score_details.most_common(5):
        lines.append(f"             {count:,} x {reason}")
    total = sum(sum(reasons.values()) for reasons in summary.masked.values())
    lines.append(f"masked       {total:,} values")
    for signal, reasons in summary.masked.items():
        lines.append(f"             {signal}: " + ", ".join(f"{n:,} {reason}" for reason, n in reasons.items()))
    for name, count in summary.rejected.items():
        lines.append(f"             {name}: {count:,}")
    if summary.unmapped:
        lines.append(f"not carried  {len(summary.unmapped)} signals: {', '.join(summary.unmapped)}")
    if summary.worst_cell is not None and summary.worst_cell_deviation_v is not None:
        millivolt = summary.worst_cell_deviation_v * 1000
        lines.append(f"worst cell   {summary.worst_cell} (counted from 0), {millivolt:+.1f} mV from the pack's median")
    else:
        lines.append("worst cell   none")
    lines.append(f"alerts       {summary.alerts_raised} raised")
    for alert in summary.alerts[:20]:
        probability = "" if alert["probability"] is None else f", probability {alert['probability']:.2f}"
        rule = f" ({alert['rule']})" if alert["rule"] else ""
        lines.append(
            f"             {alert['time']} {alert['transition']} {alert['failure_type']} {alert['severity']}"
            f" by {alert['origin']}{rule}{probability}"
        )
    if len(summary.alerts) > 20:
        lines.append(f"             and {len(summary.alerts) - 20} more")
    print("\n".join(lines), file=out)

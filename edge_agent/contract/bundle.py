"""The bundle: one directory, one unit. Here stand its manifest, thresholds and drift reference, as types and checks.

    manifest.json         what it is for, and the hash and length of every other file
    model.onnx            raw window → scores, one graph
    thresholds.json       when scores become an alert
    drift_reference.json  bins and reference counts
    golden.npz            inputs and the outputs they must give
    model_card.md

Reading the files is left to others (`pipeline.bundle_dir`); here nothing touches a disk.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from edge_agent.contract.errors import BundleError

CONTRACT_VERSION = "1.0"
MANIFEST = "manifest.json"
MODEL = "model.onnx"
THRESHOLDS = "thresholds.json"
DRIFT_REFERENCE = "drift_reference.json"
GOLDEN = "golden.npz"
MODEL_CARD = "model_card.md"
MEMBERS = (MODEL, THRESHOLDS, DRIFT_REFERENCE, GOLDEN, MODEL_CARD)
MAX_MODEL_BYTES = 8 * 2**20  # ours are below 1 MB; more is somebody else's

Head = Literal["failure", "type", "severity", "anomaly", "cells"]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the bundle's documents: frozen, by keyword; unknown fields of a newer minor version are ignored."""


class WindowSpec(Part, frozen=True, kw_only=True):
    """The grid. Defaults: 300 frames of 1 s, a new window every 60 s, vectors every 10 s."""

    frames: Annotated[int, Meta(ge=2, le=100_000)] = 300
    period_s: Annotated[float, Meta(gt=0.0)] = 1.0
    stride_s: Annotated[float, Meta(gt=0.0)] = 60.0
    vector_period_s: Annotated[float, Meta(gt=0.0)] = 10.0
    min_coverage: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.5  # share of expected arrivals; no score below
    gap_limit_s: Annotated[float, Meta(gt=0.0)] = 120.0  # a longer silence starts a new window; it is never bridged

    @property
    def length_s(self) -> float:
        """Length of a window in seconds."""
        return self.frames * self.period_s

    @property
    def vector_frames(self) -> int:
        """Rows of a vector input: 30 by default."""
        return max(1, round(self.length_s / self.vector_period_s))


class SignalSpec(Part, frozen=True, kw_only=True):
    """A column of the graph's `window` input, or a vector input, with the unit it was trained in."""

    name: str
    unit: str


class StateSpec(Part, frozen=True, kw_only=True):
    """A state tensor, input `name` and output `name + "_out"`; opaque to the agent, which only persists it.

    `shape` has whole numbers, or "C"/"P" for the vehicle's own number of cells/probes (1 where there is none).
    """

    name: str
    shape: tuple[int | Literal["C", "P"], ...]
    initial: float = 0.0


class FileEntry(Part, frozen=True, kw_only=True):
    """Length and SHA-256 (hex) of one member."""

    length: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Manifest(Part, frozen=True, kw_only=True):
    """What a bundle is, and whether an agent may run it."""

    contract_version: str
    release: Annotated[int, Meta(ge=1)]
    name: Annotated[str, Meta(max_length=128)]
    created: str
    state_id: Annotated[str, Meta(min_length=1, max_length=128)]
    opset: int
    onnxruntime: str  # the version that the golden vectors were made with
    schema_name: str
    signals: tuple[SignalSpec, ...]
    vectors: dict[Literal["cell_voltage", "cell_temperature"], SignalSpec] = {}
    window: WindowSpec = WindowSpec()
    heads: tuple[Head, ...]
    failure_types: tuple[str, ...] = ()
    severities: tuple[str, ...] = ()
    features: tuple[str, ...]
    states: tuple[StateSpec, ...] = ()
    compatible_makes: tuple[str, ...] = ()  # empty = every make
    files: dict[FileName, FileEntry]


class TypeThreshold(Part, frozen=True, kw_only=True):
    """Hysteresis of one failure type over its calibrated probability: raise at or above, clear below."""

    raise_at: float
    clear_below: float


class Decision(Part, frozen=True, kw_only=True):
    """How windows become an alert: `k` of the last `n` scored windows, and the pause before the same alert again."""

    k: Annotated[int, Meta(ge=1)] = 2
    n: Annotated[int, Meta(ge=1, le=64)] = 3
    clear_windows: Annotated[int, Meta(ge=1)] = 5
    cooldown_s: Annotated[float, Meta(ge=0.0)] = 1800.0


class Policy(Part, frozen=True, kw_only=True):
    """Thresholds that one stated policy gives, with what was measured for them on vehicles each head has not seen."""

    description: str
    types: dict[str, TypeThreshold]
    failure: float | None = None
    anomaly: float | None = None
    measured: dict[str, float | None] = {}


class Thresholds(Part, frozen=True, kw_only=True):
    """`thresholds.json`: every policy, and which one is in force."""

    active: str
    policies: dict[str, Policy]
    decision: Decision = Decision()

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.policies[self.active]


class DriftReferenceVariable(Part, frozen=True, kw_only=True):
    """Bins of one variable, and how the training fleet filled them.

    `edges` are the B-1 inner edges (a value on an edge belongs above it); `counts` are [B+1] a stratum, the last being
    "missing". `limits` are the stability indices (`drift_measure.psi`) a stratum above which it has drifted, one for
    each of the calibration's sizes; a stratum of which too little is known has none.
    """

    name: str
    kind: Literal["signal", "feature", "score"]
    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]
    limits: dict[str, tuple[Annotated[float, Meta(gt=0.0)], ...]] = {}


class DriftSize(Part, frozen=True, kw_only=True):
    """How much was drawn: so many vehicles, and at most so many windows of each, one after the other."""

    vehicles: Annotated[int, Meta(ge=1)]
    windows: Annotated[int, Meta(ge=1)]


class DriftCalibration(Part, frozen=True, kw_only=True):
    """What the limits promise: `false_alarm_rate` is that of any variable at all in one look at healthy vehicles."""

    false_alarm_rate: Annotated[float, Meta(gt=0.0, lt=1.0)]
    draws: Annotated[int, Meta(ge=1)]
    sizes: Annotated[tuple[DriftSize, ...], Meta(min_length=1)]


class DriftReference(Part, frozen=True, kw_only=True):
    """`drift_reference.json`: what the training fleet looked like. Bundles of before the calibration have none."""

    variables: tuple[DriftReferenceVariable, ...]
    calibration: DriftCalibration | None = None


Document = TypeVar("Document", Manifest, Thresholds, DriftReference)


def parse_manifest(text: bytes, origin: str) -> Manifest:
    """Read a manifest. Raises `BundleError` when malformed, of another major version, or with members missing."""
    manifest = _parse(text, Manifest, f"{origin}/{MANIFEST}")
    major = re.match(r"(\d+)\.", manifest.contract_version)
    if major is None or major[1] != CONTRACT_VERSION.split(".", maxsplit=1)[0]:
        raise BundleError(
            f"{origin}/{MANIFEST}: contract version {manifest.contract_version!r}; "
            f"this agent understands {CONTRACT_VERSION}"
        )
    absent = [name for name in MEMBERS if name not in manifest.files]
    if absent:
        raise BundleError(f"{origin}/{MANIFEST}: does not list {', '.join(absent)}; the bundle is not whole")
    if len({s.name for s in manifest.signals}) != len(manifest.signals) or not manifest.signals:
        raise BundleError(f"{origin}/{MANIFEST}: its signals are empty or repeat a name")
    return manifest


def parse_thresholds(text: bytes, origin: str) -> Thresholds:
    """Read thresholds. Raises `BundleError` when malformed or when `active` names no policy.

    So it does when a type would clear above where it is raised; what is no finite number is no JSON.
    """
    thresholds = _parse(text, Thresholds, f"{origin}/{THRESHOLDS}")
    if thresholds.active not in thresholds.policies:
        raise BundleError(f"{origin}/{THRESHOLDS}: active policy {thresholds.active!r} is not among its policies")
    for name, policy in thresholds.policies.items():
        for failure_type, threshold in policy.types.items():
            if threshold.clear_below > threshold.raise_at:
                raise BundleError(
                    f"{origin}/{THRESHOLDS}: policy {name!r}: {failure_type!r} clears below {threshold.clear_below}, "
                    f"above where it is raised ({threshold.raise_at})"
                )
    return thresholds


def parse_drift_reference(text: bytes, origin: str) -> DriftReference:
    """Read a drift reference. Raises `BundleError` when malformed, or for counts or limits of another length."""
    reference = _parse(text, DriftReference, f"{origin}/{DRIFT_REFERENCE}")
    for variable in reference.variables:
        if any(len(counts) != len(variable.edges) + 2 for counts in variable.counts.values()):
            raise BundleError(f"{origin}/{DRIFT_REFERENCE}: counts of {variable.name!r} do not fit its edges")
        sizes = len(reference.calibration.sizes) if reference.calibration else 0
        if any(len(limits) != sizes for limits in variable.limits.values()):
            raise BundleError(f"{origin}/{DRIFT_REFERENCE}: limits of {variable.name!r} do not fit its calibration")
    return reference


def check_files(manifest: Manifest, found: Mapping[str, FileEntry], origin: str) -> None:
    """Hold the files that are there against the manifest; raises `BundleError` for one that is absent or differs."""
    for name, entry in manifest.files.items():
        actual = found.get(name)
        if actual is None:
            raise BundleError(f"{origin}/{name}: is missing; the manifest lists it")
        if actual != entry:
            raise BundleError(
                f"{origin}/{name}: hash does not match the manifest (length {actual.length}, expected {entry.length}; "
                f"sha256 {actual.sha256[:12]}…, expected {entry.sha256[:12]}…); fetch or build the bundle again"
            )


def check_compatible(manifest: Manifest, known: Mapping[str, str], make: str, origin: str) -> None:
    """Check that this vehicle may run it. `known` maps the catalogue's signal names to their units.

    Raises `BundleError` when it reads a signal the catalogue lacks or in another unit, or is for other makes.
    """
    for signal in (*manifest.signals, *manifest.vectors.values()):
        if signal.name not in known:
            raise BundleError(f"{origin}: is for another feature set: signal {signal.name!r} is not in this schema")
        if known[signal.name] != signal.unit:
            raise BundleError(
                f"{origin}: signal {signal.name!r} is in {signal.unit!r}, this schema says {known[signal.name]!r}"
            )
    if manifest.compatible_makes and make and make not in manifest.compatible_makes:
        raise BundleError(f"{origin}: is for {', '.join(manifest.compatible_makes)}; this vehicle is {make!r}")


def _parse(text: bytes, kind: type[Document], where: str) -> Document:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BundleError(f"{where}: {error}") from error

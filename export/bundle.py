"""Build a bundle: one directory, one unit, written whole or not at all; and verify one that is there.

`build` joins the graph, proves that it answers as the trained models do (`parity`), records golden vectors, counts the
drift reference, and hashes everything into the manifest. The directory appears by one rename when all of it is on disk.
"""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort

from edge_agent.contract import bundle as contract
from edge_agent.contract.bundle import FileEntry, Head, Manifest, Policy, SignalSpec, Thresholds, TypeThreshold
from edge_agent.contract.errors import BundleError
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, VECTOR_ROLES, Catalogue
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.pipeline.inference import Scorer
from export import golden, parity
from export.drift_reference import build_reference, read_windows
from export.features import OPSET, FeatureGraph, session_options
from export.graph import Models, feature_graph, heads_model, read_dataset_facts, read_models, whole_model
from export.model_card import model_card, read_json
from export.parity import Check

NEVER = TypeThreshold(raise_at=2.0, clear_below=1.0)  # of a type without a booster: no probability reaches it
MOST_PARITY_ROWS = 2000
MOST_INT8_ROWS = 200
MOST_TORCH_CASES = 12  # torch takes thirty times as long as the exported graph
SEED = 0  # of the rows that parity draws; a build depends on nothing random


@dataclass(frozen=True, slots=True)
class Built:
    """What `build` did, for printing."""

    path: Path
    manifest: Manifest
    sha256: str  # of the manifest: the bundle's identity
    checks: tuple[Check, ...]


def build(
    models_dir: Path,
    datasets_dir: Path,
    output: Path,
    *,
    catalogue: Catalogue,
    release: int,
    created: str,
    false_alarm_rate: float = 0.01,
) -> Built:
    """Build the bundle of a models folder into directory `output`, replacing the bundle that is there.

    `created` is the time to write into the manifest (ISO, UTC). Raises `BundleError` when an input is missing or unfit,
    when parity fails, or when `output` holds something that is no bundle.
    """
    _check_output(output)
    facts = read_dataset_facts(datasets_dir)
    graph = feature_graph(catalogue, facts, str(datasets_dir))
    signals, features = len(catalogue.scalars), len(graph.feature_names)
    models = read_models(models_dir, datasets_dir, graph.feature_names, signals)
    heads = heads_model(models, features, graph.pooled_frames, signals)
    model = whole_model(models, graph, heads).SerializeToString(deterministic=True)
    if len(model) > contract.MAX_MODEL_BYTES:
        raise BundleError(f"{models_dir}: the graph is {len(model)} bytes, at most {contract.MAX_MODEL_BYTES} may ship")
    session = _session(model)

    inputs, outputs = golden.record(
        session, golden.read_windows(datasets_dir / "golden_windows.npz"), graph.state_specs
    )
    checks = _checks(models, heads, graph, datasets_dir)
    checks.append(parity.check_features(graph, session, inputs[:: max(1, len(inputs) // MOST_TORCH_CASES)]))
    parity.require(checks)

    thresholds = _thresholds(models_dir / contract.THRESHOLDS, models)
    reference = build_reference(
        datasets_dir, graph, _session(heads.SerializeToString()), false_alarm_rate=false_alarm_rate
    )
    members = {
        contract.MODEL: model,
        contract.THRESHOLDS: _pretty(thresholds),
        contract.DRIFT_REFERENCE: msgspec.json.encode(reference),
        contract.GOLDEN: golden.encode(inputs, outputs),
    }
    manifest = _manifest(graph, models, release, created)
    card = model_card(
        manifest,
        facts,
        thresholds,
        checks,
        training=read_json(models_dir / "training.json"),
        report=read_json(models_dir / "evaluation_report.json"),
    )
    members[contract.MODEL_CARD] = card.encode()
    manifest = msgspec.structs.replace(manifest, files={name: entry_of(data) for name, data in sorted(members.items())})
    text = _pretty(manifest)
    contract.parse_manifest(text, str(output))
    _write({**members, contract.MANIFEST: text}, output)
    return Built(output, manifest, hashlib.sha256(text).hexdigest(), tuple(checks))


def verify(path: Path, catalogue: Catalogue) -> tuple[Manifest, int, float]:
    """Hash a bundle again, load its graph as an agent does, and replay its golden vectors.

    Returns the manifest, the number of cases, and the largest relative difference found. Raises `BundleError`.
    """
    loaded = load_bundle(path, catalogue)
    Scorer(loaded, catalogue)
    text = (path / contract.GOLDEN).read_bytes()
    if entry_of(text) != loaded.manifest.files[contract.GOLDEN]:
        raise BundleError(f"{path / contract.GOLDEN}: changed while it was read; verify again")
    cases, worst = golden.replay(_session(loaded.model_bytes), text, str(path / contract.GOLDEN))
    return loaded.manifest, cases, worst


def entry_of(data: bytes) -> FileEntry:
    """Length and hash of a member."""
    return FileEntry(length=len(data), sha256=hashlib.sha256(data).hexdigest())


def _checks(models: Models, heads: Any, graph: FeatureGraph, datasets_dir: Path) -> list[Check]:
    train = read_windows(datasets_dir / "train_full.parquet", len(graph.feature_names))
    if not len(train.features):
        raise BundleError(f"{datasets_dir / 'train_full.parquet'}: holds no window; prepare the dataset again")
    rows = _spread(train.features, MOST_PARITY_ROWS)
    kept = train.pooled[~np.isnan(train.pooled).all(axis=1)] if train.pooled.size else train.pooled
    pooled = _spread(kept, MOST_INT8_ROWS).reshape(-1, graph.pooled_frames, len(graph.catalogue.scalars))
    return [
        *parity.check_boosters(models, rows, SEED),
        *parity.check_probabilities(models, heads, _spread(train.features, MOST_INT8_ROWS)),
        *parity.check_autoencoder(models, pooled),
    ]


def _spread(rows: Any, most: int) -> Any:
    """Return at most so many rows, evenly over all: the first ones would be one vehicle's."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def _thresholds(path: Path, models: Models) -> Thresholds:
    """Read training's thresholds; a failure type without a booster gets one that no probability reaches."""
    try:
        thresholds = contract.parse_thresholds(path.read_bytes(), str(path.parent))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); train the models first") from error
    types = FAILURE_TYPES if models.types else ()

    def complete(policy: Policy) -> Policy:
        return msgspec.structs.replace(
            policy, types={t: policy.types.get(t, NEVER) if t in models.types else NEVER for t in types}
        )

    policies = {name: complete(policy) for name, policy in thresholds.policies.items()}
    absent = [t for t in models.types if policies[thresholds.active].types[t] == NEVER]
    if absent:
        raise BundleError(f"{path}: policy {thresholds.active!r} has no threshold for {absent[0]!r}; train again")
    return msgspec.structs.replace(thresholds, policies=policies)


def _manifest(graph: FeatureGraph, models: Models, release: int, created: str) -> Manifest:
    catalogue = graph.catalogue
    cells: tuple[Head, ...] = ("cells",) if graph.has_cells else ()
    vectors = {role: catalogue.role(role) for role in VECTOR_ROLES}
    return Manifest(
        contract_version=contract.CONTRACT_VERSION,
        release=release,
        name=catalogue.name,
        created=created,
        state_id=graph.state_id,
        opset=OPSET,
        onnxruntime=ort.__version__,
        schema_name=catalogue.name,
        signals=tuple(SignalSpec(name=s.name, unit=s.unit) for s in catalogue.scalars),
        vectors={
            "cell_voltage" if role == VECTOR_ROLES[0] else "cell_temperature": SignalSpec(name=s.name, unit=s.unit)
            for role, s in vectors.items()
            if s is not None
        },
        window=graph.spec,
        heads=(*models.heads, *cells),
        failure_types=FAILURE_TYPES if models.types else (),
        severities=SEVERITIES if models.severity is not None else (),
        features=graph.feature_names,
        states=graph.state_specs,
        files={},
    )


def _session(model: bytes) -> Any:
    return ort.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])


def _pretty(document: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def _check_output(output: Path) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise BundleError(f"{output}: is not a directory; give a directory to build into")
    if output.is_dir() and any(output.iterdir()) and not (output / contract.MANIFEST).is_file():
        raise BundleError(f"{output}: holds something that is no bundle; give an empty or new directory")


def _write(members: dict[str, bytes], output: Path) -> None:
    """Write all members beside `output`, then move the directory into place; what was there is removed after."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            new = staging / "new"
            new.mkdir()
            for name, data in members.items():
                with (new / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _sync_directory(new)
            if output.exists():
                output.rename(staging / "old")
            new.rename(output)
            _sync_directory(output.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise BundleError(f"{output}: cannot be written ({error.strerror}); give another directory") from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

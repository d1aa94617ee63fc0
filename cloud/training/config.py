"""`cloud/config.json`: everything a training run depends on beside its data, read once and frozen.

A misspelt key is refused with the nearest known one. Relative paths in it are relative to the file. Nothing here opens
data; `load_config` also resolves which schema and which mapping the run uses.
"""

import re
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cloud.drift import limits
from cloud.drift.limits import Count, Drift, Positive, Retraining, Share
from edge_agent.contract.bundle import Decision, WindowSpec
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.mapping import Mapping, parse_mapping
from edge_agent.contract.signals import Catalogue, default_catalogue, parse_schema

DEFAULT_CONFIG = limits.DEFAULT_CONFIG
DEFAULT_MAPPING = "ev_catalogue.toml"  # columns named as the catalogue's signals


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the file's sections; the two that the service reads too stand in `cloud.drift.limits`."""


class Split(Section, frozen=True, kw_only=True):
    """Shares of vehicles (never of windows)."""

    train: Share = 0.6
    validation: Share = 0.2
    test: Share = 0.2


class Labels(Section, frozen=True, kw_only=True):
    """See labeling_spec.txt."""

    horizon_s: Positive = 14 * 86_400.0  # how long before the failure the failure predictor is asked to say so


class Preparation(Section, frozen=True, kw_only=True):
    """What is done to training windows so that the models meet what vehicles really send."""

    fresh_state_share: Share = 0.35  # of sessions that begin with an empty model state, as on a vehicle just fitted
    decimated_share: Share = 0.2  # of training vehicles that are seen a second time at a slower report rate
    decimated_period_s: tuple[Positive, ...] = (10.0, 30.0)
    dropped_share: Share = 0.2  # of training vehicles that are seen a second time with signals missing
    dropped_signals: Share = 0.25  # of the scalar signals, there
    pooled_train_windows: Count = 4000  # healthy windows kept for the autoencoder; it gains little from more
    signal_sample_rows: Count = 20_000  # frames for the drift reference
    golden_windows: Annotated[int, Meta(ge=24)] = 32


class LightGBM(Section, frozen=True, kw_only=True):
    """Parameters of all boosters. Small trees and strong regularisation: windows are many, vehicles are few."""

    rounds: Count = 200
    early_stopping_rounds: Count = 25
    learning_rate: Positive = 0.08
    num_leaves: Annotated[int, Meta(ge=2)] = 12
    min_data_in_leaf: Count = 40
    feature_fraction: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.35
    bagging_fraction: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.7
    lambda_l2: Annotated[float, Meta(ge=0.0)] = 5.0
    max_bin: Annotated[int, Meta(ge=7, le=255)] = 63
    threads: Count = 1  # a fleet of tens trains in seconds; OpenMP's waiting costs ten times that on a busy machine
    folds: Annotated[int, Meta(ge=2)] = 4  # of training vehicles: how many rounds, and margins of unseen vehicles
    severity_weight: tuple[Share, Share, Share, Share] = (0.4, 0.8, 1.0, 1.0)  # of low … critical positives
    ignored_features: tuple[str, ...] = ()  # patterns; what names a vehicle or a season, not a fault
    type_features: dict[str, tuple[str, ...]] = {}  # patterns by failure type: the part of the vehicle it shows in


class Calibration(Section, frozen=True, kw_only=True):
    """`auto` is isotonic from `isotonic_min_vehicles` failing vehicles on, else a sigmoid."""

    method: Literal["auto", "sigmoid", "isotonic"] = "auto"
    isotonic_min_vehicles: Count = 50


class Autoencoder(Section, frozen=True, kw_only=True):
    """The LSTM autoencoder over windows pooled to 5 s."""

    hidden: Count = 32
    epochs: Count = 12
    least_steps: Count = 600  # of the optimiser: few windows are seen for more epochs
    batch_size: Count = 64
    learning_rate: Positive = 0.003
    signal_drop: Share = 0.15  # chance that a signal is hidden from the input of one training window
    patience: Count = 3
    threads: Count = 1  # a second one gains a quarter on idle cores, and costs thirty times the time on busy ones


class ThresholdPolicies(Section, frozen=True, kw_only=True):
    """What each policy asks for; all three are written, `active` is in force."""

    active: Literal["precision_80", "percentile_95", "false_alarm_budget"] = "false_alarm_budget"
    precision: Share = 0.8
    percentile: Annotated[float, Meta(gt=0.0, lt=100.0)] = 95.0
    episodes_per_vehicle_month: Annotated[float, Meta(ge=0.0)] = 0.1  # per failure type, on healthy vehicles
    margin: Share = 0.35  # of the room between healthy and failing validation vehicles, in log-odds
    clear_ratio: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.6  # of raise_at: the hysteresis
    decision: Decision = Decision()


class Evaluation(Section, frozen=True, kw_only=True):
    """How the report is computed."""

    bootstrap_samples: Annotated[int, Meta(ge=20)] = 200
    inspection_budget: Count = 100  # windows a workshop would look at: precision@this


class Challenger(Section, frozen=True, kw_only=True):
    """How `retrain` holds a challenger against the champion; the rule itself is `cloud.training.verdict`."""

    held_out_share: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.3  # of the lake's vehicles, by a hash of their id
    bootstrap_samples: Annotated[int, Meta(ge=200)] = 1000  # `doubt` is read at its hundredths
    least_vehicles: Annotated[int, Meta(ge=2)] = 5  # all five better by chance alone: one in 32
    doubt: Annotated[float, Meta(gt=0.0, lt=0.5)] = 0.05  # of taking a challenger that is no better, over all gains
    pr_auc_margin: Share = 0.03
    type_margin: Share = 0.1
    recall_margin: Share = 0.05
    severity_margin: Annotated[float, Meta(ge=0.0)] = 0.15  # levels
    false_alarm_slack: Annotated[int, Meta(ge=0)] = 1  # vehicles with more false alarms, less those with fewer


class TrainingConfig(Section, frozen=True, kw_only=True):
    """The whole file. `schema` and `mapping` null = the electric vehicle's own, which come with the package."""

    schema: str | None = None
    mapping: str | None = None
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 20260101
    window: WindowSpec = WindowSpec()
    split: Split = Split()
    labels: Labels = Labels()
    preparation: Preparation = Preparation()
    lightgbm: LightGBM = LightGBM()
    calibration: Calibration = Calibration()
    autoencoder: Autoencoder = Autoencoder()
    thresholds: ThresholdPolicies = ThresholdPolicies()
    evaluation: Evaluation = Evaluation()
    challenger: Challenger = Challenger()
    retraining: Retraining = Retraining()
    drift: Drift = Drift()


def load_config(path: Path) -> TrainingConfig:
    """Read the configuration. Raises `ConfigError` for a missing file, a misspelt key or a value out of range."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read: {error.strerror}") from error
    try:
        config = msgspec.json.decode(text, type=TrainingConfig)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"config {path}: {error}{_nearest_key(str(error))}") from error
    raw = msgspec.json.decode(text)
    for place, given, kind in (
        ("window", raw.get("window", {}), WindowSpec),
        ("thresholds.decision", raw.get("thresholds", {}).get("decision", {}), Decision),
    ):  # the contract's types let unknown fields of a newer version pass; a configuration file may not
        for key in set(given) - set(kind.__struct_fields__):
            near = get_close_matches(key, kind.__struct_fields__, n=1)
            raise ConfigError(
                f"config {path}: unknown field `{key}` - at `$.{place}`{f'; did you mean {near[0]!r}?' if near else ''}"
            )
    shares = (config.split.train, config.split.validation, config.split.test)
    if abs(sum(shares) - 1.0) > 1e-6 or min(shares) <= 0:
        raise ConfigError(f"config {path}: split shares {shares} must each be above 0 and add up to 1")
    return config


def _nearest_key(message: str) -> str:
    unknown = re.search(r"unknown field `([^`]*)`(?: - at `\$\.?([a-z_]*))?", message)
    if unknown is None:
        return ""
    sections = {f.name: f.type for f in msgspec.structs.fields(TrainingConfig)}
    section = sections.get(unknown[2] or "", TrainingConfig)
    known = [f.encode_name for f in msgspec.structs.fields(section)] if hasattr(section, "__struct_fields__") else []
    near = get_close_matches(unknown[1], known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"


def load_catalogue(config: TrainingConfig, config_path: Path, schema_path: Path | None = None) -> Catalogue:
    """Return the catalogue of the run: `schema_path`, else the config's, else the package's own."""
    path = schema_path or (config_path.parent / config.schema if config.schema else None)
    if path is None:
        return default_catalogue()
    try:
        return parse_schema(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"schema {path}: cannot be read: {error.strerror}") from error


def load_mapping(config: TrainingConfig, config_path: Path, mapping_path: Path | None = None) -> tuple[Mapping, str]:
    """Return the mapping of the run and where it came from: `mapping_path`, else the config's, else the package's."""
    path = mapping_path or (config_path.parent / config.mapping if config.mapping else None)
    if path is None:
        # a data file beside the agent's code, not an import of it
        packaged = resources.files("edge_agent").joinpath("mappings").joinpath(DEFAULT_MAPPING)
        return parse_mapping(packaged.read_bytes(), DEFAULT_MAPPING), DEFAULT_MAPPING
    try:
        return parse_mapping(path.read_bytes(), str(path)), str(path)
    except OSError as error:
        raise ConfigError(f"mapping {path}: cannot be read: {error.strerror}") from error

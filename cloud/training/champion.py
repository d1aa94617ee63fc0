"""The models that serve now, read and never written: what they learned from, and whether a dataset fits them."""

from pathlib import Path

import msgspec

from cloud.training.dataset import DatasetInfo
from cloud.training.lake_split import learned_test_vehicles
from cloud.training.train import THRESHOLDS_FILE, TRAINING_FILE
from edge_agent.contract.bundle import Thresholds, parse_thresholds
from edge_agent.contract.errors import ConfigError, SourceError
from edge_agent.contract.signals import Catalogue


class TrainingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed of `training.json`: which data, with which features, and whom the models have seen."""

    data_sha256: str
    state_id: str
    schema_name: str
    created: str = ""
    split: dict[str, str] = {}
    features_sha256: str = ""  # older records have none; the boosters' number of features is checked when they load


def read_record(models: Path) -> TrainingRecord:
    """Read `training.json`. Raises `SourceError` where the folder holds no trained models."""
    path = models / TRAINING_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=TrainingRecord)
    except OSError as error:
        raise SourceError(
            f"champion {path}: cannot be read: {error.strerror}; give the folder that `fleet-cloud train` wrote"
        ) from error
    except msgspec.DecodeError as error:
        raise SourceError(f"champion {path}: {error}; give the folder that `fleet-cloud train` wrote") from error


def read_thresholds(models: Path) -> Thresholds:
    """Read `thresholds.json`. Raises `SourceError` where it is missing, `BundleError` where it is damaged."""
    path = models / THRESHOLDS_FILE
    try:
        return parse_thresholds(path.read_bytes(), str(models))
    except OSError as error:
        raise SourceError(f"models {path}: cannot be read: {error.strerror}; run `fleet-cloud train` first") from error


def check_fits(models: Path, record: TrainingRecord, data: Path, info: DatasetInfo, features_sha256: str) -> None:
    """Raise `ConfigError` where champion and dataset cannot be compared: other features, or a leak between them."""
    if record.schema_name != info.schema_name:
        raise ConfigError(
            f"champion {models}: is of schema {record.schema_name!r}, dataset {data} of {info.schema_name!r}; "
            f"give the dataset that the champion was trained from"
        )
    if record.state_id != info.state_id or record.features_sha256 not in {"", features_sha256}:
        raise ConfigError(
            f"champion {models}: was trained with another feature set than dataset {data} was prepared with "
            f"(state {record.state_id} and {info.state_id}); no figure of both would mean the same: "
            f"run `fleet-cloud prepare` and `train` again for a champion of this feature set"
        )
    leaked = learned_test_vehicles(info.split, record.split)
    if leaked:
        raise ConfigError(
            f"dataset {data}: keeps {', '.join(leaked[:3])}{' …' if len(leaked) > 3 else ''} for testing, which "
            f"champion {models} has learned from; give the dataset that the champion was trained from"
        )


def check_catalogue(data: Path, info: DatasetInfo, catalogue: Catalogue, features: tuple[str, ...]) -> None:
    """Raise `ConfigError` where the dataset is of another schema or of another version's features."""
    if info.signals != catalogue.scalar_names:
        raise ConfigError(
            f"dataset {data}: was prepared for schema {info.schema_name!r}, this run's is {catalogue.name!r}; "
            f"give the same --schema"
        )
    if info.features != features:
        raise ConfigError(
            f"dataset {data}: was prepared with other features than this version's; run `fleet-cloud prepare` and "
            f"`train` again"
        )


def check_output(output: Path, inner: tuple[Path, ...], kept: tuple[Path, ...]) -> None:
    """Raise `ConfigError` where writing `inner` folders of `output` would touch a folder that is to be kept."""
    for theirs in (path.resolve() for path in kept):
        for ours in (output.resolve(), *(path.resolve() for path in inner)):
            inside = theirs in ours.parents or (ours != output.resolve() and ours in theirs.parents)
            if ours == theirs or inside:
                raise ConfigError(
                    f"output {output}: would write over {theirs}, which a retraining only reads; give another --output"
                )

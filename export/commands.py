"""`model-export`: build a bundle from trained models, or verify one. Faults are one line and an exit code."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from edge_agent.contract.errors import ConfigError
from edge_agent.contract.signals import Catalogue, default_catalogue, parse_schema

# a data file that `fleet-cloud` reads too, where the cloud part is installed; not an import of it
DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "cloud" / "config.json"
CONFIG_HELP = "Training configuration, for its schema; default: the one that comes with fleet-cloud."

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


class _Drift(msgspec.Struct, frozen=True):
    """Of the section `drift`: what the limits are calibrated to."""

    false_alarm_rate: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.01


class _Config(msgspec.Struct, frozen=True):
    """The keys of the training configuration that an export needs."""

    schema: str | None = None
    drift: _Drift = _Drift()


def _read(config: Path | None) -> tuple[_Config, Path]:
    """Return the configuration (given, or fleet-cloud's where that is installed), and the folder its paths start at."""
    origin = config or DEFAULT_CONFIG
    if config is None and not DEFAULT_CONFIG.is_file():
        return _Config(), origin.parent
    try:
        return msgspec.json.decode(origin.read_bytes(), type=_Config), origin.parent
    except OSError as error:
        raise ConfigError(f"config {origin}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"config {origin}: {error}") from error


def _catalogue(schema: Path | None, config: Path | None) -> Catalogue:
    """Return the catalogue of `schema`, else of the configuration (given, or fleet-cloud's), else the vehicle's own."""
    path = schema
    if path is None:
        read, folder = _read(config)
        path = folder / read.schema if read.schema else None
    if path is None:
        return default_catalogue()
    try:
        return parse_schema(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"schema {path}: cannot be read: {error.strerror}") from error


@app.command()
def build(
    *,
    models: Annotated[Path, typer.Option(help="What `fleet-cloud train` wrote.")] = Path("models"),
    datasets: Annotated[Path, typer.Option(help="What `fleet-cloud prepare` wrote.")] = Path("datasets"),
    output: Annotated[Path, typer.Option(help="Directory of the bundle; replaced when it holds one.")] = Path("bundle"),
    release: Annotated[int, typer.Option(min=1, help="Release counter: every release has a greater one.")] = 1,
    config: Annotated[Path | None, typer.Option(help=CONFIG_HELP)] = None,
    schema: Annotated[Path | None, typer.Option(help="Schema file, instead of the configuration's.")] = None,
) -> None:
    """Build one graph from raw window to scores, prove that it answers as the models do, and write the bundle."""
    from export import bundle  # noqa: PLC0415 - torch takes seconds to import; --help and a typo must not wait

    built = bundle.build(
        models,
        datasets,
        output,
        catalogue=_catalogue(schema, config),
        release=release,
        false_alarm_rate=_read(config)[0].drift.false_alarm_rate,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
    )
    for check in built.checks:
        typer.echo(f"  {check}")
    for name, entry in built.manifest.files.items():
        typer.echo(f"  {name}: {entry.length:,} bytes")
    typer.echo(
        f"{built.path}: release {built.manifest.release}, heads {', '.join(built.manifest.heads)}, "
        f"state {built.manifest.state_id}, bundle {built.sha256[:12]}"
    )


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    config: Annotated[Path | None, typer.Option(help=CONFIG_HELP)] = None,
    schema: Annotated[Path | None, typer.Option(help="Schema file, instead of the configuration's.")] = None,
) -> None:
    """Hash every file again, load the graph, replay the golden vectors."""
    from export import bundle  # noqa: PLC0415 - see build

    manifest, cases, worst = bundle.verify(path, _catalogue(schema, config))
    typer.echo(
        f"{path}: release {manifest.release} is whole; {cases} golden cases agree (largest difference {worst:.1e})"
    )

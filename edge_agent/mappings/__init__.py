"""Mappings that come with the package, and the one place that reads a mapping from a path or by such a name.

`vehicle_a`, `vehicle_b` carry two real vehicles' recordings, `ev_catalogue` columns that already have the catalogue's
names (what `firmware-sim generate` writes). Writing one of your own: docs/your-own-data.md.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from edge_agent.contract.errors import ConfigError
from edge_agent.contract.mapping import Mapping, parse_mapping


@dataclass(frozen=True, slots=True)
class MappingFile:
    """A mapping with the text it was read from (its identity) and where that stood (for messages)."""

    mapping: Mapping
    text: bytes
    origin: str


def packaged() -> tuple[str, ...]:
    """Names of the mappings that come with the package."""
    return tuple(sorted(f.name.removesuffix(".toml") for f in _folder() if f.name.endswith(".toml")))


def read_mapping(path_or_name: str | Path) -> MappingFile:
    """Read a mapping file, or the packaged one of that name. Raises `ConfigError` when there is none or it is wrong."""
    path = Path(path_or_name)
    if not path.is_file():
        name = path.name.removesuffix(".toml")
        if name in packaged() and path.parent == Path():
            text = resources.files(__name__).joinpath(name + ".toml").read_bytes()
            return MappingFile(parse_mapping(text, name), text, name)
        near = get_close_matches(name, packaged(), n=1)
        hint = f"did you mean the packaged {near[0]!r}?" if near else f"packaged ones are {', '.join(packaged())}"
        raise ConfigError(f"mapping {path}: no such file; {hint} (docs/your-own-data.md says how to write one)")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"mapping {path}: cannot be read: {error.strerror or error}") from error
    return MappingFile(parse_mapping(text, str(path)), text, str(path))


def _folder() -> list[resources.abc.Traversable]:
    return list(resources.files(__name__).iterdir())

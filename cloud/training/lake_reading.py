"""Every readable sample of a lake, once; a file that is cut or damaged is named and counted, and holds nothing up.

`Lake.read` alone stops at a damaged file, which is right for whoever must not miss one. A training run takes what there
is and says what it left out.
"""

from collections.abc import Iterator

import fsspec

from cloud.lake.lake import Lake, LakeAwayError, LakeSample
from edge_agent.contract.errors import SourceError


class LakeReading:
    """One pass over a lake. `damaged` has a line for each file that could not be read to its end.

    Raises `ConfigError` for a URL that is none, `SourceError` where no lake is there, `LakeAwayError` where it cannot
    be listed.
    """

    def __init__(self, url: str) -> None:
        self.lake = Lake(url)
        self.damaged: list[str] = []
        filesystem, root = fsspec.core.url_to_fs(url)
        try:
            there = filesystem.exists(root)
        except OSError as error:
            raise LakeAwayError(f"lake {self.lake.name}: {error.strerror or error}") from error
        if not there:
            raise SourceError(
                f"lake {self.lake.name}: is not there; give the URL that the server moves samples to "
                f"(`fleet-cloud serve --lake`)"
            )

    def __iter__(self) -> Iterator[LakeSample]:
        """Give each sample once by (vehicle, sample id); a file merged away meanwhile is found in its new place."""
        return self.lake.read(on_damaged=lambda error: self.damaged.append(f"skipped: {error}"))

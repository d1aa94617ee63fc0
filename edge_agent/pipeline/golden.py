"""Golden vectors: inputs of the graph and the outputs they must give, replayed wherever a bundle is to be trusted.

`golden.npz` names its arrays `NNN.in.NAME` and `NNN.out.NAME`. On one kind of processor answers are equal to the last
bit; across kinds they stay within `TOLERANCE`. Recording them is left to `export.golden`.
"""

import io
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.contract.errors import BundleError

TOLERANCE = 1e-5  # relative to max(1, |expected|)
LEAST_CASES = 24
MAX_BYTES = 256 * 2**20  # unpacked; some dozen windows with a thousand cells are a tenth of it
Case = dict[str, npt.NDArray[Any]]


def replay(session: Any, golden: bytes, origin: str, *, spent: Callable[[float], None] | None = None,
           now: Callable[[], float] | None = None) -> tuple[int, float]:  # fmt: skip
    """Run every case in onnxruntime's `session`; returns how many there are and the largest relative difference found.

    `spent` is told the seconds that each case took, by the clock `now`. Raises `BundleError` when a case differs by
    more than `TOLERANCE`, holds other tensors than the graph, or when there are too few.
    """
    cases = read(golden, origin)
    worst = 0.0
    for number, (given, expected) in sorted(cases.items()):
        began_s = now() if now is not None else 0.0
        try:
            found = dict(zip(expected, session.run(list(expected), given), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            line = str(error).splitlines()[0][:160]
            raise BundleError(f"{origin}: golden case {number} does not run: {line}") from error
        if spent is not None and now is not None:
            spent(now() - began_s)
        for name, answer in expected.items():
            difference = _difference(found[name], answer)
            if not difference <= TOLERANCE:
                raise BundleError(f"{origin}: golden case {number}: {name} differs by {difference:.1e}, not the model")
            worst = max(worst, difference)
    return len(cases), worst


def read(golden: bytes, origin: str) -> dict[str, tuple[Case, Case]]:
    """Read the cases: number → inputs, outputs. Raises `BundleError` for what is no such file, or has too few cases."""
    cases: dict[str, tuple[Case, Case]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(golden)) as packed:
            if sum(member.file_size for member in packed.infolist()) > MAX_BYTES:
                raise BundleError(f"{origin}: unpacks to more than {MAX_BYTES} bytes; this is not one of our bundles")
        with np.load(io.BytesIO(golden), allow_pickle=False) as stored:
            for name in stored.files:
                number, way, tensor = name.split(".", 2)
                cases.setdefault(number, ({}, {}))[("in", "out").index(way)][tensor] = stored[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"{origin}: cannot be read: {str(error)[:160]}") from error
    if len(cases) < LEAST_CASES:
        raise BundleError(f"{origin}: holds {len(cases)} golden cases, at least {LEAST_CASES} are needed")
    return cases


def _difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    a, b = found.astype(np.float64), expected.astype(np.float64)
    if (np.isnan(a) != np.isnan(b)).any():
        return float("inf")
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and NaN is not below the tolerance: told apart here
        apart = np.where(a == b, 0.0, np.abs(a - b) / np.maximum(np.abs(b), 1.0))
    return float(np.nanmax(apart, initial=0.0))

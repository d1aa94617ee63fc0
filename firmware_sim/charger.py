"""Charging: what station, cable and inlet do, from the moment the plug is in.

The station offers power, the pack asks for some, and the smaller flows, if the fault parameters let it. The inlet's
contacts heat with I²R. A session that breaks off comes back after a while with the plug still in, as a worn contact's
does. Who decides to charge is `driver.py`.
"""

import numpy as np

from edge_agent.contract.signals import FloatArray
from firmware_sim.driver import AC, DC, IntArray

AC_VOLT = 230.0
INLET_TAU_S = 240.0
# New contacts warm by about 15 K at 32 A AC and 20 K at 150 A DC.
AC_K_PER_A2 = 0.0146
DC_K_PER_A2 = 0.0009
ONBOARD_LOSS = 0.06
HANDSHAKE_S = 12


def sessions(rng: np.random.Generator, mode: IntArray, aborts_per_h: FloatArray) -> IntArray:
    """Return [T] 0/1: where current may flow while plugged in (`mode` AC or DC); handshakes and aborts break it."""
    plugged = (mode == AC) | (mode == DC)
    active: IntArray = np.asarray(plugged, dtype=np.int8)
    for start in np.flatnonzero(np.diff(plugged.astype(np.int8), prepend=0) == 1):
        active[start : start + HANDSHAKE_S] = 0
    broken = np.flatnonzero(plugged & (rng.random(mode.size) < aborts_per_h / 3600.0))
    lengths = rng.integers(45, 260, broken.size)
    for at, length in zip(broken, lengths, strict=True):
        active[at : at + length] = 0
    return active


def offered_w(mode: IntArray, share: FloatArray, ac_w: float, dc_w: float) -> FloatArray:
    """Power that the station can give, [T]: its share of what the vehicle's inlet is made for."""
    return np.where(mode == AC, ac_w, np.where(mode == DC, dc_w, 0.0)) * share


class Inlet:
    """The charging inlets of V vehicles: the hottest contact's rise above the air, [V] K."""

    def __init__(self, vehicles: int) -> None:
        self._rise_k = np.zeros(vehicles)

    def rest(self) -> None:
        """Sleep: cool down."""
        self._rise_k[:] = 0.0

    def run(self, heat_k: FloatArray) -> FloatArray:
        """Follow the steady rise `heat_k` [T, V] with the contacts' lag; [T, V] K above the air."""
        gain = 1.0 - np.exp(-1.0 / INLET_TAU_S)
        rise = np.empty_like(heat_k)
        for t in range(heat_k.shape[0]):
            self._rise_k = self._rise_k + (heat_k[t] - self._rise_k) * gain
            rise[t] = self._rise_k
        return rise


def contact_heat_k(mode: IntArray, power_w: FloatArray, pack_v: FloatArray, contact_factor: FloatArray) -> FloatArray:
    """Steady temperature rise of the contacts, K, for charging power at the pack [any shape]."""
    ac_a = power_w / AC_VOLT / (1.0 - ONBOARD_LOSS)
    ac_a = np.where(ac_a > 34.0, ac_a / 3.0, ac_a)  # above one phase's 32 A, three phases
    dc_a = power_w / np.maximum(pack_v, 50.0)
    rise = np.where(mode == AC, AC_K_PER_A2 * ac_a**2, np.where(mode == DC, DC_K_PER_A2 * dc_a**2, 0.0))
    return rise * contact_factor

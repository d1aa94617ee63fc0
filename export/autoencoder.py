"""The anomaly detector: an LSTM autoencoder over the window pooled to 5 s means, with its normalisation inside.

What it has never seen it reconstructs badly. `reconstruction_error` is the mean squared error a signal, in units of the
signal's own training deviation; `anomaly_score` its mean over the signals that were there, each relative to its usual
error (`error_scale`). Missing steps are filled with the signal's mean over the window before they enter the LSTM, and
count nowhere; so a vehicle that reports every 30 s, or lacks a signal, still gets a sensible answer.

Training is left to `cloud.training`; this file is the architecture, and how it is stored.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_agent.contract.errors import BundleError
from export import masked
from export.features import export_module
from export.masked import Values

DEVIATION_LIMIT = 8.0  # of a normalised value: beyond it more is not more anomalous, and int8 keeps its resolution
LEAST_STD = 1e-3  # of a signal that never moved in training, in its own unit
INPUTS = ("pooled",)
OUTPUTS = ("reconstruction_error", "anomaly_score")


class Autoencoder(nn.Module):
    """forward(pooled [B, P, S], NaN = missing) → reconstruction_error [B, S], anomaly_score [B]; both finite.

    `mean` and `std` are per signal [S]; `error_scale` [S] is the signal's usual error on healthy vehicles, 1 until
    training has measured it. Shapes: encoder LSTM S → H, its last state → latent, repeated P times → decoder LSTM → S.
    """

    def __init__(
        self,
        signals: int,
        hidden: int = 32,
        *,
        latent: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.signals, self.hidden, self.latent = signals, hidden, latent or max(2, hidden // 2)
        self.encoder = nn.LSTM(signals, hidden, batch_first=True)
        self.to_latent = nn.Linear(hidden, self.latent)
        self.decoder = nn.LSTM(self.latent, hidden, batch_first=True)
        self.to_signals = nn.Linear(hidden, signals)
        self.mean: Tensor
        self.std: Tensor
        self.error_scale: Tensor
        self.register_buffer("mean", torch.zeros(signals) if mean is None else torch.tensor(mean, dtype=torch.float32))
        spread = torch.ones(signals) if std is None else torch.tensor(std, dtype=torch.float32)
        self.register_buffer("std", spread.clamp(min=LEAST_STD))
        self.register_buffer("error_scale", torch.ones(signals))

    def normalise(self, pooled: Tensor) -> Values:
        """[B, P, S] → normalised values, bounded, with gaps filled by the signal's mean; and which were present."""
        x = masked.split(pooled)
        z = ((x.value - self.mean) / self.std).clamp(-DEVIATION_LIMIT, DEVIATION_LIMIT) * x.present
        usual = masked.mean(Values(z, x.present), 1)
        return Values(z + usual.value.unsqueeze(1) * (1 - x.present), x.present)

    def reconstruct(self, normalised: Tensor) -> Tensor:
        """[B, P, S] → [B, P, S]."""
        _, (last, _) = self.encoder(normalised)
        latent = torch.tanh(self.to_latent(last[0]))  # [B, L]
        repeated = latent.unsqueeze(1).expand(-1, normalised.shape[1], -1)
        decoded, _ = self.decoder(repeated)
        out: Tensor = self.to_signals(decoded)
        return out

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        x = self.normalise(pooled)
        error = (self.reconstruct(x.value) - x.value).square() * x.present
        by_signal = masked.mean(Values(error, x.present), 1)  # [B, S]
        score = masked.mean(Values(by_signal.value / self.error_scale, by_signal.present), 1)
        return by_signal.value, score.value

    @torch.no_grad()
    def set_error_scale(self, errors: Tensor) -> None:
        """Take the usual error of each signal from errors on healthy windows, [n, S] (0 = signal absent): the mean."""
        there = (errors > 0).to(errors.dtype)
        usual = errors.sum(0) / there.sum(0).clamp(min=1)
        # a signal that is reconstructed perfectly must not dominate by its first deviation
        self.error_scale.copy_(torch.where(there.sum(0) > 0, usual, torch.ones_like(usual)).clamp(min=0.01))


def save(model: Autoencoder, path: Path, config: dict[str, Any]) -> None:
    """Store weights, normalisation and `config` (which gets signals, hidden and latent added) in one file."""
    full = {**config, "signals": model.signals, "hidden": model.hidden, "latent": model.latent}
    torch.save({"state_dict": model.state_dict(), "config": full}, path)


def load(path: Path) -> tuple[Autoencoder, dict[str, Any]]:
    """Read what `save` stored, as data only. Raises `BundleError` when it is missing or of another kind."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        config = dict(stored["config"])
        model = Autoencoder(int(config["signals"]), int(config["hidden"]), latent=config.get("latent"))
        model.load_state_dict(stored["state_dict"])
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing; train the autoencoder first") from error
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleError(f"{path}: is not a stored autoencoder ({first}); train it again") from error
    return model.eval(), config


def export_autoencoder(model: Autoencoder, pooled_frames: int) -> bytes:
    """Write the float model as ONNX for batch 1: int8 results would depend on a batch's composition."""
    return export_module(model, (torch.zeros(1, pooled_frames, model.signals),), [*INPUTS], [*OUTPUTS], {})

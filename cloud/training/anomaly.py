"""The anomaly detector: trains `export.autoencoder.Autoencoder` on healthy windows of training vehicles only.

Whole signals are hidden at random, so that a vehicle which lacks one is not anomalous for it; what was hidden or
missing counts nowhere in the loss, as it counts nowhere in the score. The epoch that reconstructs healthy *validation*
vehicles best is kept, and the usual error of each signal is measured on these, not on what the model has seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cloud.training.config import Autoencoder as AutoencoderConfig
from cloud.training.dataset import Windows
from export import autoencoder
from export.autoencoder import Autoencoder

EVALUATION_BATCH = 512


@dataclass(frozen=True, slots=True)
class Trained:
    """The best epoch, with the losses (mean squared error, normalised) of every epoch."""

    model: Autoencoder
    best_epoch: int
    training_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    windows: int


def healthy_pooled(windows: Windows, most: int, seed: int) -> Tensor:
    """Return pooled healthy windows, [n ≤ most, P, S], NaN = missing, chosen at random."""
    rows = np.flatnonzero(windows.healthy[windows.pooled_row])
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, size=most, replace=False))
    return torch.from_numpy(np.ascontiguousarray(windows.pooled[rows]))


def train_autoencoder(
    train: Tensor,
    validation: Tensor,
    *,
    mean: npt.NDArray[np.float64],
    std: npt.NDArray[np.float64],
    config: AutoencoderConfig,
    seed: int,
    on_epoch: Callable[[float, float], None],
) -> Trained:
    """Train on [n, P, S] healthy windows; `mean` and `std` [S] normalise. `on_epoch(share done, validation loss)`.

    Without a healthy validation window the training windows stand in, and the last epoch is kept.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(config.threads)
    held_out = validation if len(validation) else train
    model = Autoencoder(train.shape[2], config.hidden, mean=mean.tolist(), std=std.tolist())
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    batches = max(1, -(-len(train) // config.batch_size))
    epochs = max(config.epochs, -(-config.least_steps // batches))
    patience = config.patience * max(1, epochs // config.epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=2 * config.learning_rate, total_steps=epochs * batches
    )
    losses: list[float] = []
    held_out_losses: list[float] = []
    best: dict[str, Tensor] = {}
    for epoch in range(epochs):
        model.train()
        total = 0.0
        order = torch.randperm(len(train))
        for start in range(0, len(train), config.batch_size):
            rows = order[start : start + config.batch_size]
            loss = _loss(model, _hide_signals(train[rows], config.signal_drop))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        losses.append(total / max(1, len(train)))
        held_out_losses.append(_evaluate(model, held_out))
        on_epoch((epoch + 1) / epochs, held_out_losses[-1])
        if held_out_losses[-1] <= min(held_out_losses):
            best = {name: value.detach().clone() for name, value in model.state_dict().items()}
        elif epoch - int(np.argmin(held_out_losses)) >= patience:
            break
    model.load_state_dict(best)
    model.eval()
    model.set_error_scale(_errors(model, held_out))
    return Trained(model, int(np.argmin(held_out_losses)), tuple(losses), tuple(held_out_losses), len(train))


def _hide_signals(batch: Tensor, share: float) -> Tensor:
    """[B, P, S] with whole signals of single windows made missing."""
    hidden = torch.rand(batch.shape[0], 1, batch.shape[2]) < share
    return batch.masked_fill(hidden, float("nan"))


def _loss(model: Autoencoder, batch: Tensor) -> Tensor:
    """Mean squared error over what is there, [B, P, S] → scalar."""
    x = model.normalise(batch)
    error = (model.reconstruct(x.value) - x.value).square() * x.present
    return error.sum() / x.present.sum().clamp(min=1.0)


@torch.no_grad()
def _evaluate(model: Autoencoder, windows: Tensor) -> float:
    model.eval()
    return sum(float(_loss(model, part)) * len(part) for part in _batches(windows)) / max(1, len(windows))


@torch.no_grad()
def _errors(model: Autoencoder, windows: Tensor) -> Tensor:
    """Reconstruction error by signal, [n, S]."""
    return torch.cat([model(part)[0] for part in _batches(windows)])


def _batches(windows: Tensor) -> list[Tensor]:
    return [windows[start : start + EVALUATION_BATCH] for start in range(0, len(windows), EVALUATION_BATCH)]


def save(trained: Trained, path: Path, config: AutoencoderConfig, pooled_frames: int, signals: tuple[str, ...]) -> None:
    """Write `lstm_ae_best.pt`."""
    autoencoder.save(
        trained.model,
        path,
        {
            "pooled_frames": pooled_frames,
            "signal_names": list(signals),
            "best_epoch": trained.best_epoch,
            "learning_rate": config.learning_rate,
        },
    )

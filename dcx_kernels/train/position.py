"""Where a training run is, and what it has counted of the epoch under way."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

__all__ = ["Position"]


@dataclass
class Position:
    """Counters that a checkpoint holds; sums are of the present epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    images: int = 0
    loss_sum: float = 0.0
    correct: int = 0

    def count(self, loss: float, correct: int, images: int) -> None:
        """Count one finished step."""
        self.step += 1
        self.batch += 1
        self.images += images
        self.loss_sum += loss * images
        self.correct += correct

    def next_epoch(self) -> None:
        """Start the next epoch."""
        self.epoch += 1
        self.batch = self.images = self.correct = 0
        self.loss_sum = 0.0

    @property
    def loss(self) -> float:
        """Mean training loss of the epoch so far."""
        return self.loss_sum / max(1, self.images)

    @property
    def accuracy(self) -> float:
        """Training accuracy of the epoch so far."""
        return self.correct / max(1, self.images)

    def as_dict(self) -> dict[str, float]:
        """Return the counters as JSON scalars."""
        return asdict(self)

    def load_dict(self, state: dict[str, float]) -> None:
        """Set the counters."""
        for field in fields(self):
            setattr(self, field.name, state[field.name])

"""Steps whose loss or gradient is NaN or infinite: skipped, then rolled back once, then the end.

A fault of the hardware or one bad batch passes; a training that diverges does not, and ends in the same place again
after its last checkpoint was loaded. The step itself leaves weights, optimizer and batch statistics as they were
(`ast_dist.step`), so what is saved is sound whenever it is saved.
"""

from ast_dist.errors import UserError


class RollBack(Exception):
    """Training goes on from the last checkpoint, on all ranks. epoch: in which it had come to nothing."""

    def __init__(self, message: str, epoch: int) -> None:
        super().__init__(message)
        self.epoch = epoch


class NonFiniteSteps:
    """Judges what the ranks agreed on; the same calls on every rank give the same verdicts.

    limit: steps in a row that are skipped. rolled_back: epochs in which the run has been rolled back before.
    """

    def __init__(self, limit: int, rolled_back: set[int]) -> None:
        self.in_row = 0
        self._limit = limit
        self._rolled_back = rolled_back

    def note(self, is_finite: bool, epoch: int, global_step: int) -> str | None:
        """Take in a step. Returns what to warn of, None where it was finite.

        epoch: the present one. global_step: steps done; the step in question lies one or two before.
        Raises RollBack above the limit, and UserError where the epoch was rolled back before.
        """
        self.in_row = 0 if is_finite else self.in_row + 1
        if is_finite:
            return None
        found = f"loss or gradient is NaN or infinite near step {global_step:,} (epoch {epoch + 1})"
        if self.in_row <= self._limit:
            return f"{found}: step skipped, {self.in_row} in a row, {self._limit} allowed"
        found += f", {self.in_row} steps in a row where fault.nonfinite_steps allows {self._limit}"
        raise self.verdict(found, epoch)

    def verdict(self, found: str, epoch: int) -> RollBack | UserError:
        """What to raise: RollBack, or UserError where the epoch was rolled back before. found: what is not finite."""
        if epoch not in self._rolled_back:
            return RollBack(f"{found}: going back to the last checkpoint", epoch)
        return UserError(
            f"{found}, and going back to the last checkpoint did not help. Checkpoints before it are sound. Lower "
            "optim.lr, set optim.clip_grad_norm or look at the data, and start anew with another --run-dir."
        )

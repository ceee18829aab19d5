"""Evaluate the state of a run: its weights, and their moving average where there is one."""

from collections.abc import Callable

from torch import nn

from ast_dist.config import LoopConfig
from ast_dist.damage import DamageLog
from ast_dist.data.loader import Loader
from ast_dist.distributed import World
from ast_dist.fault.state import TrainState
from ast_dist.reports import Reports
from ast_dist.step import TrainStep
from ast_dist.validation import evaluate


class Evaluator:
    """Scores a training's state on the validation split. All ranks must call it."""

    def __init__(
        self, config: LoopConfig, world: World, loader: Loader, step: TrainStep, state: TrainState, reports: Reports
    ) -> None:
        self._config = config
        self._world = world
        self._loader = loader
        self._step = step
        self._state = state
        self._reports = reports

    def __call__(self, damage: DamageLog, each_batch: Callable[[], None]) -> dict[str, float]:
        """The scores as `validation.evaluate` names them, the average's as val/ema_acc1 and val/ema_loss.

        The state takes the accuracy in. damage: judges what could not be decoded. each_batch: see `evaluate`.
        """
        scores, damaged = self._evaluate(self._step.module, each_batch)
        if self._step.average:
            averaged, _ = self._evaluate(self._step.average.module, each_batch)
            scores |= {f"val/ema_{name}": averaged[f"val/{name}"] for name in ("acc1", "loss")}
        self._reports.damaged(damaged)
        damage.judge(damaged)
        self._state.last_acc1 = scores["val/acc1"]
        self._state.best_acc1 = max(self._state.last_acc1, self._state.best_acc1 or 0.0)
        return scores

    def _evaluate(self, module: nn.Module, each_batch: Callable[[], None]) -> tuple[dict[str, float], list[str]]:
        return evaluate(
            module,
            self._loader,
            self._world,
            self._step.normalize,
            self._config.global_batch_size,
            self._step.autocast,
            each_batch,
            self._config.micro_batch_size,
        )

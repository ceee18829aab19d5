"""The gate in a training loop of one's own: any map-style dataset, plain PyTorch, DDP, Lightning."""

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ast_dist.config import GateConfig
from ast_dist.data.batch import upload
from ast_dist.data.order import Plan, epoch_order
from ast_dist.distributed import World
from ast_dist.errors import UserError
from ast_dist.gate.policy import Policy, PolicySetup, RememberingPolicy, checked_plan
from ast_dist.gate.registry import policy_class
from ast_dist.own_loader import GateLoader, RankBatches, check_request, loss_scales

# Stands for a number of epochs that nobody told: no epoch is among the last of so many.
_UNKNOWN_EPOCHS = 1 << 31
_STATE_KEYS = ("policy", "epoch", "plan", "plan_weights", "global_batch_size", "samples_skipped", "samples_unscored")
_OPTIONS = {field.name: field.default for field in dataclasses.fields(GateConfig)}


class Gate:
    """Trains on the samples that still teach the model something, in a loop of your own.

        gate = ast_dist.Gate(num_samples=len(dataset), target_rate=0.4)
        for epoch in range(epochs):
            for x, y, ids in gate.loader(dataset, batch_size=256, epoch=epoch):  # skips before decode
                loss = gate.loss(model(x), y, ids); loss.backward(); opt.step(); opt.zero_grad()

    Under DDP every process does the same, after `init_process_group`; `batch_size` is per process.

    num_samples: of the training set; `ids` are positions in the dataset. target_rate: share of the samples that a
    gated epoch trains on. policy: a name that `--gate.policy` takes, `module:Class`, or a subclass of
    `ast_dist.gate.policy.Policy`; policies that score batches just read (online, selective_backprop) need a training
    step of their own and are refused. epochs: length of the training, for what depends on its end: without it nothing
    is annealed, and `rate_fall` and the policy `short` are refused. labels: (num_samples,)
    class numbers, for `class_floor`. seed: of order and selection. options: any other field of
    `ast_dist.config.GateConfig`, such as `warmup_epochs` or `p_min` (at most half of the rate unless given).

    Raises UserError (a ValueError, one line) for arguments that cannot be.
    """

    def __init__(
        self,
        num_samples: int,
        target_rate: float = GateConfig.target_rate,
        *,
        policy: str | type[Policy] = "sundew",
        epochs: int | None = None,
        labels: Sequence[int] | np.ndarray | Tensor | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}, but must be at least 1: give len(dataset).")
        if epochs is not None and epochs < 1:
            raise UserError(f"epochs is {epochs}, but must be at least 1, or None where it is not known.")
        config = _gate_config(policy, target_rate, epochs, options)
        kind = policy_class(config.policy) if isinstance(policy, str) else policy
        if kind.scores_epoch is not Policy.scores_epoch:
            raise UserError(
                f"policy {config.policy} scores batches just read, which Gate cannot do in your loop. Use one that "
                "decides before an epoch (sundew, random, infobatch), or python -m ast_dist.train."
            )
        self.num_samples = num_samples
        self.seed = seed
        self.samples_skipped = 0
        """Samples that the epochs planned so far leave out."""
        self._knows_epochs = epochs is not None
        self._world = World.current()
        classes = _class_numbers(labels, num_samples, config.class_floor)
        self._policy = kind(PolicySetup(config, num_samples, epochs or _UNKNOWN_EPOCHS, seed, classes))
        self._epoch: int | None = None
        self._plan = Plan(np.zeros(0, dtype=np.int64))
        self._global_batch_size = 0
        # What `loss_scales` gives, by device.
        self._scales: dict[torch.device, Tensor] = {}
        self._unscored = 0
        self._pending_unscored: list[Tensor] = []
        self._is_merged = True

    @property
    def epochs(self) -> int | None:
        """Epochs that the policy trains (`short` has fewer than full training); None where Gate was told of none."""
        return self._policy.epochs if self._knows_epochs else None

    def loader(
        self, dataset: "Dataset[Any]", batch_size: int, epoch: int, start_batch: int = 0, **options: Any
    ) -> "GateLoader":
        """Batches of the samples that an epoch trains on; the others are never fetched from the dataset.

        dataset: map-style, (x, y, …) or a dict per sample. Batches are what your `collate_fn` makes of them (torch's
        by default), with the sample ids behind: (x, y, …, ids), or under the key "ids"; ids: (n,) int64.
        batch_size: per process, as everywhere in torch. start_batch: batches to pass over, for a resume in mid-epoch.
        options: go to torch's DataLoader (num_workers, pin_memory, …), except those that the plan decides.

        The epoch is planned here, once: later calls for the same epoch give the same batches, and earlier epochs are
        gone. The result can be iterated again and has a length. Ranks take every world_size-th sample of a global
        batch, and every rank has equally many batches and rows: where samples do not suffice, rows repeat others of
        the global batch under the id -1, which `loss` weighs 0 and never remembers. A row is not left alone, for
        BatchNorm, unless batch_size is 1.

        Every process must call it. torch's global random state is left alone; workers are seeded from seed, epoch,
        start_batch and rank. Raises UserError for a dataset of another length, an epoch gone by or beyond the last,
        options that contradict the plan, and where the ranks' plans differ.
        """
        check_request(dataset, self.num_samples, batch_size, options)
        self._check_epoch(epoch)
        self._join(World.current())
        global_batch_size = batch_size * self._world.size
        if epoch != self._epoch:
            self.merge()
            self._plan_epoch(epoch)
        num_steps = self._plan.num_steps(global_batch_size)
        if not 0 <= start_batch <= num_steps:
            raise UserError(f"start_batch is {start_batch}, but epoch {epoch} has {num_steps} batches.")
        if start_batch and self._global_batch_size not in (0, global_batch_size):
            raise UserError(
                f"start_batch is {start_batch} batches of {self._global_batch_size} samples over all processes, but "
                f"batch_size {batch_size} × {self._world.size} processes is {global_batch_size}: keep their product."
            )
        batches = RankBatches(np.asarray(self._plan.ids), batch_size, self._world.rank, self._world.size, start_batch)
        begin = functools.partial(self._begin, epoch, global_batch_size, self._world.size)
        return GateLoader(dataset, batches, (self.seed, epoch), options, begin, self.merge)

    def loss(self, logits: Tensor, labels: Tensor, ids: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of a batch, ready for `backward`; what it says of the samples is remembered.

        logits: (n, classes), any floating dtype; the arithmetic is float32. labels: (n,) integer classes, or
        (n, classes) shares of them, as mixup and cutmix make them: such a batch is trained, but nothing of it is
        remembered, and `report()` counts it under `samples_unscored`. ids: (n,) int64, from the loader, any device.

        Returns a scalar on the logits' device: W · Σ wᵢ·ℓᵢ / G over this rank's rows, with W the number of processes
        and G the samples of the whole global batch, so that DDP's mean over the ranks is the mean over the samples.
        G follows from the plan: nothing is communicated, the host does not wait, and parts of a batch
        (micro-batches) add up to the batch's loss.

        Remembered is the significance against hard, unsmoothed labels; logits that are NaN are counted, not
        remembered. Raises UserError for shapes that do not belong together and, on the CPU, for ids that this epoch
        does not train (on a GPU the loss is NaN).
        """
        _check_rows(logits, labels, ids)
        losses = F.cross_entropy(logits.float(), _targets(labels), reduction="none", label_smoothing=label_smoothing)
        loss = self.reduce(losses, ids)
        self.observe(logits, labels, ids)
        return loss

    def reduce(self, losses: Tensor, ids: Tensor) -> Tensor:
        """The scalar to call `backward` on, from a loss function of your own; pair it with `observe`.

        losses: (n,) per sample, any floating dtype. ids: (n,) int64. Weighted and normalised as `loss` is, in
        float32.
        """
        if losses.shape != ids.shape or losses.dim() != 1:
            raise UserError(f"losses have shape {tuple(losses.shape)} and ids {tuple(ids.shape)}: both must be (n,).")
        scales = self._scales_of(ids, losses.device)
        return (torch.where(scales == 0.0, 0.0, losses.float()) * scales).sum()

    def observe(self, logits: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Remember the significance of a batch's samples, from the model's answer in training; `loss` does it itself.

        logits: (n, classes). labels: (n,) integer classes; with (n, classes) shares the samples are counted only.
        ids: (n,) int64. No gradient flows, and the host does not wait for a GPU.
        """
        _check_rows(logits, labels, ids)
        ids = ids.to(logits.device, non_blocking=True)
        self._is_merged = False
        if labels.dim() == 2:
            self._pending_unscored.append((ids >= 0).sum())
            return
        with torch.no_grad():
            self._policy.observe(ids, self._policy.score(logits.detach(), _targets(labels)))

    def merge(self) -> None:
        """Share what was observed between the processes; every one of them must call it.

        A loader does it when its iteration ends, and `loader` before it plans an epoch. Call it yourself before
        `state_dict` in mid-epoch.
        """
        if self._epoch is None:
            return
        self._policy.merge(self._epoch)
        unscored = torch.tensor(sum(map(int, self._pending_unscored)))
        self._unscored += int(self._world.sum(unscored) if self._world.size > 1 else unscored)
        self._pending_unscored.clear()
        self._is_merged = True

    def report(self) -> dict[str, float]:
        """What the gate does in the present epoch, as numbers for your log.

        rate, rate_target: shares of the samples, done and meant. threshold, score_p50: nats; integral: of the
        controller (these three where the policy has them and the epoch is gated). Counts since the beginning:
        samples_skipped, samples_unscored (rows trained on mixed labels), scores_non_finite, the last two as of the
        last merge.
        """
        report = {**self._policy.report(), "samples_unscored": float(self._unscored)}
        if isinstance(self._policy, RememberingPolicy):
            report["scores_non_finite"] = float(self._policy.memory.non_finite)
        return {**report, "samples_skipped": float(self.samples_skipped)}

    def state_dict(self) -> dict[str, Any]:
        """All that later batches depend on, the present epoch's plan included (one bit a sample).

        Tensors and plain values, so `torch.load(…, weights_only=True)` reads it; the same on every rank, so rank 0's
        suffices. With one process, what was observed is merged first. With several, raises RuntimeError, on the
        ranks that call it and without waiting for others, when observations wait for `merge()`.
        """
        if self._world.size > 1 and not self._is_merged:
            raise RuntimeError("observations wait to be shared: call gate.merge() on every rank before state_dict()")
        self.merge()
        weights = self._plan.weights
        return {
            "num_samples": self.num_samples,
            "seed": self.seed,
            "policy_name": self._policy.config.policy,
            "options": dataclasses.asdict(self._policy.config),
            "policy": _plain(self._policy.state_dict()),
            "epoch": self._epoch,
            "plan": torch.from_numpy(self._plan.bits(self.num_samples)),
            "plan_weights": None if weights is None else torch.tensor(weights),
            "global_batch_size": self._global_batch_size,
            "samples_skipped": self.samples_skipped,
            "samples_unscored": self._unscored,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, with any number of processes; observations that wait are dropped.

        To go on in mid-epoch, pass the batches already trained to `loader(…, start_batch=…)`, with the same
        batch_size × processes. Raises UserError, and changes nothing, for the state of another Gate.
        """
        options, mine = dataclasses.asdict(self._policy.config), {"num_samples": self.num_samples, "seed": self.seed}
        mine["policy_name"] = options["policy"]
        for name in (*mine, "options", *_STATE_KEYS):
            if name not in state:
                raise UserError(f"this is no state of a Gate: it has no {name}. Give what gate.state_dict() returned.")
        for name, value in mine.items():
            if state[name] != value:
                argument = name.removesuffix("_name")
                raise UserError(
                    f"the state is of a Gate with {argument}={state[name]}, but this one has {argument}={value}: "
                    "make it with the same."
                )
        changed = [f"{key}={old}" for key, old in state["options"].items() if options.get(key) != old]
        if changed:
            raise UserError(f"the state is of a Gate with {', '.join(changed)}, and this one differs: make it alike.")
        self._policy.load_state_dict(state["policy"])
        self._epoch = state["epoch"]
        order = epoch_order(self.num_samples, self.seed, self._epoch or 0)
        weights = state["plan_weights"]
        weights = None if weights is None else weights.cpu().numpy().copy()
        self._plan = Plan.from_bits(state["plan"].cpu().numpy(), order, weights)
        self._global_batch_size = state["global_batch_size"]
        self.samples_skipped = state["samples_skipped"]
        self._unscored = state["samples_unscored"]
        self._scales.clear()
        self._pending_unscored.clear()
        self._is_merged = True

    def _check_epoch(self, epoch: int) -> None:
        last = self.epochs
        if epoch < 0 or (last is not None and epoch >= last):
            raise UserError(f"epoch is {epoch}, but this gate has epochs 0 … {(last or 1) - 1}: see gate.epochs.")
        if self._epoch is not None and epoch < self._epoch:
            raise UserError(
                f"epoch is {epoch}, but epoch {self._epoch} is planned already. Make a new Gate for a new training, or "
                "load the state that was saved then."
            )

    def _join(self, world: World) -> None:
        """Work with this number of processes from now on."""
        self._world = world
        several = world.size > 1
        self._policy.setup = dataclasses.replace(
            self._policy.setup,
            rank=world.rank,
            world_size=world.size,
            all_reduce=world.sum if several else None,
            gather=world.gather_rows if several else None,
        )

    def _plan_epoch(self, epoch: int) -> None:
        order = epoch_order(self.num_samples, self.seed, epoch)
        plan = checked_plan(self._policy, epoch, order)
        if self._world.size > 1:
            digests = torch.zeros(self._world.size, dtype=torch.int64)
            digests[self._world.rank] = int(plan.id[:15], 16)
            if len(set(self._world.sum(digests).tolist())) > 1:
                raise UserError(
                    f"the processes' plans of epoch {epoch} differ. Give Gate the same arguments, dataset and state on "
                    "every one of them, the seed included."
                )
        self._epoch, self._plan = epoch, plan
        self._global_batch_size = 0
        self._scales.clear()
        self.samples_skipped += self.num_samples - len(plan.ids)

    def _begin(self, epoch: int, global_batch_size: int, world_size: int) -> None:
        """Normalise by these batches from now on."""
        if epoch != self._epoch:
            raise UserError(f"this loader is of epoch {epoch}, but the gate is in epoch {self._epoch}: make a new one.")
        if world_size != World.current().size:
            raise UserError(
                f"this loader was made for {world_size} processes, but the process group has {World.current().size}: "
                "call init_process_group before gate.loader."
            )
        self._global_batch_size = global_batch_size
        scales = loss_scales(self._plan, self.num_samples, global_batch_size, world_size)
        self._scales = {torch.device("cpu"): torch.from_numpy(scales)}

    def _scales_of(self, ids: Tensor, device: torch.device) -> Tensor:
        """What each row's loss is multiplied with: (n,) float32."""
        cpu = torch.device("cpu")
        if not self._scales:
            raise UserError("gate.loss needs the ids of a batch of gate.loader: iterate over one first.")
        if device not in self._scales:
            self._scales[device] = upload(self._scales[cpu], device)
        if device != cpu:
            return self._scales[device][ids.to(device, non_blocking=True)]
        ids = ids.cpu()
        is_known = (ids >= -1) & (ids < self.num_samples)
        scales = self._scales[cpu][torch.where(is_known, ids, -1)]
        strangers = ids[~is_known | scales.isnan()]
        if len(strangers):
            raise UserError(
                f"{len(strangers)} of {len(ids)} ids are not trained in epoch {self._epoch}, the first is "
                f"{int(strangers[0])}: give the ids that came with the batch from gate.loader."
            )
        return scales


def _gate_config(
    policy: str | type[Policy], target_rate: float, epochs: int | None, options: dict[str, Any]
) -> GateConfig:
    """The gate's settings, none of which depends on an end that nobody knows."""
    for name in options:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f"Perhaps you meant {near[0]}." if near else f"There are: {', '.join(_OPTIONS)}."
            raise UserError(f"Gate has no option {name}. {hint}")
    if isinstance(policy, type) and not issubclass(policy, Policy):
        raise UserError(
            f"policy is {policy.__name__}, which is no subclass of ast_dist.gate.policy.Policy. Make it one."
        )
    name = policy if isinstance(policy, str) else f"{policy.__module__}:{policy.__name__}"
    if epochs is None:
        needing = [key for key in ("anneal_share", "rate_fall") if options.get(key)]
        if name == "short" or needing:
            what = "policy short" if name == "short" else needing[0]
            raise UserError(f"{what} needs to know when training ends: give Gate(…, epochs=…).")
    # A low target alone must do: the usual random share would not fit into it.
    options = {"p_min": min(GateConfig.p_min, target_rate / 2), **options}
    return GateConfig(policy=name, target_rate=target_rate, **options)


def _class_numbers(
    labels: Sequence[int] | np.ndarray | Tensor | None, num_samples: int, class_floor: float
) -> np.ndarray | None:
    """Labels as (num_samples,) int64."""
    if labels is None:
        if class_floor > 0:
            raise UserError(f"class_floor is {class_floor:g}, but the classes are unknown: give Gate(…, labels=…).")
        return None
    numbers = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if numbers.shape != (num_samples,):
        raise UserError(f"labels have shape {numbers.shape}, but num_samples={num_samples} needs ({num_samples},).")
    if not np.issubdtype(numbers.dtype, np.integer) or numbers.min() < 0:
        raise UserError("labels must be integers from 0 up, one class number per sample.")
    return numbers.astype(np.int64)


def _check_rows(logits: Tensor, labels: Tensor, ids: Tensor) -> None:
    is_hard = labels.dim() == 1 and not labels.is_floating_point()
    is_soft = labels.shape == logits.shape and labels.is_floating_point()
    if logits.dim() != 2 or not (is_hard or is_soft) or not len(logits) == len(labels) == len(ids) or ids.dim() != 1:
        raise UserError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)} {labels.dtype} and ids {tuple(ids.shape)} do "
            "not belong together: (n, classes), (n,) integers or (n, classes) floats, and (n,) are needed."
        )


def _targets(labels: Tensor) -> Tensor:
    return labels.float() if labels.is_floating_point() else labels.long()


def _plain(value: Any) -> Any:
    """Numbers of NumPy's as Python's, which are all that `weights_only=True` loads."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.item() if isinstance(value, np.generic) else value

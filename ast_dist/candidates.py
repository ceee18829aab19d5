"""Batches that are scored before they are trained: thinned, and gathered into full batches, equal on every rank.

A batch drawn from the loader is scored where it was read, and the policy says which rows to train. The histogram of
the scores is summed over the ranks, and the rows' weights are gathered, while the iteration's training step runs.
Before the next batch is selected both are taken in: the policy learns of the histogram, and the selected samples
join a list that all ranks share. Whenever the list holds a global batch, its first entries are trained, at most once
an iteration; entry j goes to rank j % W, and its pixels move there from the rank that read it. So every full batch is
spread evenly, and what is trained, in which batch and with which weight, follows from the scores alone and not from
the number of ranks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_dist.augmenter import Augmenter
from ast_dist.data.batch import MIN_ROWS, Batch, upload
from ast_dist.data.order import rank_share
from ast_dist.distributed import Later, World
from ast_dist.gate.policy import Policy
from ast_dist.gate.threshold import histogram
from ast_dist.mixing import Mixer
from ast_dist.step import NUM_VOTES, TrainStep


@dataclass
class _Underway:
    """A scored batch whose totals and weights are on their way: this rank's images, all ranks' ids."""

    images: Tensor
    global_ids: np.ndarray
    totals: Later
    weights: Later


class Candidates:
    """Samples between drawing and training, in the epochs that a policy scores. The same list on every rank.

    All ranks must call every method that trains or settles, at the same moment. labels: (num_samples,) of the
    training set.
    """

    def __init__(
        self,
        step: TrainStep,
        policy: Policy,
        augment: Augmenter,
        mixer: Mixer,
        labels: np.ndarray,
        world: World,
        global_batch_size: int,
    ) -> None:
        self._step = step
        self._policy = policy
        self._augment = augment
        self._mixer = mixer
        self._labels = labels
        self._world = world
        self._global_batch_size = global_batch_size
        # Entries that wait, in the order in which they are trained; owners: the ranks that hold their pixels.
        self._ids = np.zeros(0, dtype=np.int64)
        self._weights = np.zeros(0, dtype=np.float32)
        self._owners = np.zeros(0, dtype=np.int64)
        # Augmented pixels of the entries that this rank owns, in the list's order: what was scored is trained.
        side = step.config.data.image_size
        self._images = torch.zeros((0, 3, side, side), dtype=torch.uint8, device=world.device)
        self._underway: _Underway | None = None
        self._drawn = self._selected = self._steps = 0

    @property
    def ids(self) -> np.ndarray:
        """Samples selected and not yet trained, (k,) int64, in the order in which they will be."""
        return self._ids

    def advance(
        self, host_batch: Batch, global_ids: np.ndarray, lr: float, epoch: int, *, stop: bool, save: bool
    ) -> tuple[int, list[int] | None]:
        """Score a batch, and train one where a full one waits.

        host_batch: this rank's rows, on the CPU. global_ids: (n,) those of all ranks. stop, save: this rank's votes.
        Returns how many samples were trained over all ranks, and the summed votes of the batch before, None at first.
        """
        votes = self.settle()
        self._score(host_batch, global_ids, epoch, stop=stop, save=save)
        is_full = len(self._ids) >= self._global_batch_size
        return (self._train(self._global_batch_size, lr, epoch) if is_full else 0), votes

    def settle(self) -> list[int] | None:
        """Wait for what is under way and take it in; returns that batch's summed votes, None where nothing was."""
        if self._underway is None:
            return None
        batch, self._underway = self._underway, None
        totals = batch.totals.get()
        self._policy.absorb(totals[NUM_VOTES:])
        # Rank r's row k is the global batch's row k·W + r.
        weights = batch.weights.get().view(self._world.size, -1).T.flatten()[: len(batch.global_ids)].numpy()
        chosen = np.flatnonzero(weights > 0.0)
        owners = chosen % self._world.size
        rows = chosen[owners == self._world.rank] // self._world.size
        self._ids = np.concatenate([self._ids, batch.global_ids[chosen]])
        self._weights = np.concatenate([self._weights, weights[chosen]])
        self._owners = np.concatenate([self._owners, owners])
        self._images = torch.cat([self._images, batch.images[self._on_device(rows)]])
        votes: list[int] = totals[:NUM_VOTES].tolist()
        self._drawn += votes[0]
        self._selected += len(chosen)
        return votes

    def drain(self, lr: float, epoch: int) -> int:
        """Train all that waits, at an epoch's end; the last batch may be short. Returns how many samples it was."""
        trained = 0
        while len(self._ids):
            trained += self._train(min(self._global_batch_size, len(self._ids)), lr, epoch)
        return trained

    def report(self) -> dict[str, float]:
        """For the metrics, by their key after `gate/`: the share of this epoch's scored samples that was selected."""
        return {"rate": self._selected / self._drawn} if self._drawn else {}

    def epoch_done(self) -> None:
        """Begin to count anew."""
        self._drawn = self._selected = self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The list without pixels, which are read again. Raises RuntimeError when something is under way."""
        if self._underway is not None:
            raise RuntimeError("settle the candidates on all ranks before taking their state")
        counts = {"drawn": self._drawn, "selected": self._selected, "steps": self._steps}
        return {"ids": torch.from_numpy(self._ids), "weights": torch.from_numpy(self._weights), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, at any world size; `restore` then brings the pixels back."""
        self._ids, self._weights = state["ids"].numpy().copy(), state["weights"].numpy().copy()
        self._owners = np.arange(len(self._ids)) % self._world.size
        self._drawn, self._selected, self._steps = state["drawn"], state["selected"], state["steps"]
        self._images, self._underway = self._images[:0], None

    def restore(self, host_batch: Batch, epoch: int) -> list[str]:
        """Take the pixels of all that waits. All ranks must call.

        host_batch: this rank's share of `ids`. epoch: the one that selected them. Samples that cannot be read any more
        leave the list on every rank; returns their description, over all ranks.
        """
        own = rank_share(np.arange(len(self._ids)), self._world.rank, self._world.size)
        is_sound = host_batch.is_active[: len(own)].numpy()
        lost = np.concatenate(self._world.gather(own[~is_sound]))
        images = self._augment(host_batch, epoch).images
        self._images = images[self._on_device(np.flatnonzero(is_sound))]
        self._ids, self._weights = np.delete(self._ids, lost), np.delete(self._weights, lost)
        self._owners = np.delete(self._owners, lost)
        return sorted(text for texts in self._world.gather(host_batch.damaged) for text in texts)

    def _score(self, host_batch: Batch, global_ids: np.ndarray, epoch: int, *, stop: bool, save: bool) -> None:
        """Score and select a batch's rows, and begin to tell the other ranks."""
        batch = self._augment(host_batch, epoch)
        # Which rows are padding or damaged is known on the host: asking the device would mean to wait for it.
        active = upload(host_batch.is_active.nonzero().squeeze(1), self._world.device)
        scores = self._step.score_batch(batch)[active]
        selected = self._policy.select(batch.ids[active], scores).float() * batch.weights[active]
        share = -(-len(global_ids) // self._world.size)
        weights = torch.zeros(share, device=self._world.device).index_copy_(0, active, selected)
        totals = torch.cat([self._step.votes(batch, stop=stop, save=save), histogram(scores)])
        self._underway = _Underway(
            batch.images, global_ids, self._world.sum_later(totals), self._world.gather_later(weights)
        )

    def _train(self, count: int, lr: float, epoch: int) -> int:
        """Train the first `count` entries as one global batch, and return their number."""
        batch = self._take(count, epoch)
        mix = self._mixer.draw(epoch, batch.step, batch.images.shape[-1])
        scores = self._step.train(batch, lr, upload(torch.tensor(count), self._world.device), mix)
        self._policy.observe(torch.where(batch.is_active & (mix is None), batch.ids, -1), scores)
        self._steps += 1
        return count

    def _take(self, count: int, epoch: int) -> Batch:
        """Take the first `count` entries off the list; returns this rank's share of them, on its device."""
        rank, size = self._world.rank, self._world.size
        owners, here = self._owners[:count], rank_share(np.arange(count), rank, size)
        sent_to = np.flatnonzero(owners == rank) % size
        sent, received = (np.bincount(ranks, minlength=size).tolist() for ranks in (sent_to, owners[here]))
        outgoing = self._images[self._on_device(np.argsort(sent_to, kind="stable"))]
        arrived = self._world.exchange_rows(outgoing, sent, received)
        # Rows arrive by sender and, from each, in the list's order. Padding repeats the first, as the loader's does.
        num_rows = max(len(here), MIN_ROWS)
        place = np.zeros(num_rows, dtype=np.int64)
        place[np.argsort(owners[here], kind="stable")] = np.arange(len(here))
        place[len(here) :] = place[:1]
        ids = np.full(num_rows, -1, dtype=np.int64)
        labels, weights = np.zeros(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=np.float32)
        ids[: len(here)] = self._ids[:count][here]
        labels[: len(here)] = self._labels[ids[: len(here)]]
        weights[: len(here)] = self._weights[:count][here]
        nothing = arrived.new_zeros((num_rows, *arrived.shape[1:]))
        # The accuracy on all samples was measured when they were scored.
        nothing_said = torch.zeros(num_rows, device=self._world.device)
        self._ids, self._weights, self._owners = self._ids[count:], self._weights[count:], self._owners[count:]
        self._images = self._images[len(sent_to) :]
        return Batch(
            step=self._steps,
            ids=self._on_device(ids),
            images=arrived[self._on_device(place)] if len(here) else nothing,
            labels=self._on_device(labels),
            weights=self._on_device(weights),
            is_active=self._on_device(ids >= 0),
            planned=count,
            erased=self._augment.erased(ids, epoch, arrived.shape[-1]),
            chances=nothing_said,
        )

    def _on_device(self, values: np.ndarray) -> Tensor:
        return upload(torch.from_numpy(values), self._world.device)

"""Copies of tensors in the host's memory, so that training may change the tensors while the copies are written."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Staged:
    """Copies of one moment. tensors: on the CPU; to be read once `wait` has returned."""

    tensors: dict[str, Tensor]
    _began: "torch.cuda.Event | None" = None
    _ended: "torch.cuda.Event | None" = None
    # What the copies read must not be given to others before they are made.
    _sources: list[Tensor] = field(default_factory=list)

    def wait(self) -> float:
        """Wait for the copies. Returns for how many seconds they held up the GPU; 0 on a CPU, where they are made."""
        if self._began is None or self._ended is None:
            return 0.0
        self._ended.synchronize()
        self._sources.clear()
        return self._began.elapsed_time(self._ended) / 1000.0

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Staging:
    """Keeps the memory of the last copies and uses it again: new pages, and pinned ones even more, cost time.

    Only one `Staged` is valid at a time. On a GPU the copies go through pinned memory and a stream of their own; the
    host does not wait, and the training's stream waits for them, since the next step changes what they read.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> Staged:
        """Copy tensors of any device."""
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        if self._stream is None:
            for name, tensor in tensors.items():
                self._buffers[name].copy_(tensor.detach())
            return Staged(self._buffers)
        training = torch.cuda.current_stream(self._stream.device)
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            began.record()
            for name, tensor in tensors.items():
                self._buffers[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            ended.record()
        training.wait_event(ended)
        return Staged(self._buffers, began, ended, list(tensors.values()))

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype):
            return buffer
        # The same strides, where they are dense: then the copy is one piece.
        return torch.empty_like(tensor.detach(), device="cpu", pin_memory=tensor.is_cuda)


def first_nonfinite(tensors: dict[str, Tensor], folders: tuple[str, ...]) -> str | None:
    """Name of the first floating tensor that holds NaN or infinity, None where all are sound.

    folders: the first parts of the names that are looked at, such as `model` of `model/0.weight`.
    """
    for name, tensor in tensors.items():
        if name.split("/", 1)[0] not in folders or not tensor.is_floating_point():
            continue
        # The sum needs no memory, and not even the largest float32s overflow a float64.
        if not torch.isfinite(tensor.sum(dtype=torch.float64)) and not torch.isfinite(tensor).all():
            return name
        # Between two tensors training gets the interpreter.
        time.sleep(0)
    return None

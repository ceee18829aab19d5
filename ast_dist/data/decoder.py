"""Which decoder a loader uses."""

import importlib.util
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from ast_dist.data.decode_torch import TorchDecoder
from ast_dist.data.encoded import Encoded
from ast_dist.data.read import DamagedSampleError
from ast_dist.data.resize import Box
from ast_dist.data_config import DataConfig
from ast_dist.errors import UserError

if TYPE_CHECKING:
    from ast_dist.data.decode_dali import DaliBatchDecoder


@runtime_checkable
class RegionDecoder(Protocol):
    """Decodes regions of images on the CPU, in the thread that asks. Several threads may ask at once."""

    name: str

    def regions(self, samples: Sequence[Encoded], boxes: Sequence[Box]) -> list[Tensor | DamagedSampleError]:
        """The pixels of one box of each sample, (3, h, w) uint8, or why there are none; boxes lie inside."""

    def close(self) -> None: ...


def make_decoder(
    config: DataConfig, device: torch.device, threads: int, keeps_whole: bool
) -> "RegionDecoder | DaliBatchDecoder":
    """The decoder that `data.decoder` asks for.

    device: what computes; on a GPU DALI decodes there, unless crops may reach outside the images. threads: of DALI on
    the host. keeps_whole: whole images are wanted, for the cache, and auto then takes torchvision: what is decoded
    once gains nothing from decoding less of it.

    Raises UserError when DALI is asked for and does not work here.
    """
    if config.decoder == "torch" or (config.decoder == "auto" and (keeps_whole or not has_dali())):
        return TorchDecoder()
    on_gpu = device.type == "cuda" and not keeps_whole and config.crop != "padded"
    try:
        from ast_dist.data.decode_dali import DaliBatchDecoder, DaliCpuDecoder

        decoder = DaliBatchDecoder(device, threads) if on_gpu else DaliCpuDecoder()
        decoder.try_out()
    except Exception as error:  # noqa: BLE001 - an older DALI, a driver, a library: told below, raised where asked for
        if config.decoder == "dali":
            text = str(error).splitlines()[0]
            raise (
                error
                if isinstance(error, UserError)
                else UserError(f"data.decoder dali: it does not work here ({text}). Use --data.decoder torch.")
            ) from None
        warnings.warn(f"DALI does not work here, torchvision decodes: {error}", RuntimeWarning, stacklevel=2)
        return TorchDecoder()
    return decoder


def has_dali() -> bool:
    """Whether DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None

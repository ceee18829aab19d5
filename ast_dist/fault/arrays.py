"""Parts of a committed checkpoint as NumPy arrays, without torch: for pictures that must be there in a second.

A checkpoint's `.metadata` is a pickle that names classes of torch. Here every class it names is a stand-in without any
behaviour, so that nothing of torch is needed and no code of a stranger's runs. What training goes on from is read by
`contents.read`, which checks more.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ast_dist.fault.commit import DamagedCheckpointError, verify

# As in safe_load and contents, which need torch.
METADATA_NAME, STATE_NAME = ".metadata", "state.json"
MAX_BYTES = 64 << 20  # no picture wants a tensor that is larger


class _StandIn:
    """Takes whatever a pickle gives an object, and does nothing with it."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"given": state})


# The one in Python: the one in C grows its memo as a pickle demands.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_StandIn,), {})  # a new one each time: what a pickle does to it ends with it


def read_part(checkpoint: Path, dtypes: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the plain values of a checkpoint's state, and some of its tensors, once all its files are verified.

    dtypes: of the tensors that are wanted, as NumPy calls them, by name (as in `gate/threshold/counts`). Returns the
    nested plain values and the tensors that are there, each as (n,) values in the order of its memory. Raises
    DamagedCheckpointError where the checkpoint does not verify or cannot be read, OSError where the disk fails.
    """
    files = verify(checkpoint)["files"]
    try:
        plain = dict(json.loads((checkpoint / STATE_NAME).read_bytes())["state"])
        metadata = _Unpickler(io.BytesIO((checkpoint / METADATA_NAME).read_bytes())).load()
        places = {str(index.fqn): info for index, info in metadata.storage_data.items() if index.fqn in dtypes}
        return plain, {
            name: _read(checkpoint, files, info).view(np.dtype(dtypes[name]).newbyteorder("<"))
            for name, info in places.items()
        }
    except (DamagedCheckpointError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a stranger's files make of themselves, they are damaged
        raise DamagedCheckpointError(f"{checkpoint}: {', '.join(dtypes)} cannot be read ({error!r})") from None


def _read(checkpoint: Path, files: Mapping[str, Any], info: Any) -> np.ndarray:
    """The bytes of a tensor that torch.save wrote into a part of a file: (n,) uint8."""
    name, offset, length = info.relative_path, info.offset, info.length
    if name not in files or offset < 0 or not 0 < length <= MAX_BYTES:
        raise DamagedCheckpointError(f"{checkpoint}: a tensor of {length:,} bytes at {offset:,} of {name!r}")
    with (checkpoint / name).open("rb") as stream:
        stream.seek(offset)
        raw = stream.read(length)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entry = next(item for item in archive.infolist() if item.filename.endswith("/data/0"))
        if entry.compress_type != zipfile.ZIP_STORED:
            raise DamagedCheckpointError(f"{checkpoint}: a tensor of {name!r} is compressed")
        return np.frombuffer(archive.read(entry), dtype=np.uint8)

"""Shard sets behind a URL: s3://, gs://, hf://, https:// and http://, through fsspec.

    index  = open_index("s3://bucket/imagenet/train", config.data)     a folder gives what Index.open gives
    reader = open_reader(index, config.data)

The index is copied to the cache folder and memory-mapped there; shards are fetched as they are needed, whole
(`data/shard_cache.py`). Who one is, and which endpoint, is said where fsspec and the clients below it look for it: the
usual credentials of each provider; AWS_ENDPOINT_URL or FSSPEC_S3_ENDPOINT_URL for another S3 server;
FSSPEC_S3_ANON=true for a public bucket; HF_TOKEN; GOOGLE_APPLICATION_CREDENTIALS; ~/.config/fsspec for the rest.
A URL may carry a query (a signature); it is sent with every name, and no message shows it.

Not kept in bounds: copies of indices (about 60 bytes a sample), in CACHE/index; each is removed by hand.
"""

import asyncio
import contextlib
import fcntl
import os
import random
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ast_dist.data.index import (
    FIELDS,
    KEYS_NAME,
    MANIFEST_NAME,
    Index,
    field_path,
    file_sha256,
    load_field,
    read_manifest,
    replaced_file,
    sync_folder,
)
from ast_dist.data.read import Reader
from ast_dist.data.shard_cache import ShardCache
from ast_dist.data_config import DataConfig
from ast_dist.errors import RankError, UserError, described

SCHEMES = ("s3", "gs", "hf", "https", "http")
TRIES = 5
_FIRST_PAUSE_S = 0.5  # doubles with each try, and half of it is random, so that ranks do not come back together
_CHECK_DEADLINE_S = 30.0
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "RefreshError"}

Result = TypeVar("Result")


class RemoteError(RuntimeError):
    """A server or the network failed in every try: no fault of the input, and the same command goes on later."""


def is_url(location: str) -> bool:
    """Whether a location is a URL of any scheme, or webdataset's `pipe:`, and not a folder."""
    return "://" in location or location.startswith("pipe:")


def open_index(location: str, config: DataConfig) -> Index:
    """Open a finished split in a folder or behind a URL, and check that every shard is there in full.

    The index of a URL is copied to CACHE/index once for each manifest, whose bytes' SHA-256 stays the index's hash: a
    run goes on with either copy. Remote shards are checked by listing (s3, gs, hf) or by HEAD requests (http), on the
    first rank of each host, for 30 s at most; where the server allows neither, a missing shard names itself when it is
    fetched.
    Raises UserError as Index.open does, and for a scheme that is not taken, an absent package, a server that does not
    answer, or a cache smaller than the largest shard.
    """
    try:
        index = _copied_index(location, config) if is_url(location) else Index.open(location)
    except (RankError, RemoteError) as error:  # at the start, all ranks meet it, and the first one says it
        raise UserError(str(error)) from None
    if not is_url(index.data_root):
        return index
    if index.layout == "files":
        raise UserError(
            f"{index.root}: an index of loose files behind {_shown(index.data_root)}, but only shards can be fetched. "
            "Make shards: python -m data_prep.make_shards SRC DST"
        )
    files = RemoteFiles(index.data_root)
    _shard_cache(index, config, files).close()  # raises where the cache cannot be used
    if os.environ.get("LOCAL_RANK", "0") == "0":
        files.check(index.manifest["shards"])
    return index


def open_reader(index: Index, config: DataConfig) -> Reader:
    """The reader of an index, with a cache of its shards where they are remote."""
    if not is_url(index.data_root):
        return Reader(index)
    return Reader(index, _shard_cache(index, config, RemoteFiles(index.data_root)))


def cache_folder(config: DataConfig) -> Path:
    """Where copies of remote data lie: data.shard_cache_dir, or ast_dist in the user's cache folder or TMPDIR."""
    if config.shard_cache_dir:
        return Path(config.shard_cache_dir).expanduser()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ast_dist"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir(), f"ast_dist-{os.getuid()}")


class RemoteFiles:
    """The files below a URL; a `Source` for ShardCache. Safe between threads.

    Raises UserError when the scheme is not taken, or when its package is not installed.
    """

    def __init__(self, root: str) -> None:
        scheme = root.partition(":")[0].lower()
        if scheme not in SCHEMES or "://" not in root:
            raise UserError(
                f"{_shown(root)}: no data is read from {scheme}: URLs. Name a folder, or a URL that begins with "
                f"{', '.join(f'{name}://' for name in SCHEMES[:-1])} or {SCHEMES[-1]}://."
            )
        self._root, self._closed = root, threading.Event()
        self._is_http = scheme in ("http", "https")
        try:
            import fsspec

            options: dict[str, Any] = {"use_listings_cache": False}
            if self._is_http:
                import aiohttp

                # No limit to how long a shard may take, only to how long nothing may come.
                options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=30.0, sock_read=60.0)}
            self._files, _ = fsspec.url_to_fs(root.partition("?")[0], **options)
        except ImportError as error:
            raise UserError(
                f"{_shown(root)}: reading {scheme}:// needs packages that are not installed ({error}). Install them: "
                "pip install 'ast-dist[remote]'"
            ) from None

    def url(self, name: str) -> str:
        """Where a file lies, without the query."""
        return f"{_shown(self._root)}/{name}"

    def fetch(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes [start, end) of a file, or all of it.

        A server without ranges sends all of it each time; the whole file is then held in memory, and returned where
        `start` is 0.
        Tried again after errors that may pass. Raises RankError when the file is missing or may not be read, and
        RemoteError when all tries failed.
        """

        def attempt() -> bytes:
            data: bytes = self._files.cat_file(self._address(name), start=start, end=end)
            if start is None or end is None or len(data) == end - start:
                return data
            if len(data) > end:  # all of the file
                return data[start:]
            raise OSError(f"{len(data):,} bytes came of the {end - start:,} from {start:,} on")

        return self._with_retries(name, attempt)

    def download(self, name: str, path: Path) -> None:
        """Copy a file of unknown size to a new local one, as it comes. Raises as `fetch` does."""
        self._with_retries(name, lambda: self._files.get_file(self._address(name), str(path)))
        with path.open("r+b") as file:
            os.fsync(file.fileno())

    def check(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Compare what is there with the manifest's shards, where the server tells.

        Raises UserError that names the first shard that is missing or has another size.
        """
        sizes = self._sizes_by_head(shards) if self._is_http else self._sizes_by_listing(shards)
        for number, shard in enumerate(shards):
            size = sizes.get(shard["name"], shard["bytes"])
            what = f"{self.url(shard['name'])}: shard {number + 1} of {len(shards)}"
            if size is None:
                raise UserError(f"{what} is missing (the manifest states {shard['bytes']:,} bytes). Upload it.")
            if size != shard["bytes"]:
                raise UserError(
                    f"{what} has {size:,} bytes, but the manifest states {shard['bytes']:,}. Upload it again, or the "
                    "manifest that belongs to it."
                )

    def close(self) -> None:
        """Let fetches that wait to try again give up."""
        self._closed.set()

    def _address(self, name: str) -> str:
        path, question, query = self._root.partition("?")
        return f"{path.rstrip('/')}/{name}{question}{query}"

    def _with_retries(self, name: str, attempt: Callable[[], Result]) -> Result:
        errors: list[str] = []
        while True:
            try:
                return attempt()
            except Exception as error:  # noqa: BLE001 - each library has its own, and all that ends here is raised
                text = _described_without_query(error, self._root)
                if _is_final(error):
                    raise RankError(f"{self.url(name)}: {_final_words(error, text)}") from None
                errors.append(text)
            if len(errors) == TRIES or self._closed.wait(_pause_s(len(errors))):
                first = f"; the first said: {errors[0]}" if errors[0] != errors[-1] else ""
                raise RemoteError(f"{self.url(name)}: {len(errors)} tries failed: {errors[-1]}{first}")

    def _sizes_by_listing(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
        """Sizes of the shards by name, None for one that is missing; {} where listing is not allowed."""
        found: dict[str, int] = {}
        names = [str(shard["name"]) for shard in shards]
        for folder in {PurePosixPath(name).parent.as_posix() for name in names}:
            try:
                entries = self._files.ls(self._address(folder).removesuffix("/."), detail=True)
            except FileNotFoundError:
                continue
            except Exception:  # noqa: BLE001 - a server that does not list may still give: the fetch tells
                return {}
            prefix = "" if folder == "." else f"{folder}/"
            found |= {f"{prefix}{PurePosixPath(entry['name']).name}": entry["size"] for entry in entries}
        return {name: found.get(name) for name in names}

    def _sizes_by_head(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
        """Sizes of the shards by name, None for one that is missing; without those that the server did not tell."""
        from fsspec.asyn import sync

        headers = {**self._files.kwargs.get("headers", {}), "Accept-Encoding": "identity"}

        async def size(session: Any, name: str) -> int | None:
            # fsspec's own `info` takes every error, also a broken connection, for a missing file.
            async with session.head(self._address(name), allow_redirects=True, headers=headers) as response:
                if response.status in (404, 410):
                    return None
                response.raise_for_status()
                return int(response.headers["Content-Length"])

        async def all_sizes() -> dict[str, int | None]:
            session = await self._files.set_session()
            tasks = {str(shard["name"]): asyncio.ensure_future(size(session, shard["name"])) for shard in shards}
            if tasks:
                _, late = await asyncio.wait(tasks.values(), timeout=_CHECK_DEADLINE_S)
                for task in late:
                    task.cancel()
                await asyncio.gather(*tasks.values(), return_exceptions=True)
            told = {name: task for name, task in tasks.items() if not task.cancelled() and task.exception() is None}
            return {name: task.result() for name, task in told.items()}

        sizes: dict[str, int | None] = sync(self._files.loop, all_sizes)
        return sizes


def _shard_cache(index: Index, config: DataConfig, files: RemoteFiles) -> ShardCache:
    folder, capacity = cache_folder(config) / "shards", round(config.shard_cache_gb * 1e9)
    return ShardCache(folder, capacity, index.manifest["shards"], files, config.prefetch_batches + 2)


def _copied_index(url: str, config: DataConfig) -> Index:
    """The index of a URL from its copy in the cache folder, which is made where it is not there."""
    files = RemoteFiles(url)
    try:
        raw = files.fetch(MANIFEST_NAME)
    except (RankError, RemoteError) as error:
        raise UserError(
            f"{error} (this is the first file read: the URL must be that of a split, a folder with {MANIFEST_NAME}.)"
        ) from None
    try:
        folder = cache_folder(config) / "index"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            manifest, digest = _judged(Path(temporary), raw, url)
        root = folder / digest
        with _locked(folder / f"{digest}.lock"):
            if not (root / MANIFEST_NAME).is_file():
                _copy_index(files, root, raw, manifest)
    except OSError as error:
        raise UserError(
            f"{cache_folder(config)}: cannot hold the index of {_shown(url)} ({error.strerror or error}). Make room, "
            "or name another --data.shard-cache-dir."
        ) from None
    index = Index.open(root) if "data_root" in manifest else None
    if index is not None:
        return index
    fields = {name: load_field(root, name, manifest["num_samples"]) for name in [*FIELDS, KEYS_NAME]}
    return Index(root=root, manifest={**manifest, "data_root": url.rstrip("/")}, hash=digest, **fields)


def _judged(folder: Path, raw: bytes, url: str) -> tuple[dict[str, Any], str]:
    """A manifest's content and hash, or an error that names the URL."""
    (folder / MANIFEST_NAME).write_bytes(raw)
    try:
        return read_manifest(folder)
    except UserError as error:
        raise UserError(str(error).replace(str(folder), _shown(url))) from None


def _copy_index(files: RemoteFiles, root: Path, raw: bytes, manifest: Mapping[str, Any]) -> None:
    """Fetch an index beside its final name, check it, and rename. The caller holds the lock of that name."""
    temporary = root.with_suffix(".tmp")
    for leftover in (temporary, root):
        if leftover.exists():
            shutil.rmtree(leftover)
    field_path(temporary, KEYS_NAME).parent.mkdir(parents=True)
    checksums = manifest.get("index_sha256")
    for name in [*FIELDS, KEYS_NAME]:
        path = field_path(temporary, name)
        files.download(f"index/{name}.npy", path)
        stated = checksums.get(name) if isinstance(checksums, dict) else None
        if stated and (found := file_sha256(path)) != stated:
            raise UserError(
                f"{files.url(f'index/{name}.npy')}: SHA-256 {found}, but the manifest states {stated}. Upload index/ "
                "again, or the manifest that belongs to it."
            )
        try:
            load_field(temporary, name, manifest["num_samples"])
        except UserError as error:
            raise UserError(str(error).replace(str(path), files.url(f"index/{name}.npy"))) from None
    with replaced_file(temporary / MANIFEST_NAME) as file:
        file.write(raw)
    temporary.rename(root)
    sync_folder(root.parent)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pause_s(tries: int) -> float:
    longest_s = _FIRST_PAUSE_S * 2 ** (tries - 1)
    return random.uniform(longest_s / 2, longest_s)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error tells of, in any of the libraries' ways."""
    for owner, name in ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code")):
        value = getattr(owner, name, None)
        if re.fullmatch(r"[1-5]\d\d", str(value)):
            return int(str(value))
    return None


def _is_final(error: BaseException) -> bool:
    """Whether another try would end alike."""
    status = _status(error)
    return (
        isinstance(error, (FileNotFoundError, PermissionError))
        or type(error).__name__ in _NO_CREDENTIALS
        or (status is not None and 400 <= status < 500 and status not in (408, 425, 429))
    )


def _final_words(error: BaseException, text: str) -> str:
    if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
        return "not found. Check the URL, or upload the file."
    return f"may not be read ({text}). Check the credentials, and who may read there."


def _described_without_query(error: BaseException, root: str) -> str:
    text = described(error)
    return re.sub(r"\?[^\s'\")]*", "?…", text) if "?" in root else text


def _shown(url: str) -> str:
    """A URL without its query, which may hold a secret, for messages."""
    return url.partition("?")[0].rstrip("/")

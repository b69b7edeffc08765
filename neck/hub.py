"""A name on the Hugging Face Hub as a checkpoint: `facebook/sam3` -> a file in the Hub's own cache (no torch).

The cache, the token and the server are those of huggingface_hub (HF_HOME, HF_TOKEN, HF_ENDPOINT). Where a file lies in
that cache tells its repository and commit, so nothing else has to be carried through a program.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from neck.progress import count, step

SCHEME = re.compile(r"hf:/{1,2}")
"""Says that a name is one of the Hub; a Path has one slash left."""

NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>refs/[\w.-]+/[\w.-]+|[^/@]+))?(?:/(?P<file>.+))?"
)
"""As in huggingface_hub's own file system: `owner/name@revision/file`."""

FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json", ".onnx", ".plan", ".engine")
"""`weights/sam3.pt` is a path, not a repository."""

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = (INDICES[0], "model.safetensors", INDICES[1], "pytorch_model.bin")
"""How transformers names weights, in the order in which a folder of them is read."""

BESIDE = ("config.json", "preprocessor_config.json", "processor_config.json")
"""What is read beside the weights, if it is there."""

SHARDS = re.compile(r"-\d{5}-of-\d{5}\.")
COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(ValueError):
    """A repository or file of the Hub cannot be had; the message says why, and what to do."""


class HubName(NamedTuple):
    """What `owner/name@revision/file` names.

    Attributes:
        repo: `owner/name`.
        revision: a branch, a tag or a commit.
        file: a file or folder in the repository; empty for the weights that it has.
    """

    repo: str
    revision: str = "main"
    file: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repo}{revision}" + (f"/{self.file}" if self.file else "")


def hub_name(given: str | Path) -> HubName | None:
    """Reads a name of the Hub; None for a path: one that is there, or that cannot be such a name.

    `owner/name` is taken for a name only if neither it nor a folder `owner` is here; `hf://owner/name` always is one.
    """
    text = str(given)
    marked = SCHEME.match(text)
    found = NAME.fullmatch(text[marked.end() :] if marked else text)
    if not found:
        return None
    repo, revision, file = found["repo"], found["revision"], found["file"]
    if not marked:
        bare = revision is None and file is None
        here = Path(text).exists() or Path(repo.partition("/")[0]).exists()
        if here or (bare and Path(text).suffix in FILE_SUFFIXES):
            return None
    return HubName(repo, (revision or "main").replace("%2F", "/"), file or "")


def local_checkpoint(given: str | Path) -> Path:
    """The path of a checkpoint: the one that is given, or of a name on the Hub what was downloaded into its cache.

    Raises:
        HubError: what keeps the download from happening.
    """
    name = hub_name(given)
    return Path(given) if name is None else _Hub(name).download()


def hub_origin(path: Path) -> HubName | None:
    """Repository, commit and file of a path in the Hub's cache, read from the path itself; None for any other."""
    parts = Path(os.path.abspath(path)).parts
    for index, part in enumerate(parts[:-3]):
        folder, commit, file = parts[index + 1], parts[index + 2], parts[index + 3 :]
        if part.startswith("models--") and folder == "snapshots" and COMMIT.fullmatch(commit):
            return HubName(part.removeprefix("models--").replace("--", "/"), commit, "/".join(file))
    return None


class _Hub:
    """One download: what a repository has, which of it is needed, and what goes wrong."""

    def __init__(self, name: HubName) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import constants, errors
        except ImportError:
            raise HubError(
                f"{name}: this file or folder does not exist; if it is a repository on the Hugging Face Hub, "
                "install the package that downloads from it: pip install huggingface_hub"
            ) from None
        self.name, self.errors = name, errors
        self.api: Any = huggingface_hub
        self.endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        self.cache = Path(constants.HF_HUB_CACHE)
        self.commit, self.offline = name.revision, False

    def download(self) -> Path:
        """Downloads the weights and what is read beside them; returns the file, or the index of shards."""
        files = self._list()
        wanted = choose_weights(self.name, files)
        folder = wanted.rpartition("/")[0]
        beside = [name for name in (f"{folder}/{one}".lstrip("/") for one in BESIDE) if name in files]
        for name in beside:
            if name.endswith(BESIDE[0]):
                check_model(self.name, self._get(name))
        path = self._get(wanted)
        for name in (*beside, *(f"{folder}/{shard}".lstrip("/") for shard in _shards(path))):
            self._get(name)
        return path

    def _list(self) -> list[str]:
        """The files of the repository at the revision; without a connection those in the cache."""
        step(f"listing the files of {self.name} on the Hugging Face Hub")
        try:
            api = self.api.HfApi(endpoint=self.endpoint)
            found = api.repo_info(self.name.repo, revision=self.name.revision, timeout=10)
            return [one.rfilename for one in found.siblings or ()]
        except Exception as error:
            refused = self._refused(error)
            cached = None if refused else self._cached()
            if cached is None:
                raise HubError(refused or self._unreachable(error)) from None
            self.offline = True
            return cached

    def _cached(self) -> list[str] | None:
        """The files of the revision that are in the cache, None where it has none."""
        store = self.cache / f"models--{self.name.repo.replace('/', '--')}"
        ref = store / "refs" / self.name.revision
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else self.name.revision
        folder = store / "snapshots" / commit
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return files or None

    def _get(self, file: str) -> Path:
        """One file, from the cache if it is there; the first one fixes the commit of the others."""
        asked = {"revision": self.commit, "endpoint": self.endpoint, "cache_dir": self.cache}
        try:
            path = self.api.hf_hub_download(
                self.name.repo, file, **asked, local_files_only=self.offline, tqdm_class=_progress_class(file)
            )
        except Exception as error:
            raise HubError(self._refused(error) or self._unreachable(error, file)) from None
        origin = hub_origin(Path(path))
        self.commit = origin.revision if origin else self.commit
        return Path(path)

    def _refused(self, error: Exception) -> str | None:
        """What the Hub answered, if it did."""
        errors, name = self.errors, self.name
        page = f"{self.endpoint}/{name.repo}"
        if isinstance(error, errors.GatedRepoError):
            return (
                f"{name}: access to this Hugging Face repository must be requested; accept its license at "
                f"{page}, log in with `hf auth login` or set HF_TOKEN, and repeat the command"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return (
                f"{name}: the repository {name.repo} has no revision {name.revision}; its branches and tags are "
                f"listed at {page}"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"{name}: this is neither a local file nor a repository on the Hugging Face Hub "
                f"({self.endpoint}) that you may read; check the spelling, and log in with `hf auth login` or "
                "set HF_TOKEN if the repository is private"
            )
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return (
                f"{name}: the repository {name.repo} does not contain this file at revision {self.commit}; its "
                f"files are listed at {page}"
            )
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return (
                f"{name}: the Hugging Face Hub refused access (HTTP status {status}); check your token with "
                f"`hf auth whoami`, and check that your account may read {page}"
            )
        if isinstance(error, ValueError) and not isinstance(error, OSError):  # names that the Hub does not allow
            return f"{name}: {' '.join(str(error).split())}"
        return None

    def _unreachable(self, error: Exception, file: str = "") -> str:
        """What is said if the Hub did not answer, or a download broke."""
        what = f"{self.name}: {file or 'the repository'}"
        if self.offline or isinstance(error, self.errors.OfflineModeIsEnabled):
            return (
                f"{what} is not in the local cache {self.cache}, and the Hugging Face Hub cannot be reached; "
                "repeat the command with a network connection and without HF_HUB_OFFLINE, or download the "
                "repository elsewhere and pass its folder"
            )
        reason = " ".join(str(error).split())[:200]
        return (
            f"{what} could not be downloaded from {self.endpoint} ({type(error).__name__}: {reason}); check "
            "the network connection, the variable HF_ENDPOINT and the free disk space, and repeat the command"
        )


def choose_weights(name: HubName, files: Iterable[str]) -> str:
    """The file of weights to read out of those that a repository has.

    Raises:
        HubError: the named one is not there, or none or several could be meant.
    """
    files = sorted(files)
    if name.file in files:
        return name.file
    start = f"{name.file.rstrip('/')}/" if name.file else ""
    inside = [file.removeprefix(start) for file in files if file.startswith(start)]
    if not inside:
        near = difflib.get_close_matches(name.file, files, n=4, cutoff=0.3) or files[:8]
        raise HubError(
            f"{name}: the repository {name.repo} has no file or folder {name.file}; choose one of its files, such "
            f"as {', '.join(near)}"
        )
    for wanted in WEIGHTS:
        if wanted in inside:
            return start + wanted
    weights = [one for one in inside if Path(one).suffix in FILE_SUFFIXES[:5] and not SHARDS.search(one)]
    top = [one for one in weights if "/" not in one] or weights
    if len(top) == 1:
        return start + top[0]
    bare = HubName(name.repo, name.revision)
    if top:
        listed = ", ".join(top[:8])
        raise HubError(
            f"{name}: the repository contains several files with weights ({listed}); choose one, such as "
            f"{bare}/{start}{top[0]}"
        )
    raise HubError(
        f"{name}: neck-export found no PyTorch weights that it can read in this repository or folder of the Hugging "
        f"Face Hub, only files such as {', '.join(inside[:8])}. Use a repository with a SAM 3 checkpoint, e.g. "
        "facebook/sam3"
    )


def check_model(name: HubName, config: Path) -> None:
    """Refuses another model by its config.json, before gigabytes are downloaded.

    Raises:
        HubError: its model_type is not one of SAM 3's.
    """
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # nothing that can be told; the tensors decide
    if isinstance(kind, str) and not kind.startswith("sam3"):
        raise HubError(
            f"{name}: according to its {config.name}, this is a model of type {kind} and not SAM 3; use a SAM "
            "3 repository such as facebook/sam3"
        )


def _shards(path: Path) -> list[str]:
    """The shards of an index; none of another file. A damaged index is told by whoever reads it."""
    if path.name not in INDICES:
        return []
    try:
        shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(shard for shard in shards if isinstance(shard, str) and "/" not in shard)


def _progress_class(file: str) -> Any:
    """A progress bar of huggingface_hub's making that tells its bytes to neck.progress and draws nothing."""
    from huggingface_hub.utils import tqdm

    class Bytes(tqdm):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **{**options, "disable": True})
            self._tell()

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            self._tell()

        def _tell(self) -> None:
            if self.total:
                count(f"downloading {file}", int(self.n), int(self.total), "bytes")

    return Bytes

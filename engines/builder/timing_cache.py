"""TensorRT's timing cache: kernel times are saved for later builds, or replayed so that no kernel is measured."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from engines.builder.flavor import Flavor
from engines.builder.onnx_graph import BuildError, RefusedError
from engines.builder.options import BuildOptions
from export.contract.atomic import disk_errors, replacing


def timing_cache_path(flavor: Flavor, options: BuildOptions) -> Path | None:
    """Returns the path of the timing cache; its name contains flavor, version and GPU, on which times depend."""
    if options.timing_cache is None:
        return None
    gpu = flavor.gpu.name.replace(" ", "-").replace("/", "-") if flavor.gpu else "none"
    path = options.timing_cache
    return path.with_name(f"{path.stem}.{flavor.name}-{flavor.version}-{gpu}{path.suffix}")


def save_timing_cache(config: Any, flavor: Flavor, options: BuildOptions) -> tuple[dict[str, Any] | None, str | None]:
    """Saves the kernel times that a build measured, if requested; a failure does not discard the finished plan.

    Returns:
        The manifest entry of the cache (None without a cache) and why it was not saved (None if it was).
    """
    path = timing_cache_path(flavor, options)
    if path is None:
        return None, None
    cache = config.get_timing_cache()
    if cache is None:  # a config has none of its own (seen with RTX 1.7), and keeps none after a refusal
        return None, (
            f"{path}: {flavor.title} refused to load this timing cache. The file may be damaged or may come from "
            "another GPU or TensorRT version. The plan was built without the timing cache, and no kernel times were "
            "saved. Delete the file; the next build with --timing-cache then saves a new timing cache"
        )
    data = bytes(cache.serialize())
    try:
        with disk_errors(BuildError, path, "choose another --timing-cache"), replacing(path) as unfinished:
            unfinished.write_bytes(data)
    except BuildError as error:
        return None, f"the timing cache was not saved: {error}"
    return {"file": path.name, "sha256": hashlib.sha256(data).hexdigest(), "replayed": False}, None


def read_replayed(flavor: Flavor, options: BuildOptions) -> bytes | None:
    """Reads the timing cache that must contain every kernel of the build; returns None if none was requested.

    Raises:
        FlavorError: TensorRT-RTX has no timing cache.
        BuildError: the file is missing, unreadable or empty, or --timing-cache was given as well.
    """
    path = options.replay_timing
    if path is None:
        return None
    flavor.refuse(replay_timing=True)
    if options.timing_cache is not None:
        raise BuildError(
            "--replay-timing and --timing-cache cannot be used together: a build with --replay-timing does not "
            "measure kernels, so it has no kernel times to save; leave out one of the two options"
        )
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        named = timing_cache_path(flavor, BuildOptions(timing_cache=path))
        there = (
            f"use {named} instead"
            if named and named.exists()
            else "create a timing cache with `neck-export trt --timing-cache FILE`"
        )
        raise BuildError(f"No such file: {path}; {there}") from None
    except OSError as error:
        raise BuildError(
            f"{path}: the timing cache cannot be read: {error.strerror}. Check the path and the permissions of the "
            "file, or create a new timing cache with `neck-export trt --timing-cache FILE` and pass FILE to "
            "--replay-timing"
        ) from None
    if not data:
        raise BuildError(
            f"{path}: the timing cache is empty; delete this file, and build once with --timing-cache, which writes "
            "a new one"
        )
    return data


def replayed_hash(flavor: Flavor, options: BuildOptions) -> str | None:
    """Returns the SHA-256 of the cache to be replayed, which determines the plan; raises as read_replayed does."""
    data = read_replayed(flavor, options)
    return None if data is None else hashlib.sha256(data).hexdigest()


def replayed(options: BuildOptions, data: bytes | None) -> dict[str, Any] | None:
    """Returns the manifest entry of a replayed cache."""
    if options.replay_timing is None or data is None:
        return None
    return {"file": options.replay_timing.name, "sha256": hashlib.sha256(data).hexdigest(), "replayed": True}


def replay_timing(trt: Any, config: Any, path: Path, data: bytes) -> Any:
    """Makes a build choose its kernels from a saved cache, and fail if a kernel is missing in it.

    From data that it cannot read, TensorRT creates an empty cache with a warning (seen with TensorRT-RTX 1.7), in
    which every kernel would be missing. Therefore, an empty cache is refused here.

    Returns:
        The cache, which must outlive the build.

    Raises:
        BuildError: the cache belongs to another GPU or TensorRT version, or it is not a timing cache.
    """
    cache, empty = config.create_timing_cache(data), config.create_timing_cache(b"")
    there = cache is not None and len(bytes(cache.serialize())) > len(bytes(empty.serialize()))
    if not there or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BuildError(
            f"{path}: the timing cache has no kernel times for TensorRT {trt.__version__} on this GPU. A timing cache "
            "is only valid for one GPU model and one TensorRT version; create another one on this machine with "
            "`neck-export trt --timing-cache NEW_FILE`"
        )
    config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
    return cache


def missed(error: RefusedError, path: Path) -> RefusedError:
    """Returns the error of a replayed build, with the command that creates a complete cache."""
    remedy = (
        f"A build with --replay-timing fails if a kernel time is missing in the timing cache {path}. To save a "
        "complete timing cache, build a plan from the same ONNX file with the same options, but with --timing-cache "
        f"{path} instead of --replay-timing. Then pass the saved timing cache to --replay-timing"
    )
    return RefusedError(f"{error}\n{remedy}", error.reason, error.by_form)

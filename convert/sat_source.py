"""Find a released checkpoint's shards: in folders, in a tar archive, or in its downloaded parts."""

import collections
import io
import re
import tarfile
from pathlib import PurePosixPath

from etils import epath

from convert.byte_source import ByteSource, FileBytes, JoinedBytes, RangeBytes, Stream, read
from convert.errors import ConvertError
from convert.file_kinds import known_kind

_SHARD = re.compile(r"mp_rank_([0-9]{2,9})_model_states\.pt")
_LATEST_BYTES = 1000
_PART = re.compile(r"(?P<stem>.+\.tar)\.part[_.-]?(?P<number>\d+|[a-z]+)")


def find_shards(path: epath.PathLike) -> list[ByteSource]:
    """Return the shard files in order of rank.

    Args:
      path: the folder with `latest` or the one that it names, a tar archive, a folder with the
        parts of one, or one of the parts.

    Raises:
      ConvertError: no shards, several checkpoints, missing ranks or parts, or an archive that
        cannot be read.
    """
    path = epath.Path(path)
    try:
        return _find(path)
    except ImportError as error:
        raise ConvertError(
            f"{path}: its kind of address needs a library that is not here ({error}): pip install "
            "glm_jax[convert]"
        ) from error
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error}") from error


def _find(path: epath.Path) -> list[ByteSource]:
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir())
        if any(map(_PART.fullmatch, names)):
            return _in_archive(_joined(path, names))
        archives = [name for name in names if name.endswith(".tar")]
        if len(archives) == 1 and "latest" not in names:
            return _in_archive(FileBytes(path / archives[0]))
        return _in_folder(path)
    if not path.exists():
        raise ConvertError(f"{path} does not exist: give a folder, a .tar archive or its parts")
    if path.name == "latest":
        raise ConvertError(f"{path} says which shards are the latest: give {path.parent}")
    if match := _PART.fullmatch(path.name):
        stem = match["stem"]
        names = [p.name for p in path.parent.iterdir() if p.name.startswith(stem + ".part")]
        return _in_archive(_joined(path.parent, sorted(names)))
    return _in_archive(FileBytes(path))


def _in_folder(folder: epath.Path) -> list[ByteSource]:
    files: dict[str, epath.Path] = {}
    for parent in (folder, *(p for p in folder.iterdir() if p.is_dir())):
        files |= {
            str(p.relative_to(folder)): p for p in parent.iterdir() if _SHARD.fullmatch(p.name)
        }
    latest = folder / "latest"
    named = _read_latest(FileBytes(latest)) if latest.exists() else None
    if not files and named is None:
        inner = [p for p in folder.iterdir() if p.is_dir() and (p / "latest").exists()]
        if len(inner) == 1:
            return _in_folder(inner[0])
        if (folder / "config.json").exists() and (folder / "params").is_dir():
            raise ConvertError(f"{folder} holds no shards: it is a model folder already")
    chosen = _choose(list(files), named, str(folder))
    return [FileBytes(files[name]) for name in chosen]


def _in_archive(archive: ByteSource) -> list[ByteSource]:
    files: dict[str, ByteSource] = {}
    named, end = None, 0
    try:
        with tarfile.open(fileobj=io.BufferedReader(Stream(archive)), mode="r:") as tar:
            for member in tar:
                if member.offset < end or member.size < 0:
                    raise ConvertError(
                        f"{archive.name}: the entry {member.name[:100]!r} has no possible size: "
                        "fetch it again"
                    )
                end = member.offset_data + member.size
                name = PurePosixPath(member.name)
                if ".." in name.parts or name.is_absolute():
                    raise ConvertError(
                        f"{archive.name}: the name {member.name!r} leads out of the archive: it "
                        "is refused"
                    )
                if not member.isreg() or member.sparse is not None:
                    continue
                file = RangeBytes(
                    archive, f"{archive.name}:{name}", member.offset_data, member.size
                )
                if member.offset_data + member.size > archive.size:
                    # Raises an error that says what is missing.
                    file.read_into(member.size - 1, memoryview(bytearray(1)))
                if name.name == "latest":
                    named = _read_latest(file)
                if _SHARD.fullmatch(name.name):
                    files[str(name)] = file
    # From damaged numbers and text in headers, and from headers nested in headers.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        if isinstance(error, ConvertError):
            raise
        kind = known_kind(archive, "tar")
        kind = kind or f"is not a whole tar archive ({error}): fetch it again"
        raise ConvertError(f"{archive.name} {kind}") from error
    if not files and (kind := known_kind(archive, "tar")):
        raise ConvertError(f"{archive.name} {kind}")
    chosen = _choose(list(files), named, archive.name)
    return [files[name] for name in chosen]


def _read_latest(file: ByteSource) -> str:
    return read(file, 0, min(file.size, _LATEST_BYTES)).decode(errors="replace")


def _choose(names: list[str], named: str | None, where: str) -> list[str]:
    """Return the shards of one iteration, by rank.

    Args:
      named: content of `latest`, with any white space or quotes; None without the file.
    """
    by_iteration: dict[str, dict[int, str]] = collections.defaultdict(dict)
    for name in sorted(names):
        pure = PurePosixPath(name)
        match = _SHARD.fullmatch(pure.name)
        assert match is not None
        ranks = by_iteration[pure.parent.name]
        if int(match[1]) in ranks:
            raise ConvertError(f"{where} holds rank {int(match[1])} twice: {name}")
        ranks[int(match[1])] = name
    if named is not None:
        iteration = named.strip().strip("\"'").strip()
        if iteration not in by_iteration or not iteration:
            raise ConvertError(
                f"{where}: `latest` names {iteration[:100]!r}, but there is no folder of that name "
                f"with shards{_present(by_iteration)}"
            )
    elif not by_iteration:
        raise ConvertError(
            f"{where} holds no mp_rank_RR_model_states.pt: give a folder of released shards, a "
            ".tar archive of them, or its parts"
        )
    elif len(by_iteration) > 1:
        raise ConvertError(
            f"{where} holds shards of several iterations, and no `latest`"
            f"{_present(by_iteration)}: give the folder of one"
        )
    else:
        iteration = next(iter(by_iteration))
    ranks = by_iteration[iteration]
    for expected, rank in enumerate(sorted(ranks)):
        if rank != expected:
            raise ConvertError(
                f"{where}: the shard mp_rank_{expected:02d}_model_states.pt is missing"
            )
    return [ranks[rank] for rank in sorted(ranks)]


def _present(by_iteration: dict[str, dict[int, str]]) -> str:
    found = ", ".join(sorted(by_iteration)[:5])
    return f" (there is {found})" if found else ""


def _joined(folder: epath.Path, names: list[str]) -> ByteSource:
    """Return the archive that the parts make in the order of their numbers."""
    parts: dict[int, str] = {}
    stem, is_lettered, width = "", False, 0
    for name in names:
        match = _PART.fullmatch(name)
        if match is None:
            if ".part" in name:
                raise ConvertError(f"{folder / name} is no part's name: remove or rename it")
            continue
        number = match["number"]
        if stem not in ("", match["stem"]):
            raise ConvertError(f"{folder} holds parts of {stem} and of {match['stem']}: give one")
        stem, width = match["stem"], len(number)
        is_lettered = not number.isdigit()
        index = int(number) if number.isdigit() else _from_letters(number)
        if index in parts:
            raise ConvertError(f"{folder}: {parts[index]} and {name} are the same part: remove one")
        parts[index] = name
    # Some count from one. An archive says itself where it begins.
    first = 1 if min(parts) == 1 and _is_tar(FileBytes(folder / parts[1])) else 0
    for index in range(first, max(parts)):
        if index not in parts:
            label = _to_letters(index, width) if is_lettered else f"{index:0{width}d}"
            raise ConvertError(f"{folder}: part {label} of {stem} is missing: fetch it")
    files = [FileBytes(folder / parts[index]) for index in sorted(parts)]
    usual = collections.Counter(file.size for file in files[:-1]).most_common(1)
    for i, file in enumerate(files):
        is_last = i == len(files) - 1
        if usual and (file.size > usual[0][0] if is_last else file.size != usual[0][0]):
            raise ConvertError(
                f"{file.name} has {file.size} bytes, the parts before the last have "
                f"{usual[0][0]}: fetch it again"
            )
    return JoinedBytes(str(folder / stem), files)


def _is_tar(source: ByteSource) -> bool:
    return source.size > 512 and read(source, 257, 5) == b"ustar"


def _from_letters(text: str) -> int:
    """Return 0 for aa, 1 for ab, as the `split` command counts."""
    number = 0
    for letter in text:
        number = 26 * number + ord(letter) - ord("a")
    return number


def _to_letters(number: int, width: int) -> str:
    letters = ""
    for _ in range(width):
        letters = chr(ord("a") + number % 26) + letters
        number //= 26
    return letters

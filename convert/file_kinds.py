"""Recognise files of another kind than the expected one, and say what to do; check names."""

import re

from convert.byte_source import ByteSource, read

_HEAD = 512
# torch.save wrote it first, as a pickle of its own, up to PyTorch 1.5.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7-zip",
    b"Rar!": "rar",
}
_WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<error", b"<!--")


def is_plain_name(name: str) -> bool:
    """Return whether a name, from a flag or a file, can be a file's or a folder's and no path."""
    return re.fullmatch(r"\w[\w.+-]{0,200}", name) is not None


def known_kind(source: ByteSource, expected: str) -> str | None:
    """Describe a file of another kind than expected, and what to do, to follow its name.

    Args:
      expected: "zip", "tar", "safetensors" or "json".

    Returns:
      Such as "is empty: fetch it again"; None for the expected kind or an unknown one.
    """
    if not source.size:
        return "is empty: fetch it again"
    head = bytes(read(source, 0, min(_HEAD, source.size)))
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return f"is compressed ({name}): decompress it"
    if head.startswith(b"version https://") and b"oid sha256:" in head:
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"
    if text.startswith(_WEB_PAGE):
        return (
            "is a web page, not the file itself (of an error or a login, often): open it to read "
            "why, and download the file again"
        )
    if expected != "json" and text.startswith((b'{"', b"{'")):
        return "is JSON, not the file itself (a server's error, often): read it, and download again"
    if _LEGACY_MAGIC in head[:32]:
        return (
            "is in the format that PyTorch had before 1.6, which is no zip file: rewrite it with "
            "PyTorch, torch.save(torch.load(FILE, map_location='cpu'), FILE)"
        )
    if expected != "zip" and head.startswith(b"PK\x03\x04"):
        return "is a zip file, one shard perhaps: give the folder that holds all shards"
    if expected != "tar" and head[257:262] == b"ustar":
        return "is a tar archive: give it, or its parts, as the input, not as a shard"
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < source.size
    if expected != "safetensors" and is_safetensors:
        return "is a safetensors file: give the folder that it and its index lie in"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "is a pickle by itself, not a PyTorch zip file: save it with torch.save"
    if head[:1] == b"\n" and head[2:3] == b"\n" and b"<unk>" in head:
        return "is a tokenizer's file (sentencepiece): give the model's folder instead"
    if len(head) == _HEAD and not any(head):
        return "begins with zeros, as an unfinished download does: fetch it again"
    return None

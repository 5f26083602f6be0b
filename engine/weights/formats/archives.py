"""Zip archives of torch.save, checked before torch opens them: a small one must not become a large one."""

import zipfile
from pathlib import Path

MOST_DIRECTORY = 8 << 20  # bytes of an archive's list of entries: some 80,000
MOST_PICKLE = 8 << 20  # bytes; 20,000 tensors with long names take 4 MB


def entries_of(file: Path) -> list[zipfile.ZipInfo] | None:
    """The entries of a zip archive; None for all that is none. ValueError for a list of entries that is too long."""
    try:
        with file.open("rb") as opened:
            end = zipfile._EndRecData(opened)  # type: ignore[attr-defined]
            if end is None:
                return None
            if (size := end[zipfile._ECD_SIZE]) > MOST_DIRECTORY:  # type: ignore[attr-defined]
                raise ValueError(f"{file}: got an archive whose list of entries has {size} bytes, "
                                 f"expected at most {MOST_DIRECTORY}")  # fmt: skip
            with zipfile.ZipFile(opened) as archive:
                return archive.infolist()
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, NotImplementedError):
        return None


def check_checkpoint(file: Path, entries: list[zipfile.ZipInfo]) -> None:
    """ValueError for an archive that torch.save cannot have written: packed, overlapping, or with bytes before it."""
    size = file.stat().st_size
    if packed := next((one for one in entries if one.compress_type != zipfile.ZIP_STORED), None):
        raise ValueError(f"{file}: got {packed.filename[:60]!a} packed, expected entries as torch.save stores them")
    total = sum(max(one.file_size, one.compress_size) for one in entries)
    if total > size:
        raise ValueError(f"{file}: got entries of {total} bytes in a file of {size}, expected them beside each other")
    if large := next((one for one in entries if one.filename.endswith(".pkl") and one.file_size > MOST_PICKLE), None):
        raise ValueError(f"{file}: got {large.filename[:60]!a} of {large.file_size} bytes, "
                         f"expected at most {MOST_PICKLE}")  # fmt: skip
    with file.open("rb") as opened:
        end = zipfile._EndRecData(opened)  # type: ignore[attr-defined]
        opened.seek(min(end[zipfile._ECD_OFFSET], size))  # type: ignore[attr-defined]
        start = opened.read(4)
    # Python finds the list of entries from the end of the file and torch by its offset: both must mean the same one.
    last = end[zipfile._ECD_LOCATION] + zipfile.sizeEndCentDir == size  # type: ignore[attr-defined]
    if not last or (entries and start != zipfile.stringCentralDir):  # type: ignore[attr-defined]
        raise ValueError(f"{file}: got an archive with bytes around it, expected a file as torch.save writes it")

"""What kind of file a file is, by its first bytes: one that is read, or a known other one, which is named."""

from pathlib import Path

from engine.weights.formats.archives import check_checkpoint, entries_of

_READ = "safetensors, a torch checkpoint or GGUF"
# Beginnings of files of other programs, and what those are.
_SIGNATURES = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras or TensorFlow)"), (b"\x08\x01\x12", "a TensorFlow model (SavedModel)"),
    (b"\x93NUMPY", "a NumPy array"), (b"ftrt", "a TensorRT engine"), (b"ggjt", "a GGML file from before GGUF"),
    (b"tjgg", "a GGML file from before GGUF"), (b"lmgg", "a GGML file from before GGUF"), (b"\x1f\x8b", "a gzip file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"), (b"Rar!", "a rar archive"), (b"\x28\xb5\x2f\xfd", "a zstd file"),
)  # fmt: skip
_ONNX_FIELDS = b"\x12\x1a\x22\x28\x32\x3a\x42\x72"  # that may follow the version at the beginning of a model
_TENSORFLOW_INDEX = bytes.fromhex("57fb808b247547db")  # the last bytes of a checkpoint's .index
# A file inside a zip archive that is no torch.save's, and what the archive is.
_ARCHIVES = (
    ("/models/model.json", "a program of torch.export (.pt2)"),
    ("serialized_exported_program.json", "a program of torch.export (.pt2)"),
    ("archive_format", "a program of torch.export or AOTInductor (.pt2)"),
    ("/constants.pkl", "a TorchScript archive (torch.jit.save)"), (".npy", "an archive of NumPy arrays (.npz)"),
    ("model.weights.h5", "a Keras model"), (".safetensors", "a zip archive of files"),
    (".gguf", "a zip archive of files"), (".pt", "a zip archive of files"), (".pth", "a zip archive of files"),
)  # fmt: skip


def kind_of(file: Path) -> str:
    """safetensors, torch or GGUF, by the first bytes. ValueError names what the file is instead."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(512)
        opened.seek(max(0, size - 8))
        end = opened.read(8)
    if start[:4] == b"GGUF":
        return "GGUF"
    # A safetensors file begins with the length of its header, which may look like the beginning of any other file.
    has_header = start[8:9] == b"{"
    whole = has_header and 8 + int.from_bytes(start[:8], "little") <= size
    # torch.save: a zip archive, or before 1.6 a pickle.
    pickled = start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[257:262] != b"ustar"
    if not whole and (start[:2] == b"PK" or pickled):
        if (other := archive_of(file)) is not None:
            raise ValueError(f"{file}: got {other}, expected safetensors, GGUF or a state dict that torch.save wrote")
        return "torch"
    if has_header:
        return "safetensors"  # a file that is cut off too: the library says how
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: got a Git LFS pointer, expected the file itself (git lfs pull)")
    if start.lstrip()[:5] == b"<?xml":
        raise ValueError(f"{file}: got an XML file (OpenVINO or another), expected {_READ}")
    if start.lstrip()[:1] == b"<":
        raise ValueError(f"{file}: got a web page, expected weights: the download failed")
    raise ValueError(f"{file}: got {_other(start, end) or _bytes(start, size)}, expected {_READ}")


def archive_of(file: Path) -> str | None:
    """What a zip archive is in words, if torch.save did not write it; None for a checkpoint and all that is no zip.

    ValueError for a checkpoint that is packed or damaged so that torch would read more than its file has.
    """
    entries = entries_of(file)
    if entries is None:
        return None
    names = [entry.filename for entry in entries]
    known = next((words for end, words in _ARCHIVES for name in names if name.endswith(end)), None)
    own = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if known is not None and not (own and "torch" not in known.lower()):
        return known
    check_checkpoint(file, entries)
    return None


def _other(start: bytes, end: bytes) -> str | None:
    """What a file of another program is, in words."""
    if found := next((words for signature, words in _SIGNATURES if start.startswith(signature)), None):
        return found
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite model"
    if start[257:262] == b"ustar":
        return "a tar archive"
    if end == _TENSORFLOW_INDEX:
        return "the index of a TensorFlow checkpoint"
    if len(start) > 2 and start[0] == 8 and start[1] <= 32 and start[2] in _ONNX_FIELDS:
        return "an ONNX model"
    # A table whose first key is a text: of up to 15 entries, or with their number in 2 or 4 bytes.
    after = {0xDE: 3, 0xDF: 5}.get(start[0], 1 if 0x81 <= start[0] <= 0x8F else 0) if start else 0
    if after and len(start) > after and (0xA1 <= start[after] <= 0xBF or start[after] == 0xD9):
        return "a Flax checkpoint (msgpack)"
    return None


def _bytes(start: bytes, size: int) -> str:
    return f"{size} bytes that start with {start[:8]!r}" if start else "an empty file"

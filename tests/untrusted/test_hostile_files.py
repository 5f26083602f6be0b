"""Files that claim more than they hold, or hold what nothing should read: refused in a line and at once."""

import io
import json
import struct
import tarfile
import zipfile

import gguf
import pytest
import torch
from fuzzing import checked
from safetensors.torch import save_file

from engine.commands.inspect import inspect
from engine.files import read_json
from engine.weights.adapters import describe
from engine.weights.containers import open_container
from engine.weights.finding import part_files
from engine.weights.formats import archives, tensors
from engine.weights.formats.torch_files import load_torch
from engine.weights.sources import open_source

Q = "blocks.0.self_attn.q.weight"


def refused(read, case, said):
    """Refused in under 2 s and 200 MB, in one line that says why."""
    found = []

    def once(case):
        try:
            result = read(case)
        except (ValueError, FileNotFoundError) as error:
            found.append(str(error))
            raise
        found.append(getattr(result, "problem", None) or "")

    checked(once, case)
    assert said in found[0]


# --- safetensors


def safetensors_file(file, header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def entry(dtype="F32", shape=(1,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


ONE = json.dumps({Q: entry()}).encode()[1:-1]
HEADERS = {
    "length 2^63": (b"{}", 2**63 - 1, "expected safetensors"),
    "length 2^64": (b"{}", 2**64 - 1, "expected safetensors"),
    "a name twice": (b"{" + ONE + b"," + ONE + b"}", None, "self_attn.q.weight' twice"),
    "metadata twice": (b'{"__metadata__":{"a":"1","a":"2"}}', None, "key 'a' twice"),
    "nested": (b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", None, "at most 64 levels"),
    "overlapping": ({Q: entry(), "b": entry()}, None, "expected safetensors"),
    "beyond the file": ({Q: entry(shape=(100,), end=400)}, None, "expected safetensors"),
    "overflow": ({Q: entry(shape=(2**40, 2**40))}, None, "expected safetensors"),
    "a million dimensions": ({Q: entry(shape=[1] * 1_000_000)}, None, "of 1000000 dimensions, expected at most 8"),
    "NUL in a name": ({"a\0b": entry()}, None, "got the name 'a\\x00b'"),
    "line break in a name": ({"a\nb": entry()}, None, "got the name 'a\\nb'"),
    "long name": ({"a" * 5_000_000: entry()}, None, "of 5000000 characters for a tensor"),
    "dots": ({"a." * 50_000 + "lora_A.weight": entry()}, None, "of 100013 characters for a tensor"),
    "many": ({f"a{i}": entry(shape=[0], end=0) for i in range(30_000)}, None, "got 30000 tensors, expected at most"),
    "large": (b"{" + b" " * (9 << 20) + b"}", None, "got a header of 9437186 bytes, expected at most 8388608"),
    "a list": (b"[1]", None, "expected"), "float6": ({Q: entry("F6_E2M3")}, None, "expected"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("read", [inspect, describe])
def test_headers_of_safetensors(tmp_path, kind, read):
    header, length, said = HEADERS[kind]
    refused(read, safetensors_file(tmp_path / "w.safetensors", header, length=length), said)


def test_descriptions_of_comfyui(tmp_path):
    large = {Q: entry("F8_E4M3", (1, 1), 0, 1), f"{Q[:-6]}comfy_quant": entry("U8", [2 * 10**9], 1, 2 * 10**9 + 1)}
    file = safetensors_file(tmp_path / "large.safetensors", large, b"")
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size + 2 * 10**9 + 1)  # takes no room on the disk
    refused(inspect, file, "comfy_quant that cannot be read")
    nested = {"__metadata__": {"_quantization_metadata": "[" * 100_000}, Q: entry()}
    refused(inspect, safetensors_file(tmp_path / "nested.safetensors", nested, b"\0" * 4), "got _quantization_metadata")
    nested = {"__metadata__": {"lora_adapter_metadata": "[" * 100_000}, "blocks.0.attn1.to_q.lora_A.weight": entry()}
    refused(describe, safetensors_file(tmp_path / "lora.safetensors", nested, b"\0" * 4), "got lora_adapter_metadata")


# --- torch


def saved(file, content, **options):
    torch.save(content, file, **options)
    return file


def rewritten(file, compression=zipfile.ZIP_STORED, before=b"", after=b"", **entries):
    """The same archive with other entries, packed, or between other bytes."""
    found = zipfile.ZipFile(io.BytesIO(file.read_bytes()))
    out = io.BytesIO()
    out.write(before)
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name in found.namelist():
            archive.writestr(name, entries.get(name.rpartition("/")[2].replace(".", "_"), found.read(name)))
    file.write_bytes(out.getvalue() + after)
    return file


def zipped(file, pickled):
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", data)
    return file


def test_packed_archives(tmp_path):
    file = saved(tmp_path / "bomb.pt", {Q: torch.zeros(3_000_000)})
    assert rewritten(file, zipfile.ZIP_DEFLATED).stat().st_size < 100_000
    refused(inspect, file, "packed, expected entries as torch.save stores them")
    file = rewritten(saved(tmp_path / "pickle.pt", {Q: torch.ones(1)}), data_pkl=b"\x80\x02" + b"N0" * (5 << 20) + b".")
    refused(inspect, file, f"expected at most {archives.MOST_PICKLE}")


@pytest.mark.parametrize("place", ["before", "after"])
def test_archives_between_other_bytes(tmp_path, place):
    file = rewritten(saved(tmp_path / "w.pt", {Q: torch.ones(1)}), **{place: b"\0" * 40})
    with pytest.raises(ValueError, match="expected"):
        open_container(file)


def test_entries_that_share_their_bytes(tmp_path):
    file = saved(tmp_path / "w.pt", {Q: torch.ones(1000), "b": torch.ones(1000)})
    data = bytearray(file.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 20 : directory + 28] = struct.pack("<II", 10**6, 10**6)
    file.write_bytes(data)
    refused(inspect, file, "in a file of")


DEEP = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 5000 + b"N" + b"s" * 5000 + b"."
LOOP = b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."


@pytest.mark.parametrize("pickled", [DEEP, LOOP], ids=["deep", "loop"])
@pytest.mark.parametrize("read", [inspect, describe])
def test_dictionaries_without_an_end(tmp_path, pickled, read):
    refused(read, zipped(tmp_path / "w.pt", pickled), "dictionaries in each other")


def test_a_dictionary_in_itself_many_times(tmp_path):
    values: dict[str, object] = {"weight": torch.ones(1)}
    for _ in range(25):
        values = {"a": values, "b": values}
    refused(inspect, saved(tmp_path / "w.pt", values), "more than 200000 values")


def test_names_of_torch_checkpoints(tmp_path):
    refused(inspect, saved(tmp_path / "w.pt", {"a" * 10**6: torch.ones(1)}), "of 1000000 characters")
    many = {f"{n}.weight": torch.ones(1).expand(1) for n in range(1)} | {f"{n}.bias": None for n in range(25_000)}
    refused(inspect, saved(tmp_path / "many.pt", many), "expected at most 20000")
    refused(inspect, saved(tmp_path / "int.pt", {10**5000: torch.ones(1)}), "expected a torch checkpoint")


ODD = {
    "strides of 0": (torch.zeros(1).expand(10**6, 10**6), "that repeats 4 bytes"),
    "overlapping rows": (torch.zeros(2000).as_strided((1000, 1000), (1, 1)), "that repeats"),
    "e8m0": (torch.ones(4, 4, dtype=torch.uint8).view(torch.float8_e8m0fnu), "a tensor in float8_e8m0fnu"),
    "fnuz": (torch.ones(4, 4).to(torch.float8_e4m3fnuz), "a tensor in float8_e4m3fnuz"),
    "float4": (torch.ones(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "a tensor in float4_e2m1fn_x2"),
    "dimensions": (torch.ones([1] * 20), "a tensor of 20 dimensions"),
    "int8": (torch.ones(4, 4, dtype=torch.int8), "in int8 without a scale"),
    "bool": (torch.ones(4, 4, dtype=torch.bool), "in bool without a scale"),
    "uint16": (torch.ones(4, 4, dtype=torch.uint16), "in uint16 without a scale"),
    "complex": (torch.ones(4, 4, dtype=torch.complex32), "a tensor in complex32"),
}  # fmt: skip


NEWER = ("e8m0", "fnuz", "float4", "uint16", "complex")  # than the old format: torch writes and does not read them


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_weights(tmp_path, kind, legacy):
    tensor, said = ODD[kind]
    file = tmp_path / "w.pt"
    try:
        saved(file, {Q: tensor}, _use_new_zipfile_serialization=not legacy)
    except (RuntimeError, AttributeError, KeyError, TypeError) as error:
        pytest.skip(f"torch.save does not write it: {error}")
    refused(inspect, file, "expected" if legacy and kind in NEWER else said)
    lora = saved(tmp_path / "lora.pt", {"blocks.0.attn1.to_q.lora_A.weight": tensor,
                                        "blocks.0.attn1.to_q.lora_B.weight": torch.ones(4, 4)})  # fmt: skip
    refused(describe, lora, "expected")


def test_sizes_beyond_the_storage(tmp_path):
    """A legacy file's storage may be resized: torch would make room for what the file does not hold."""
    file = saved(tmp_path / "w.pt", {Q: torch.ones(1000, 7)}, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    sizes = b"M\xe8\x03K\x07\x86"  # (1000, 7)
    assert data.count(sizes) == 1
    file.write_bytes(data.replace(sizes, b"M\xe8\x03M\xff\xff\x86"))
    refused(inspect, file, "expected")


def test_a_tar_archive_that_begins_as_a_pickle(tmp_path):
    file = tmp_path / "w.pt"
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    data = bytearray(file.read_bytes())
    data[:2] = b"\x80\x02"
    file.write_bytes(data)
    refused(inspect, file, "a tar archive")


def test_long_legacy_pickles_end(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.weights.formats.torch_files.MOST_READS", 2000)
    content = {"a": list(range(5000)), Q: torch.ones(1)}
    file = saved(tmp_path / "w.pt", content, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="a pickle of more than 2000 values"):
        load_torch(file)


# --- GGUF


def gguf_file(file, tensors=1, fields=0, extra=b"", version=3):
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + extra)
    return file


def text(value):
    return struct.pack("<Q", len(value)) + value


def info(name=b"a", sizes=(2, 2), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def field(value, kind, name=b"general.alignment"):
    return text(name) + struct.pack("<I", kind) + value


U32, STRING, ARRAY = 4, 8, 9
GGUFS = {
    "tensors": ({"tensors": 2**63}, "9223372036854775808 tensors, at most"),
    "fields": ({"fields": 2**40}, "1099511627776 fields, at most"), "version": ({"version": 99}, "version 99"),
    "big-endian": ({"version": 3 << 24}, "a big-endian file"), "cut": ({}, "expected GGUF"),
    "name": ({"extra": struct.pack("<Q", 2**62)}, "a text of 4611686018427387904 bytes"),
    "array": ({"fields": 1, "extra": field(struct.pack("<IQ", U32, 2**40), ARRAY)}, "an array of 1099511627776"),
    "texts": ({"fields": 1, "extra": field(struct.pack("<IQ", STRING, 10**6), ARRAY)}, "expected GGUF"),
    "nested": ({"fields": 1, "extra": field(struct.pack("<IQ", ARRAY, 1), ARRAY)}, "a value of type 9"),
    "type": ({"fields": 1, "extra": field(b"", 77)}, "a value of type 77"),
    "dimensions": ({"extra": text(b"a") + struct.pack("<I", 2**31)}, "2147483648 dimensions"),
    "overflow": ({"extra": info(sizes=(2**62, 2**62))}, "which the file does not hold"),
    "nothing": ({"extra": info(sizes=(0, 2**62))}, "of 0 numbers"),
    "quantised": ({"extra": info(kind=9999)}, "expected GGUF"),
    "row": ({"extra": info(sizes=(33,), kind=8) + b"\0" * 999}, "which the file does not hold"),
    "offset": ({"extra": info(offset=2**63)}, "which the file does not hold"),
    "twice": ({"tensors": 2, "extra": info() + info()}, "the tensor 'a' twice"),
    "no UTF-8": ({"extra": info(b"\xff\xfe") + b"\0" * 99}, "expected GGUF"),
    "NUL": ({"extra": info(b"a\0b") + b"\0" * 99}, "got the name 'a\\x00b'"),
    **{f"alignment {n}": ({"fields": 1, "extra": field(struct.pack("<I", n), U32) + info() + b"\0" * 99},
                          "a power of two up to 1048576") for n in (0, 3, 2**31)},
}  # fmt: skip


@pytest.mark.parametrize("kind", GGUFS)
@pytest.mark.parametrize("read", [inspect, describe])
def test_headers_of_gguf(tmp_path, kind, read):
    options, said = GGUFS[kind]
    refused(read, gguf_file(tmp_path / "w.gguf", **options), said)


def test_a_shape_of_other_numbers_than_the_tensor_has(tmp_path):
    shape = field(struct.pack("<IQ3I", U32, 3, 2, 2, 2), ARRAY, b"comfy.gguf.orig_shape.a")
    refused(inspect, gguf_file(tmp_path / "w.gguf", fields=1, extra=shape + info() + b"\0" * 99), "as the shape of a")


def test_the_packages_own_reader_reads_the_same(tmp_path):
    shape = field(struct.pack("<IQ2I", U32, 2, 4, 1), ARRAY, b"comfy.gguf.orig_shape.a")
    skipped = field(struct.pack("<IQ", STRING, 2) + text(b"x") + text(b"yz"), ARRAY, b"tokens")
    scores = field(struct.pack("<IQ20f", 6, 20, *range(20)), ARRAY, b"scores")
    aligned = field(struct.pack("<I", 64), U32)
    extra = shape + skipped + scores + aligned + info() + info(b"b", (3,), 0, 64)
    extra += b"\0" * (-(24 + len(extra)) % 64) + struct.pack("<4f48x3f", 1, 2, 3, 4, 5, 6, 7)
    file = gguf_file(tmp_path / "w.gguf", tensors=2, fields=4, extra=extra)
    ours, theirs = open_container(file), gguf.GGUFReader(file)
    assert [part.name for part in theirs.tensors] == list(ours.tensors)
    read = dict(ours.read(ours.tensors))
    assert read["a"].shape == (4, 1)
    for part in theirs.tensors:
        assert torch.equal(read[part.name].flatten(), torch.tensor(part.data.flatten()))


# --- folders


def test_indexes_that_name_files_elsewhere(tmp_path):
    save_file({Q: torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder := tmp_path / "model").mkdir()
    index = folder / "model.safetensors.index.json"
    for name in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "a/b.safetensors",
        "a\\b",
        "",
        "..",
        "a\0",
    ):
        index.write_text(json.dumps({"weight_map": {Q: name}}))
        refused(lambda folder: part_files(folder, "transformer"), folder, "expected names of files beside the index")
    index.write_text(json.dumps({"weight_map": {Q: index.name}}))  # itself
    refused(lambda folder: open_source(folder), folder, "expected safetensors, a torch checkpoint or GGUF")
    index.write_text(json.dumps({"weight_map": {f"a{n}": f"{n}.safetensors" for n in range(5000)}}))
    refused(
        lambda folder: part_files(folder, "transformer"), folder, "got 5000 files of weights, expected at most 1000"
    )
    index.unlink()
    # A link is followed, as those of a download cache.
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert part_files(folder, "transformer").files == (folder / "model.safetensors",)


def test_many_files_and_numbers(tmp_path):
    save_file({Q: torch.ones(1)}, tmp_path / f"model-00001-of-{10**12}.safetensors")
    refused(
        lambda folder: part_files(folder, "transformer"),
        tmp_path,
        "got 1 of 1000000000000 files of model, expected number 2",
    )
    (many := tmp_path / "many").mkdir()
    for number in range(1001):
        (many / f"{number}.safetensors").touch()
    refused(inspect, many, "got 1001 files of weights, expected at most 1000")


@pytest.mark.parametrize(("content", "said"), [
    ('{"a": 1, "a": 2}', "key 'a' twice"), ("[" * 100_000, "at most 64 levels"),
    ('{"a": ' + "9" * 5000 + "}", "too many digits"),
    ('{"a": "\xff', "no UTF-8"), (" " * (65 << 20), "bytes, expected at most 67108864"),
])  # fmt: skip
def test_configurations(tmp_path, content, said):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    refused(read_json, tmp_path / "config.json", said)


def test_devices_and_pipes_are_not_read(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in ("/dev/zero", tmp_path / "pipe.safetensors"):
        refused(inspect, type(tmp_path)(path), "expected an existing file")


def test_the_limits_hold_public_models():
    """UMT5-xxl has 242 tensors and Wan2.1-14B 1,095; with two optimizers and two copies of it, 10,000."""
    assert tensors.MOST_TENSORS >= 10_000
    assert (
        max(map(len, ["_forward_module._fsdp_wrapped_module." * 4 + "blocks.39.cross_attn.norm_q.weight"]))
        < tensors.MOST_NAME
    )

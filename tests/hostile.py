"""Files that nobody honest wrote: a good one's values, keys, shapes, bytes or lengths changed a few times, as `draw` decides
(a random.Random). Each function takes what is good and gives the bytes of a file."""

import copy
import gzip
import io
import json
import struct
import warnings
import zipfile

import numpy as np

import files

NASTY = [None, True, False, 0, -1, 1, 2, 2**31, 2**63, -2**63, 2**64, 10**30, 1.5, -0.5, 1e-300, 1e308, float("inf"), float("nan"),
         "", "a", "0", "../../etc/passwd", "/etc/passwd", "<bos>", "<start_of_turn>", "\0", "\ud800", "é" * 300, "9" * 5000, "(a+)+$",
         [], {}, [[]], [{}], {"a": 1}, [0] * 1000, [None], ["a"], [1, 2], [-1], [2**40, 2**40], {"Regex": "(x+x+)+y"},
         "__proto__", "torch.load", "__import__('os')"]


def nodes(value, found=None):
    """(container, key) of every place in a JSON value."""
    found = [] if found is None else found
    for key, item in (value.items() if isinstance(value, dict) else enumerate(value)):
        found.append((value, key))
        if isinstance(item, dict | list) and len(found) < 3000:
            nodes(item, found)
    return found


def twist(value, draw, most=3):
    """A JSON value changed in one place or a few: something else there, gone, doubled, moved, deeper, under another name."""
    value = [copy.deepcopy(value)]
    for _ in range(draw.randint(1, most)):
        places = nodes(value)
        box, key = draw.choice(places)
        kind = draw.randrange(8)
        if kind < 4:
            box[key] = copy.deepcopy(draw.choice(NASTY))
        elif kind == 4 and box is not value:
            del box[key]
        elif kind == 5:
            other, there = draw.choice(places)
            box[key] = copy.deepcopy(other[there])
        elif kind == 6 and isinstance(box, dict):
            box[draw.choice(["", "a", "\0", "../x", "__metadata__", *(key for _, key in places if isinstance(key, str))])] = box.pop(key)
        elif isinstance(box[key], int | float) and not isinstance(box[key], bool):
            box[key] = draw.choice([-box[key], box[key] + 1, box[key] * 2, box[key] * 10**6, 0])
        else:
            box[key] = [box[key]]
    return value[0]


def text_of(value, draw):
    """JSON text, now and then of a kind that Python's own writer doesn't make."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, None, 1])).encode("utf-8", "surrogatepass")
    odd = draw.random()
    if odd < 0.02:
        text = b"[" * draw.choice([100, 1000, 100_000]) + text
    elif odd < 0.04:
        text = text.replace(b":", b": " + b"1" * draw.choice([10, 5000]), 1)
    elif odd < 0.06 and text[:1] == b"{":
        text = b"{" + text[1:-1] + b"," + text[1:]             # every key twice
    elif odd < 0.08:
        text = draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\0"]) + text
    return text


def bitten(data, draw, most=3):
    """Bytes with a few flipped, cut off, put in, doubled or made zero."""
    data = bytearray(data)
    for _ in range(draw.randint(1, most)):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(6)
        size = draw.choice([1, 2, 4, 8, 64])
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = draw.randbytes(size)
        elif kind == 3:
            data[at:at + size] = b""
        elif kind == 4:
            data[at:at + size] = draw.choice([b"\0", b"\xff"]) * size
        else:
            data[at:at] = data[at:at + 64 * size]
    return bytes(data)


def document(value, draw):
    """A JSON file's bytes, changed as JSON, as bytes, or both."""
    whole = text_of(twist(value, draw) if draw.random() < 0.85 else value, draw)
    return bitten(whole, draw) if draw.random() < 0.25 else whole


def lines(rows, draw):
    """A JSON lines file's bytes, with one row changed or a few."""
    out = [text_of(row, draw) if draw.random() < 0.7 else document(row, draw) for row in rows]
    whole = draw.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(out) + draw.choice([b"", b"\n"])
    return bitten(whole, draw) if draw.random() < 0.2 else whole


def tensor_file(tensors, draw, metadata=None):
    """A safetensors file's bytes: its header changed as JSON, its length lied about, bytes changed."""
    header, body = {"__metadata__": {"format": "pt"} | (metadata or {})}, b""
    for name, tensor in tensors.items():
        raw = files.raw(tensor.contiguous()).tobytes()
        header[name] = {"dtype": files.NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    if draw.random() < 0.8:
        header = twist(header, draw)
        for entry in header.values() if isinstance(header, dict) else ():
            if isinstance(entry, dict) and draw.random() < 0.1:
                entry["dtype"] = draw.choice(["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "F33", 3])
            if isinstance(entry, dict) and draw.random() < 0.1:
                first = draw.choice([0, 1, 8, len(body), len(body) + 1, 2**63, -1])
                entry["data_offsets"] = [first, draw.choice([0, 8, len(body), 2**64 - 1])]
    text = text_of(header, draw)
    size = len(text) if draw.random() < 0.9 else draw.choice([0, 1, 2**63, 2**64 - 1, 100_000_000, len(text) + len(body), len(text) - 1])
    whole = struct.pack("<Q", size & (2**64 - 1)) + text + body
    return bitten(whole, draw) if draw.random() < 0.25 else whole


def npz(arrays, draw):
    """An .npz: headers of other dtypes, orders and shapes; pickles; members missing, doubled, compressed or lied about."""
    out, odd = io.BytesIO(), draw.choice(list(arrays))               # one array alone is strange
    kind = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, array in arrays.items():
            if name != odd:
                body = io.BytesIO()
                np.save(body, array.astype("<f4"))
                archive.writestr(f"{name}.npy", body.getvalue())
                continue
            for _ in range(draw.choice([1] * 30 + [0, 2])):
                descr = draw.choice(["<f4"] * 20 + [">f4", "<f8", "<f2", "|O", "<i8", "<U9", "__import__('os')", "<f4\0", [("a", "<f4")]])
                odd_shapes = [(), (2**40, 2**40), (-1, 2), (0, 5), array.shape[::-1], (10**30,)]
                shape = array.shape if draw.random() < 0.9 else draw.choice(odd_shapes)
                head = {"descr": descr, "fortran_order": draw.choice([False] * 9 + [True, 1]), "shape": shape}
                if draw.random() < 0.05:
                    head = twist({key: list(item) if isinstance(item, tuple) else item for key, item in head.items()}, draw)
                text = repr(head).encode("latin1", "replace") + b" " * draw.choice([0, 9, 5000]) + b"\n"
                values = array.astype(descr if descr in ("<f4", ">f4", "<f8", "<f2") else "<f4")
                if draw.random() < 0.1:
                    values.reshape(-1)[:1] = draw.choice([np.nan, np.inf, -1, 6e4])
                body = draw.choice([b"\x93NUMPY\1\0"] * 20 + [b"\x93NUMPY\2\0", b"\x93NUMPX\1\0", b"\x80\4\x95"])
                body += struct.pack("<H", draw.choice([len(text)] * 20 + [0, 65535]) & 65535) + text + values.tobytes()
                if draw.random() < 0.03:
                    body += bytes(draw.choice([1, 1 << 20, 48 << 20]))       # a bomb
                warnings.simplefilter("ignore")                     # zipfile's, about names that are there twice
                archive.writestr(draw.choice([f"{name}.npy"] * 60 + [name, f"../{name}.npy", "x.npy", ""]) or "x", body)
    whole = out.getvalue()
    return bitten(whole, draw) if draw.random() < 0.3 else whole


# ---------------------------------------------------------------------------------------------------------------
# Readers: each makes a case out of `draw` in the folder `at`, and reads it as the product does


def packed(path, whole, draw):
    """The path of a file with these bytes, or of one that holds them compressed; now and then ten thousand times."""
    if draw.random() < 0.8:
        path.write_bytes(whole)
        return path
    if draw.random() < 0.05:
        whole *= draw.choice([10, 10_000]) if len(whole) < 5000 else 10
    squeezed = gzip.compress(whole, 1)
    path = path.with_name(f"{path.name}.gz")
    path.write_bytes(bitten(squeezed, draw) if draw.random() < 0.5 else squeezed)
    return path

"""Tests of the safetensors writer with an independent parse of the file's bytes."""

import json
import pathlib
import struct
import tempfile
import unittest

import numpy as np

from pirl_env_worker import safetensors

WIDTHS = {"U8": 1, "I64": 8, "F32": 4}


def parse(path):
    """Returns (meta, {name: (dtype, shape, bytes)}) after checking the format's rules: the offsets tile the rest of the file."""
    raw = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    body = raw[8 + length :]
    meta = json.loads(header.pop("__metadata__")["meta"])
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        assert first == end, f"{name} starts at {first}, expected {end}"
        count = 1
        for size in entry["shape"]:
            count *= size
        assert last - first == count * WIDTHS[entry["dtype"]]
        assert (8 + length + first) % WIDTHS[entry["dtype"]] == 0, f"{name} is not aligned"
        tensors[name] = (entry["dtype"], entry["shape"], body[first:last])
        end = last
    assert end == len(body), "bytes are left over"
    return meta, tensors


class SafetensorsTest(unittest.TestCase):
    def test_bytes_meta_and_shapes_come_back(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "new" / "data.safetensors"
            images = np.arange(2 * 1 * 3 * 5 * 3, dtype=np.uint8).reshape(2, 1, 3, 5, 3)
            state = np.array([[1.5, -2.0], [0.0, np.float32(1e-30)]], dtype=np.float32)
            # a strided view, stored in C order
            ids = np.arange(6, dtype=np.int64)[::2]
            safetensors.write(path, {"images": images, "state": state, "prompt_id": ids}, {"prompts": ["naïve", "b"]})
            meta, tensors = parse(path)
            self.assertEqual(meta, {"prompts": ["naïve", "b"]})
            self.assertEqual(tensors["images"], ("U8", [2, 1, 3, 5, 3], images.tobytes()))
            self.assertEqual(tensors["state"], ("F32", [2, 2], struct.pack("<4f", 1.5, -2.0, 0.0, 1e-30)))
            self.assertEqual(tensors["prompt_id"], ("I64", [3], struct.pack("<3q", 0, 2, 4)))

    def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "data.safetensors"
            safetensors.write(path, {"a": np.zeros(2, np.float32)}, {})
            before = path.read_bytes()
            with self.assertRaises(KeyError):
                safetensors.write(path, {"a": np.zeros(2, np.complex64)}, {})
            self.assertEqual(path.read_bytes(), before)
            self.assertEqual([p.name for p in pathlib.Path(folder).iterdir()], ["data.safetensors"])


if __name__ == "__main__":
    unittest.main()

"""The shipped digits are the published ones, and are what the docs say."""

import hashlib
import json
import struct

import pytest
import torch

from loratools.demo.digits import PATH, SIDE, load_digits

SHA256 = "50117cb95ed0352cefb160b64e5bf581d5204f50c9388653bfefd9e5ba7caae4"
CREDIT = {
    "creators": "E. Alpaydin, C. Kaynak",
    "doi": "10.24432/C50P49",
    "license": "CC BY 4.0",
    "title": "Optical Recognition of Handwritten Digits",
}


def file_of(images, labels):
    """The data file, from the values alone."""
    n = len(labels)
    header = {
        "__metadata__": CREDIT,
        "images": {"dtype": "U8", "shape": [n, 64], "data_offsets": [0, 64 * n]},
        "labels": {"dtype": "U8", "shape": [n], "data_offsets": [64 * n, 65 * n]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + images.astype("uint8").tobytes() + labels.astype("uint8").tobytes()


def test_file_is_the_pinned_one():
    assert hashlib.sha256(PATH.read_bytes()).hexdigest() == SHA256


def test_shapes_and_ranges():
    digits = load_digits()
    assert digits.images.shape == (1797, 64)
    assert digits.images.dtype == torch.float32
    assert digits.labels.shape == (1797,)
    assert digits.labels.dtype == torch.int64
    assert (digits.images.min(), digits.images.max()) == (0, 1)


def test_label_counts():
    """The counts that scikit-learn's and UCI's pages print for the test part."""
    counts = torch.bincount(load_digits().labels).tolist()
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_file_is_made_of_scikit_learns_digits():
    """Same values, same order: built again from scikit-learn, the file has the same bytes."""
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn, the source of the digits, is not installed"
    )
    source = datasets.load_digits()
    assert file_of(source.data, source.target) == PATH.read_bytes()


def test_turned_is_a_quarter_turn():
    """The upper right corner comes to the upper left; four turns change nothing."""
    digits = load_digits()
    before, after = digits.images.reshape(-1, SIDE, SIDE), digits.turned().images.reshape(-1, SIDE, SIDE)
    assert torch.equal(after[:, 0, 0], before[:, 0, -1])
    assert torch.equal(after[:, -1, 0], before[:, 0, 0])
    assert torch.equal(digits.turned().turned().turned().turned().images, digits.images)
    assert not torch.equal(digits.turned().images, digits.images)


def test_split_is_a_partition():
    digits = load_digits()
    train, test = digits.split(600, torch.Generator().manual_seed(0))
    assert (len(train.labels), len(test.labels)) == (1197, 600)
    together = torch.cat([train.images, test.images])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, digits.images.tolist()))


def test_credit_is_shipped():
    """CC BY 4.0 asks for creators, title, licence and what was changed."""
    text = PATH.with_name("DIGITS.md").read_text(encoding="utf-8")
    for words in (*CREDIT.values(), "What was changed"):
        assert words.replace("E. Alpaydin, C. Kaynak", "E. Alpaydin and C. Kaynak") in text

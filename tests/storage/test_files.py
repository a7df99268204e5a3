"""Files hold tensors and plain values, are whole or not there, and are never unpickled."""

from __future__ import annotations

import ast
import contextlib
import functools
import math
import os
import random
import signal
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import pyro_advbayes
from pyro_advbayes.storage import files
from pyro_advbayes.storage.draws import read_draws

CONTENT = {
    "tensors": [torch.arange(3), (torch.rand(2, 2), torch.tensor(True)), {"half": torch.ones(2, dtype=torch.bfloat16)}],
    "empty": [torch.empty(0, 3), [], (), {}],
    "array": np.arange(3, dtype=np.uint32),
    "plain": (None, True, 3, 2.5, math.inf, "text", [1, (2, "three")]),
    "view": torch.rand(4, 4).t()[1:],
}


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_nested_values_come_back_as_they_were(tmp_path):
    files.save(tmp_path / "file", CONTENT)
    assert same(CONTENT, files.load(tmp_path / "file"))


def test_what_was_loaded_does_not_hang_on_the_file(tmp_path):
    files.save(tmp_path / "file", {"value": torch.zeros(3)})
    loaded = files.load(tmp_path / "file")
    files.save(tmp_path / "file", {"value": torch.ones(3)})
    assert torch.equal(loaded["value"], torch.zeros(3))
    loaded["value"].add_(1.0)
    assert torch.equal(files.load(tmp_path / "file")["value"], torch.ones(3))
    loaded = files.load(tmp_path / "file")["value"]
    (tmp_path / "file").write_bytes(bytes((tmp_path / "file").stat().st_size))
    assert torch.equal(loaded, torch.ones(3)), "what was checked must not change with the file"


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: None, b"bytes", torch.float32])
def test_anything_else_is_not_written(tmp_path, value):
    with pytest.raises(TypeError, match="neither a tensor nor a plain value"):
        files.save(tmp_path / "file", {"value": value})
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    files.save(tmp_path / "file", {"value": 1})

    def half_written(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", half_written)
    with pytest.raises(OSError, match="no space left"):
        files.save(tmp_path / "file", {"value": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and files.load(tmp_path / "file") == {"value": 1}


def test_a_part_that_a_killed_process_left_is_in_nobodys_way(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "save_file", lambda tensors, path, metadata: os.kill(os.getpid(), signal.SIGKILL))
    pid = os.fork()
    if pid == 0:
        files.save(tmp_path / "file", {"value": 0})
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("file.") and left.suffix == ".part"
    files.save(tmp_path / "file", {"value": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and files.load(tmp_path / "file") == {"value": 1}


def test_a_part_that_is_being_written_is_left_alone(tmp_path):
    with files.replacing(tmp_path / "file") as part:
        files.save(tmp_path / "file", {"value": 1})
        assert {path.name for path in tmp_path.iterdir()} == {"file", Path(part.name).name}


@pytest.mark.parametrize("plant", ["file.part", "file.0123456789abcdef.part"])
def test_a_planted_link_or_another_persons_file_is_not_written_to(tmp_path, plant, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0123456789abcdef")
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / plant).symlink_to(victim)
    with contextlib.suppress(FileExistsError):
        files.save(tmp_path / "file", {"value": 1})
    assert victim.read_bytes() == b"precious" and (tmp_path / plant).is_symlink()


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    path = tmp_path / "file"
    files.save(path, CONTENT)
    whole = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(whole) - 1, len(whole) // 2, *random.Random(0).sample(range(len(whole)), 40)}
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="file is truncated, or no file of this package"):
            files.load(path)
        assert path.read_bytes() == whole[:length]


def random_bytes(path):
    path.write_bytes(random.Random(0).randbytes(1000))


def a_pickle(path):
    torch.save({"value": torch.ones(3)}, path)


def other_tensors(path):
    save_file({"value": torch.ones(3)}, path)


def other_content(path):
    save_file({}, path, metadata={"content": "no json"})


def dangling_content(path):
    save_file({}, path, metadata={"content": '{"dict": {"value": {"tensor": "t0"}}}'})


def odd_content(path):
    save_file({}, path, metadata={"content": '{"dict": {"value": {}}}'})


@pytest.mark.parametrize("write", [random_bytes, a_pickle, other_tensors, other_content, dangling_content, odd_content])
def test_another_kind_of_file_is_refused(tmp_path, write):
    write(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(ValueError, match="file is truncated, or no file of this package"):
        files.load(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before


@pytest.mark.parametrize("part", [None, 0, 1])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, part):
    """Of header and tensors; 100 of each place."""
    path, content = tmp_path / "file", {"value": torch.arange(100.0), "other": torch.arange(40), "text": "plain"}
    files.save(path, content)
    whole, refused = path.read_bytes(), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    places = {None: range(len(whole)), 0: range(header), 1: range(header, len(whole))}[part]
    generator = random.Random(0)
    for _ in range(100):
        corrupt = bytearray(whole)
        corrupt[generator.choice(places)] ^= 1 << generator.randrange(8)
        path.write_bytes(corrupt)
        try:
            assert same(content, files.load(path))
        except ValueError as error:
            refused += 1
            assert "file " in str(error)
    assert refused == 100 if part == 1 else refused > 80


def rewritten(path, **changes):
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
    metadata = {name: value for name, value in {**metadata, **changes}.items() if value is not None}
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"format version": "2"}, "file is of format version '2', and this package reads '1'"),
        ({"format version": None}, "it names no format version"),
        ({"kind": "checkpoint of APD"}, "file is no values: it is a file of kind 'checkpoint of APD'"),
        ({"kind": None}, "file is no values"),
        ({"digest": None}, "no 'digest'"),
        ({"digest": "0" * 32}, "its digest is not that of its content"),
        ({"content": "[" * 100_000}, "digest"),
    ],
)
def test_a_file_of_another_version_kind_or_content_is_refused(tmp_path, changes, says):
    files.save(tmp_path / "file", CONTENT)
    rewritten(tmp_path / "file", **changes)
    with pytest.raises(ValueError, match=says):
        files.load(tmp_path / "file")


@pytest.mark.parametrize("other", [torch.ones(4).view(torch.int32), torch.ones(2, 2)], ids=["dtype", "shape"])
def test_the_same_bytes_as_other_numbers_are_refused(tmp_path, other):
    files.save(tmp_path / "file", {"value": torch.ones(4)})
    with safe_open(tmp_path / "file", framework="pt") as file:
        metadata = file.metadata()
    save_file({"t0": other}, tmp_path / "file", metadata=metadata)
    with pytest.raises(ValueError, match="its digest is not that of its content"):
        files.load(tmp_path / "file")


@pytest.mark.parametrize(
    "plain", ["[" * 100_000, '{"dict":' * 100_000, '{"tensor": "t9"}', '{"list": 3}', '{"list": []', "{}", '{"dict": []}']
)
def test_senseless_content_with_the_right_digest_is_refused(tmp_path, plain):
    metadata = {"format version": files.VERSION, "kind": "values", "content": plain, "digest": files._digest("values", plain, {})}
    save_file({}, tmp_path / "file", metadata=metadata)
    with pytest.raises(ValueError, match="file is truncated, or no file of this package, or corrupt"):
        files.load(tmp_path / "file")


@pytest.mark.parametrize("content", [[], None, {}, {"count": -1}, {"count": True}, {"count": 1.0}, {"count": [1]}, {"count": None}])
def test_a_missing_or_senseless_field_is_refused_by_name(tmp_path, content):
    files.check_fields(tmp_path / "file", {"count": 0}, {"count": int})
    with pytest.raises(ValueError, match=r"file: (its content (is a|lacks 'count')|'count' in its content is).*: it is corrupt"):
        files.check_fields(tmp_path / "file", content, {"count": int})


def test_a_missing_file_is_missed_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing: there is no such file"):
        files.load(tmp_path / "missing")


def test_an_existing_file_is_refused_unless_asked(tmp_path):
    path = tmp_path / "file"
    files.refuse_existing(path, overwrite=False)
    path.touch()
    files.refuse_existing(path, overwrite=True)
    with pytest.raises(FileExistsError, match=r"file exists: .*overwrite=True"):
        files.refuse_existing(path, overwrite=False)
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        files.refuse_existing(tmp_path / "nowhere" / "file", overwrite=True)


def make_directory(path):
    path.mkdir()


def make_pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize("make,says", [(make_directory, "file is a directory"), (make_pipe, "file is no regular file")])
@pytest.mark.parametrize("do", [functools.partial(files.refuse_existing, overwrite=True), files.load, read_draws])
def test_what_is_no_file_is_neither_read_nor_written(tmp_path, make, says, do):
    make(tmp_path / "file")
    with pytest.raises(ValueError, match=says):
        do(tmp_path / "file")


@pytest.mark.parametrize(
    "name,says", [("n\udcff", "no UTF-8"), ("n\ud800", "no UTF-8"), ("n\0", "zero byte"), ("n" * 240, "too long"), ("n" * 300, "too long")]
)
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name, says):
    with pytest.raises(ValueError, match=says):
        files.refuse_existing(tmp_path / name, overwrite=False)


def test_a_name_as_long_as_any_that_is_accepted_can_be_written(tmp_path):
    path = tmp_path / ("n" * (255 - len(".0123456789abcdef.part")))
    files.refuse_existing(path, overwrite=False)
    files.save(path, {"value": 1})
    assert files.load(path) == {"value": 1}


def test_a_link_that_leads_nowhere_is_refused_and_one_to_a_file_is_that_file(tmp_path):
    (tmp_path / "file").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"file is a link to .*gone, which does not exist"):
        files.refuse_existing(tmp_path / "file", overwrite=True)
    (tmp_path / "gone").touch()
    with pytest.raises(FileExistsError, match="file exists"):
        files.refuse_existing(tmp_path / "file", overwrite=False)


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(PermissionError, match="no file can be written to the folder"):
        files.refuse_existing(tmp_path / "file", overwrite=False)


def test_all_random_generators_go_on_from_their_state(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002, the generator that Pyro seeds

    pyro.set_rng_seed(3)
    draw()
    files.save(tmp_path / "file", files.random_state(torch.device("cpu")))
    expected = draw()
    pyro.set_rng_seed(4)
    files.set_random_state(files.load(tmp_path / "file"), torch.device("cpu"))
    assert draw() == expected


def test_nothing_in_the_package_unpickles():
    """Also not through torch.load, joblib, or numpy's default."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in Path(pyro_advbayes.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Attribute):
                assert (getattr(node.value, "id", ""), node.attr) not in {("torch", "load"), ("torch", "save"), ("pd", "read_pickle")}, path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path


def test_a_devices_generator_is_set_on_that_device(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: found.append((state, device)))
    state = files.random_state(torch.device("cpu"))
    files.set_random_state({**state, "cuda": "its state"}, torch.device("cuda", 1))
    assert found == [("its state", torch.device("cuda", 1))]

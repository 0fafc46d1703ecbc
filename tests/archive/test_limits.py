"""What a small file can make a reader spend: memory and time, counted before they are."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dither
from benchmarks.decoding_memory import Parts, archive_of, vast
from benchmarks.mutations import closed, unpacked
from dither import Archive, ArchiveError
from dither.archive import pack, verify
from dither.archive.layout import HEAD, PARSED
from dither.archive.limits import MULTIPLICATIONS, multiplications, working_nbytes
from dither.cli import app
from dither.coding import CodingError, decode_codes, encode_codes
from dither.formats import Factors, Raw, Trellis

ZERO: Parts = {"zero": ((2,), 1 << 24), "scale": ((1,), "float32")}


def _bomb(rows: int, rank: int) -> bytes:
    """Factors of ``rows x rows`` in 224 bytes."""
    parts: Parts = {"left": ((rows, rank), 4), "right": ((rank, rows), 4), **ZERO}
    return vast(Factors(), torch.float16, (rows, rows), parts)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory that Linux tells"
)
def test_decoding_takes_what_is_counted() -> None:
    command = [sys.executable, "-m", "benchmarks.decoding_memory", "--side", "3072"]
    done = subprocess.run([*command, "--real", "700"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_that_decoding_takes_is_counted() -> None:
    shape = (1 << 12, 1 << 12)
    parts: Parts = {"levels": (shape, 16), "zero": ((1,), 1 << 23), "scale": ((1,), "float32")}
    data = vast(Trellis(), torch.float8_e5m2, shape, parts)
    need = working_nbytes(Archive.from_bytes(data).entries["t"])
    assert need > 2 << 24
    assert Archive.from_bytes(data, need)["t"].shape == shape
    with pytest.raises(ArchiveError, match=f"would take {need} bytes, more than max_nbytes"):
        Archive.from_bytes(data, need - 1)["t"]


def test_multiplications_are_counted() -> None:
    data = _bomb(30_000, 4096)
    assert len(data) < 300
    begin = time.monotonic()
    opened = Archive.from_bytes(data)
    assert multiplications(opened.entries["t"]) == 30_000**2 * 4096
    with pytest.raises(ArchiveError, match=r"multiplications.*larger max_nbytes"):
        opened["t"]
    with pytest.raises(ArchiveError, match="multiplications"):
        opened.state_dict()
    assert time.monotonic() - begin < 5
    small = _bomb(2048, 1024)
    most = 2048**2 * 1024 // MULTIPLICATIONS
    assert Archive.from_bytes(small, most)["t"].shape == (2048, 2048)
    with pytest.raises(ArchiveError, match="multiplications"):
        Archive.from_bytes(small, most - 1)["t"]


def test_many_tensors_that_are_vast_together_are_not_verified(tmp_path: Path) -> None:
    path = tmp_path / "a.dither"
    shape = (1 << 15, 1 << 15)
    one = vast(Raw(), torch.bool, shape, {"values": (shape, "bool")})
    _, index = unpacked(one)
    for column in (*index["tensors"].values(), *index["parts"].values()):
        column.extend(column * 9)
    index["tensors"]["name"] = [f"t{i}" for i in range(10)]
    path.write_bytes(closed(one[: HEAD.size], index))
    begin = time.monotonic()
    assert "allow more" in verify(path)[0]
    with dither.open(path) as archive:
        assert len(archive) == 10
    assert time.monotonic() - begin < 5


def test_an_index_out_of_proportion_is_refused(tmp_path: Path) -> None:
    text = b'{"formats":[],"tensors":{"name":[],"format":[],"dtype":[],"shape":[],"parts":[]},'
    text += b'"parts":{"name":[],"codec":[],"shape":[],"holds":[],"data":[],"crc":[]},'
    text += b'"metadata":{"x":[' + b"[]," * (8 << 20) + b"0]}}"
    data = closed(pack({}).to_bytes()[: HEAD.size], text)
    assert len(data) < 1 << 15
    path = tmp_path / "a.dither"
    path.write_bytes(data)
    begin = time.monotonic()
    with pytest.raises(ArchiveError, match=r"index would unpack to \d+ bytes.*max_nbytes"):
        dither.open(path)
    assert "index would unpack" in verify(path)[0]
    with pytest.raises(ArchiveError, match="index would unpack"):
        Archive.open(path, max_nbytes=PARSED * (len(text) - 1))
    assert time.monotonic() - begin < 5


def test_an_index_that_unpacks_far_is_read_if_that_is_allowed(tmp_path: Path) -> None:
    metadata = {"notes": "\n" * (1 << 21)}
    with pytest.raises(ArchiveError, match=r"more than readers allow.*less metadata"):
        pack({}, metadata=metadata)
    index = {**unpacked(pack({}).to_bytes())[1], "metadata": metadata}
    data = closed(pack({}).to_bytes()[: HEAD.size], index)
    with pytest.raises(ArchiveError, match="index would unpack"):
        Archive.from_bytes(data)
    assert Archive.from_bytes(data, max_nbytes=1 << 28).metadata == metadata
    words = {"words": [f"word {i * i}" for i in range(100_000)]}
    assert pack({}, metadata=words).metadata == words


def test_a_payload_of_too_many_words_is_refused_before_they_are_listed() -> None:
    values = torch.arange(2000).remainder(7).numpy()
    codec, payload = encode_codes(values, 200)
    assert codec == "rans"
    with pytest.raises(CodingError, match="too many words"):
        decode_codes(codec, payload + bytes(1 << 20), (2000,), 200)


def test_more_codes_than_the_format_allows_are_refused() -> None:
    codec, payload = encode_codes(torch.zeros(1000, dtype=torch.int32).numpy(), 200)
    assert codec == "rans"
    with pytest.raises(CodingError, match=r"2\*\*31"):
        decode_codes(codec, payload, ((1 << 31) + 1,), 200)


def test_archives_of_one_real_tensor_are_as_before() -> None:
    encoded = Raw().encode(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(Archive.from_bytes(archive_of(encoded), 1200)["t"], encoded.decode())


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify"],
        ["decompress", "-o", "b.safetensors"],
        ["compare", "a.dither"],
        ["compress", "--size", "1kB", "-o", "b.dither"],
    ],
)
def test_commands_do_not_work_for_hours_on_many_small_factors(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = _bomb(8000, 4000)
    _, index = unpacked(one)
    for column in (*index["tensors"].values(), *index["parts"].values()):
        column.extend(column * 9)
    index["tensors"]["name"] = [f"t{i}" for i in range(10)]
    Path("a.dither").write_bytes(closed(one[: HEAD.size], index))
    begin = time.monotonic()
    result = CliRunner().invoke(app, [arguments[0], "a.dither", *arguments[1:]])
    assert result.exit_code == (1 if arguments == ["verify"] else 2)
    assert "the time for as many" in result.output.replace("\n", " ") or "multipl" in result.output
    assert time.monotonic() - begin < 5

"""tools/serve_synthetic.py: the release's bytes in number, the same bytes whenever they are asked for, and finite."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from random import Random

import pytest

from tests.convert.jobs import data_free
from tests.remote.remote_jobs import IMPATIENT, convert_from
from tools.serve_synthetic import Checkpoint, Server, Tables, config_of

SMALL = config_of(layers=2, experts=4, hidden=512, vocab=1024)


@pytest.fixture(scope="module")
def tables() -> Tables:
    return Tables()


def test_the_whole_release_is_described() -> None:
    layout = Checkpoint.of(config_of()).layout
    assert layout.data_bytes == 688_574_839_360
    assert len(layout.shards) in range(155, 170)
    assert len(json.loads(layout.index())["weight_map"]) == 91_991


def test_bytes_depend_on_name_and_place_alone(tables: Tables) -> None:
    checkpoint, draw = Checkpoint.of(SMALL, 2_000_000), Random(3)
    assert len(checkpoint.shards) > 3
    for file in (*checkpoint.shards, "config.json"):
        size = checkpoint.size(file)
        assert size is not None
        whole = b"".join(checkpoint.pieces(file, 0, size, tables))
        assert len(whole) == size
        for _ in range(20):
            start = draw.randrange(size)
            stop = draw.randint(start, size)
            assert (
                b"".join(checkpoint.pieces(file, start, stop, Tables() if not start % 50 else tables))
                == (whole[start:stop])
            )


def test_it_converts_over_http(tables: Tables, tmp_path: Path) -> None:
    with Server(0, Checkpoint.of(SMALL, 2_000_000), tables) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}/deepseek-v3/"
        convert_from(address, data_free(), tmp_path / "out", tmp_path / "cache", nbytes=2**27, patience=IMPATIENT)
        server.shutdown()
        thread.join()
    linears = json.loads((tmp_path / "out" / "quantkit.json").read_text())["tensors"].values()
    losses = [linear["relative_loss"] for linear in linears if "relative_loss" in linear]
    assert len(losses) > 20
    # int4 of normal numbers, in groups of 64, by round to nearest
    assert all(0.003 < loss < 0.02 for loss in losses)

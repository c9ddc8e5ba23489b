"""What CUDA is asked for, and in which order, on streams and graphs that only take notes."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from servegym.runtime.engine import instance as room
from servegym.runtime.engine.batch import build_batch
from servegym.runtime.engine.copier import copy_blocks
from servegym.runtime.engine.graphs import DecodeGraphs
from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.memory import Memory
from servegym.runtime.engine.request import make_request


class Stream:
    """Its events are what `state` showed when they were recorded."""

    def __init__(self, state=lambda: None):
        self.state, self.waited = state, []

    def record_event(self):
        return self.state()

    def wait_event(self, event):
        self.waited.append(event)

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def on_streams(monkeypatch):
    """Every stream is the current one."""
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)


@pytest.mark.parametrize("group", [1, 4])
def test_a_migration_waits_for_swaps_of_both_ways(tiny, setting, monkeypatch, on_streams, group):
    source, target = (Instance(tiny, setting(host_blocks=9, swap_group=group), k) for k in range(2))
    swap = target.swap
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream(lambda: (swap.halves.clone(),)))
    swap.side, source.copies = Stream(), Stream()
    for move in (lambda: swap.out([3, 1], [0, 1]), lambda: swap.back([0, 1], [5, 6])):
        swap.halves.normal_()
        move()
        event = swap.settled
        assert torch.equal(event[0], swap.halves)  # recorded behind all that the swap writes
        copy_blocks(source, target, torch.tensor([0]), torch.tensor([5]))
        assert source.copies.waited.pop() is event
        target.copies = Stream()
        copy_blocks(target, source, torch.tensor([5]), torch.tensor([0]))
        assert target.copies.waited == [event]


def test_old_graphs_are_gone_when_new_ones_are_captured(tiny, setting, monkeypatch, on_streams):
    instance, seen = Instance(tiny, setting()), []

    class Graphs:
        def __init__(self, *_):
            seen.append(instance.graphs)

        def run(self, batch):
            return torch.zeros(len(batch.tables), dtype=torch.int64)

    monkeypatch.setattr(room, "DecodeGraphs", Graphs)
    instance.stream = Stream()
    for _ in range(2):
        instance.warm_up()
        assert isinstance(instance.graphs, Graphs)
    assert seen == [None, None]


class Model:
    """Next tokens that show every input of a request."""

    def __init__(self):
        self.capturing = None

    def next_tokens(self, batch, _):
        def say():
            return batch.tokens + 10 * batch.positions + 100 * batch.tables[:, 0] + 1000 * batch.lengths

        tokens = say()
        if self.capturing:
            self.capturing.replay = lambda: tokens.copy_(say())
        return tokens


class Graph:
    def pool(self):
        return 1


@pytest.fixture
def captured(monkeypatch, on_streams):
    """Decode graphs for up to 20 requests, which compute again at each replay, and their model."""
    model = Model()

    @contextmanager
    def capture(graph, **_):
        model.capturing = graph
        yield
        model.capturing = None

    for name, value in {
        "CUDAGraph": Graph, "graph": capture, "synchronize": lambda: None, "current_stream": lambda *_: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return DecodeGraphs(model, torch.zeros(1, 2, 61, 4, 1, 2), 20, 30), model


def test_graphs_of_all_sizes_share_their_inputs(captured):
    graphs, _ = captured
    assert sorted(graphs.captured) == [1, 2, 4, 8, 16, 20]
    for name in ("tokens", "positions", "slots", "tables", "lengths", "last"):
        assert len({getattr(one.inputs, name).data_ptr() for one in graphs.captured.values()}) == 1
    assert [len(graphs.captured[n].tokens) for n in (1, 8, 20)] == [1, 8, 20]


def test_a_batch_of_any_size_is_told_its_own_tokens(captured):
    """Whatever batches came before, whose rows a larger size finds behind its own."""
    graphs, model = captured
    memory = Memory(60, 4, 0)
    rs = []
    for k in range(20):
        rs.append(make_request(k, [k + 1] * (k % 7 + 2), 1))
        memory.grow(rs[-1], 1 + k % 7)
        rs[-1].computed = k % 7
    for n in (20, 3, 1, 11, 17, 2, 20):
        batch = build_batch(rs[20 - n :], [], 4, torch.device("cpu"))
        assert torch.equal(graphs.run(batch), model.next_tokens(batch, None))
        size = min(s for s in graphs.captured if s >= n)
        inputs = graphs.captured[size].inputs
        assert set(inputs.slots[n:].tolist()) <= {60 * 4} and set(inputs.lengths[n:].tolist()) <= {1}

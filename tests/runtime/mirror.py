"""A lane of the cluster model as a `ClusterView`, kept by what a router and its engines would report."""

import numpy as np

from servegym.envs.cluster.schema import KINDS
from servegym.envs.cluster.spec import ClusterSpec
from servegym.envs.cluster.state import FINISH, NEVER, NONE, OFFSET, ORDER, PS, REQUEST, World
from servegym.runtime.questions import (
    Cap,
    Dispatch,
    Move,
    Pair,
    Preempt,
    Question,
    Stay,
    ask_budget,
    ask_dispatch,
    ask_migrate,
    ask_move,
    ask_preempt,
)
from servegym.runtime.view import ClusterView, InstanceSettings, InstanceView, RequestView


class Mirror:
    """Follows lane 0 from the start of its episode.

    The router's book is kept by the view's own methods, from what changed since the last question; what
    engines report and hold is read from the lane.
    """

    def __init__(self, world: World, cluster: ClusterSpec) -> None:
        self.world = world
        self.lane = world.lane[0]
        self.row = world.row[self.lane["first_row"] :][: self.lane["rows"]]
        episode = world.episode[self.lane["episode"]]
        migrates = cluster.migration is not None
        made = {}  # equal specs share their settings, as a gateway's would
        for spec in cluster.instances:
            if spec not in made:
                made[spec] = InstanceSettings.of(
                    spec, prefix_caching=cluster.prefix_caching, migrates=migrates
                )
        unit = int(episode["prefix_tokens"])
        self.view = ClusterView(
            [InstanceView(made[spec], prefix_tokens=unit) for spec in cluster.instances],
            longest_output=int(episode["longest_output"]),
            least_urgent=int(episode["least_urgent"]),
        )
        self.requests: dict[int, RequestView] = {}

    # --- the book -------------------------------------------------------------------------------------------

    def _request(self, r: int) -> RequestView:
        row = self.row[r]
        ids = self.world.prefix[row["prefix"] : row["prefix"] + row["prefixes"]]
        return RequestView(
            r,
            self.world.req[0, r]["arrived"] / PS,
            int(row["prompt"]),
            int(row["predicted"]),
            int(row["priority"]),
            float(row["slo_ttft"]),
            float(row["slo_tpot"]),
            float(row["weight"]),
            int(row["turn"]),
            prefix=tuple(ids.tolist()),
        )

    def ask(self, rows: int) -> Question:
        """The question that the lane stands at, asked of the view."""
        self._sync()
        kind, asker = KINDS[self.lane["question"]], int(self.lane["asker"])
        if kind == "dispatch":
            pending = int(self.lane["pending"])
            request = self.requests[pending] = self._request(pending)
            self._place(request)
            self.view.arrived(request)
            return ask_dispatch(self.view, request, rows)
        if kind == "preempt":
            return ask_preempt(self.view, asker)
        if kind == "migrate":
            paired = self.world.instance[0, : len(self.view.instances)]["paired"] == self.lane["now"]
            return ask_migrate(self.view, np.flatnonzero(paired).tolist())
        if kind == "move":
            return ask_move(self.view, asker, int(self.lane["target"]))
        return ask_budget(self.view, asker)

    def answered(self, question: Question, answer: int) -> None:
        """The lane is about to take an answer: tell the book at once, while caches are as they were."""
        action = question.actions[answer]
        if isinstance(action, Dispatch):
            self.view.dispatched(self.requests[int(self.lane["pending"])], action.instance)
        elif isinstance(action, Move) and not self.requests[action.key].decoding:
            self.view.moved(self.requests[action.key], action.target)

    def _place(self, request: RequestView) -> None:
        """Where its session's last turn ran, and its number, which in the model is its row."""
        previous = self.row[request.key]["previous_turn"]
        request.last_instance = NONE if previous == NONE else int(self.world.req[0, previous]["instance"])

    def _sync(self) -> None:
        view, lane = self.view, self.lane
        view.now_s = lane["now"] / PS
        req = self.world.req[0]
        streamed = self._streamed()
        for r, request in list(self.requests.items()):
            if req[r]["finished"] != NEVER:
                view.finished(request)
                del self.requests[r]
                continue
            if req[r]["dispatched"] == NEVER:
                continue
            if request.instance != req[r]["instance"]:
                view.moved(request, int(req[r]["instance"]))
            view.streamed(request, streamed.get(r, int(req[r]["done"])) - request.streamed_tokens)
            assert request.booked_tokens == req[r]["booked"]
            request.preemptions = int(req[r]["preemptions"])
            request.running = request.decoding = False
            request.kv_tokens = int(req[r]["hosted"])
            request.number = r
            self._place(request)
        for i, instance in enumerate(view.instances):
            self._inside(i, instance)

    def _steps_done(self, inst: np.void) -> int:
        """As `scrape.steps_done`."""
        if inst["steps"] <= 1:
            return 0
        share = (self.lane["now"] - inst["begin"]) / (inst["until"] - inst["begin"])
        return min(int(inst["steps"] * share), int(inst["steps"]) - 1)

    def _streamed(self) -> dict[int, int]:
        """Tokens that each decoding request has streamed."""
        out = {}
        for i in range(len(self.view.instances)):
            inst, run = self.world.instance[0, i], self.world.run[0, i]
            for at in range(inst["running"]):
                r = int(run[REQUEST, at])
                left = run[FINISH, at] - inst["clock"]
                out[r] = int(self.row[r]["output"] - left + self._steps_done(inst))
        return out

    # --- what engines report and hold -----------------------------------------------------------------------

    def _inside(self, i: int, instance: InstanceView) -> None:
        inst, run = self.world.instance[0, i], self.world.run[0, i]
        instance.seen_running, instance.seen_waiting = (
            float(inst["seen_running"]),
            float(inst["seen_waiting"]),
        )
        instance.seen_kv_usage = float(inst["seen_usage"])
        instance.seen_preemptions = float(inst["seen_rise"])
        instance.scraped_at_s = inst["scraped_at"] / PS
        instance.available = bool(self.lane["now"] < instance.settings.setting.drain)
        instance.prefill_cap = int(inst["cap"])
        instance.engaged = bool(inst["out"] != NONE or inst["inbound"] != NONE)
        instance.joining = bool(inst["joiner"] != NONE)
        instance.free_blocks, instance.host_free_blocks = int(inst["free"]), int(inst["host_free"])
        units = self.world.unit[0, i]
        used = self.world.slot[0, i][self.world.slot[0, i] > 0] - 1
        holders = dict(zip(units["key"][used].tolist(), units["holders"][used].tolist(), strict=True))
        instance.cached = holders.keys()
        instance.running, instance.waiting = [], []
        for at in range(inst["running"] + inst["fresh"]):
            request = self.requests[int(run[REQUEST, at])]
            request.decoding = at < inst["running"]
            steps = self._steps_done(inst) if request.decoding else 1
            request.kv_tokens = int(run[OFFSET, at] + inst["clock"] - 1 + steps)
            request.admitted = int(run[ORDER, at])
            instance.running.append(request)
        if inst["part"] != NONE:
            request = self.requests[int(inst["part"])]
            request.kv_tokens = int(inst["part_done"])
            instance.running.append(request)
        for request in instance.running:
            request.running = True
            held = [holders[key] for key in request.prefix[: self.world.req[0, request.key]["units"]]]
            request.shared_blocks = sum(n > 1 for n in held) * int(inst["unit_blocks"])
        r = int(inst["head"])
        while r != NONE:
            instance.waiting.append(self.requests[r])
            r = int(self.world.req[0, r]["next"])


def assert_same(question: Question, obs: dict[str, np.ndarray], world: World) -> None:
    """The question is the one that the environment asks: arrays, mask and the meaning of its answers."""
    obs = {name: array for name, array in obs.items() if name in question.obs}
    assert obs.keys() == question.obs.keys()
    for name, expected in obs.items():
        found = question.obs[name]
        assert found.dtype == expected.dtype and found.shape == expected.shape, name
        if expected.dtype == np.float32:
            np.testing.assert_allclose(
                found, expected, rtol=3e-7, atol=1e-9, err_msg=f"{question.kind} {name}"
            )
        else:
            np.testing.assert_array_equal(found, expected, err_msg=f"{question.kind} {name}")
    assert sorted(question.actions) == np.flatnonzero(obs["mask"][0]).tolist()
    for c, action in question.actions.items():
        row, instance, source = obs["candidates"][0, c].tolist()
        key = int(world.offer[0, row])
        edge = obs["edges"][0, c]
        expected_action = {
            "dispatch": lambda instance=instance: Dispatch(instance),
            "preempt": lambda key=key, edge=edge: Preempt(key, bool(edge[7])),
            "migrate": lambda instance=instance, source=source: Pair(source, instance),
            "move": lambda key=key, instance=instance, source=source: Move(key, source, instance),
            "budget": lambda instance=instance, edge=edge: Cap(instance, int(edge[9])),
        }[question.kind]
        stays = c == 0 and question.kind in ("migrate", "budget")
        assert action == (Stay() if stays else expected_action())

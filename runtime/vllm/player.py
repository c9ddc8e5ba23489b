"""Policies played in real time on real vLLM servers, for `servegym validate --runtime vllm`.

Each instance of a fleet becomes a server of its own on this machine, with random weights for the config.json
beside its profile. The router stands in this process: it keeps the view, asks the policy where each request
goes, and streams the answers. Only dispatch is decided here; inside the engines vLLM does as it does.

vLLM does not tell which request was preempted: `preemptions` and `lost_tokens` of the records are 0.
"""

from __future__ import annotations

import asyncio
import gc
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from servegym.agents.policy import Policy
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec
from servegym.envs.costs.profile import profile_path
from servegym.envs.metrics import class_slos
from servegym.envs.records import Records
from servegym.envs.scenario import Scenario
from servegym.errors import InputError
from servegym.runtime.decider import Decider
from servegym.runtime.engine.config import load_config
from servegym.runtime.fleet import InstanceSettings
from servegym.runtime.gateway.readings import Reading, parse_metrics
from servegym.runtime.prompts import previous_turns, token_ids
from servegym.runtime.questions import Dispatch, ask_dispatch
from servegym.runtime.view import ClusterView, InstanceView, RequestView
from servegym.runtime.vllm.launch import NAME, Engine, EngineSettings, launch
from servegym.runtime.vllm.leg import EngineLostError

BUDGET_S = 1.0  # for a decision
LEAST_PERIOD_S = 0.05  # between two scrapes, where a scenario wants them without delay
NULL_BLOCKS = 1  # of its KV cache vLLM gives this many to nobody
SILENCE_S = 120.0  # from an engine, after which it counts as hung


def open_player(fleet: ClusterSpec) -> VllmPlayer:
    """Start the servers of a fleet.

    Raises:
        InputError: no vLLM, no config.json beside a profile, or settings that vLLM has not.
    """
    if fleet.migration is not None:
        raise InputError(fleet.name, "migration", fleet.migration, "vLLM's player does not migrate")
    settings = [InstanceSettings.of(spec, prefix_caching=fleet.prefix_caching) for spec in fleet.instances]
    engines = [engine_settings(fleet, i, settings[i]) for i in range(len(fleet))]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="servegym-vllm-")))
        servers = stack.enter_context(launch(engines, folder=folder))
        player = VllmPlayer(fleet, settings, servers, stack.pop_all())
    try:
        asyncio.run(player.check())
    except BaseException:
        player.close()
        raise
    return player


def engine_settings(fleet: ClusterSpec, i: int, settings: InstanceSettings) -> EngineSettings:
    """How the server of instance i is started.

    Raises:
        InputError: a lever that vLLM has not, or no config.json.
    """
    spec, setting = fleet.instances[i], settings.setting
    if spec.preemption != "recompute" or spec.swap_gib:
        raise InputError(fleet.name, "preemption", spec.preemption, "vLLM preempts by recompute only")
    if spec.drain_at_s is not None:
        raise InputError(fleet.name, "drain_at_s", spec.drain_at_s, "vLLM's player does not drain")
    model = _model_of(spec)
    config = load_config(model)
    arguments = ["--load-format", "dummy", "--skip-tokenizer-init", "--enable-prompt-tokens-details"]
    arguments += ["--block-size", str(setting.block_tokens), "--max-num-batched-tokens", str(setting.budget)]
    arguments += ["--scheduling-policy", spec.queue]
    arguments.append("--async-scheduling" if spec.async_scheduling else "--no-async-scheduling")
    if not fleet.prefix_caching:
        arguments.append("--no-enable-prefix-caching")
    return EngineSettings(
        kv_blocks=setting.blocks + NULL_BLOCKS,
        max_seqs=setting.max_seqs,
        max_model_len=min(settings.room_tokens, config.positions),
        model=model,
        arguments=arguments,
    )


def _model_of(spec: InstanceSpec) -> Path:
    """The folder of its config.json."""
    folder = profile_path(spec.profile).parent
    if not (folder / "config.json").is_file():
        hint = "missing; `servegym calibrate` writes it beside profile.json"
        raise InputError(folder / "config.json", "file", "config.json", hint)
    return folder


class VllmPlayer:
    """Plays policies on servers that run; `open_player` makes one.

    Attributes:
        counts: decisions of the last play by `answered` and the reasons for a fallback.
        vocabulary: token ids below it are known to every engine's model.
    """

    def __init__(
        self,
        fleet: ClusterSpec,
        settings: Sequence[InstanceSettings],
        engines: Sequence[Engine],
        stack: ExitStack,
    ) -> None:
        self.fleet, self.settings, self.engines = fleet, settings, engines
        self.counts: dict[str, int] = {}
        self.vocabulary = min(load_config(_model_of(spec)).vocabulary for spec in fleet.instances)
        self._stack = stack

    def play(self, policy: Policy, scenario: Scenario, episode: Episode, seed: int = 0) -> Records:
        """What becomes of the episode's requests; times in seconds from the start of the workload.

        Raises:
            InputError: another fleet, a policy that decides more than dispatch, a request that no engine can
                hold, or an engine that fails.
        """
        if episode.cluster != self.fleet:
            raise InputError(episode.cluster.name, "fleet", episode.cluster.name, f"it was {self.fleet.name}")
        if tuple(policy.kinds) != ("dispatch",):
            kinds = ", ".join(policy.kinds)
            raise InputError(policy.name, "decisions", kinds, "vLLM's player asks for dispatch only")
        self._check_fit(episode)
        decider = Decider(policy, budget_s=BUDGET_S)
        try:
            decider.policy.reset(1, seed)
            return asyncio.run(self._play(_Play(self, decider, scenario, episode, seed)))
        except ExceptionGroup as group:
            error = group.exceptions[0]
            if not isinstance(error, EngineLostError):
                raise
            tails = " | ".join(engine.log.read_text(errors="replace")[-200:] for engine in self.engines)
            raise InputError(self.fleet.name, "engine", str(error), f"logs end: {tails}") from error
        finally:
            self.counts = dict(decider.counts)

    def close(self) -> None:
        """Stop the servers."""
        self._stack.close()

    async def check(self) -> None:
        """Refuse servers whose KV cache is not the fleet's.

        Raises:
            InputError: naming the setting.
        """
        async with aiohttp.ClientSession() as session:
            for engine, settings in zip(self.engines, self.settings, strict=True):
                reading = await scrape(session, engine.url)
                blocks = reading.blocks - NULL_BLOCKS
                for name, found in (("block_tokens", reading.block_tokens), ("blocks", blocks)):
                    expected = getattr(settings.setting, name)
                    if found != expected:
                        hint = f"vLLM made it {found}; set the fleet's accordingly"
                        raise InputError(self.fleet.name, name, expected, hint)

    async def _play(self, played: _Play) -> Records:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            gc.collect()
            gc.disable()  # a pause of tens of milliseconds would be measured
            try:
                return await played.run(session)
            finally:
                gc.enable()

    def _check_fit(self, episode: Episode) -> None:
        tokens = episode.workload.prompt_tokens.astype(np.int64) + episode.workload.output_tokens
        row, most = int(tokens.argmax()), min(s.room_tokens for s in self.settings)
        if tokens[row] > most:
            where = f"prompt_tokens + output_tokens, row {row}"
            raise InputError(episode.workload.name, where, int(tokens[row]), f"the engines hold {most}")


async def scrape(session: aiohttp.ClientSession, url: str) -> Reading:
    """A server's numbers.

    Raises:
        EngineLostError: it does not answer as vLLM does.
    """
    try:
        async with session.get(f"{url}/metrics") as response:
            return parse_metrics(await response.text())
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise EngineLostError(repr(error)) from error


class _Play:
    """One play: a task for every request and for every engine's metrics."""

    def __init__(
        self, player: VllmPlayer, decider: Decider, scenario: Scenario, episode: Episode, seed: int
    ) -> None:
        w = episode.workload
        self.decider, self.episode, self.urls = decider, episode, [engine.url for engine in player.engines]
        self.by_priority = [spec.queue == "priority" for spec in player.fleet.instances]
        self.slos = class_slos(w.class_names, scenario.slo, scenario.class_slo)
        self.sent: list[set[int]] = [set() for _ in self.urls]  # ids of prefix blocks
        self.view = ClusterView(
            [
                InstanceView(settings, prefix_tokens=w.prefix_block_tokens, cached=sent)
                for settings, sent in zip(player.settings, self.sent, strict=True)
            ],
            longest_output=w.max_output_tokens,
            least_urgent=int(w.priority.max()),
        )
        self.previous = previous_turns(w)
        self.followers = {int(a): row for row, a in enumerate(w.after) if a >= 0}
        self.period_s = max(scenario.scrape_s, LEAST_PERIOD_S)
        self.phases = np.random.default_rng(seed).random(len(self.urls)) * self.period_s
        self.columns = {
            name: np.full(len(w), np.nan) for name in ("arrived", "dispatched", "first", "finished")
        }
        self.gaps = np.zeros(len(w))
        self.cached, self.placed = np.zeros(len(w), np.int32), np.full(len(w), -1, np.int32)
        self.preemptions = [0.0] * len(self.urls)  # as the engines count them
        vocabulary = player.vocabulary
        self.prompts = [
            token_ids(w, row, vocabulary)[: int(w.prompt_tokens[row])].tolist() for row in range(len(w))
        ]

    async def run(self, session: aiohttp.ClientSession) -> Records:
        """Play to the end."""
        self.session, w = session, self.episode.workload
        readings = [await scrape(session, url) for url in self.urls]
        self.preemptions = [reading.preemptions for reading in readings]
        self.start_s = time.perf_counter()
        self.left = len(w)
        async with asyncio.TaskGroup() as self.tasks:
            self.watching = [self.tasks.create_task(self._watch(i)) for i in range(len(self.urls))]
            for row in np.flatnonzero(w.after < 0).tolist():
                self.tasks.create_task(self._request(row, float(w.arrived_at_s[row])))
        return self._records()

    def now(self) -> float:
        """Seconds on the workload's clock."""
        return time.perf_counter() - self.start_s

    async def _request(self, row: int, arrived_s: float) -> None:
        """From arrival to last token; then the session's next turn, after its gap."""
        await asyncio.sleep(max(arrived_s - self.now(), 0.0))
        request = self._view_of(row, arrived_s)
        i = self._dispatch(row, request)
        self.columns["arrived"][row], self.columns["dispatched"][row] = arrived_s, self.now()
        await self._stream(row, i, request)
        self.view.finished(request)
        self.left -= 1
        if not self.left:
            for task in self.watching:
                task.cancel()
        follower = self.followers.get(row)
        if follower is not None:
            at = float(self.columns["finished"][row] + self.episode.workload.gap_s[follower])
            self.tasks.create_task(self._request(follower, at))

    def _view_of(self, row: int, arrived_s: float) -> RequestView:
        w, previous = self.episode.workload, self.previous[row]
        slo = self.slos[w.class_id[row]]
        return RequestView(
            row, arrived_s, int(w.prompt_tokens[row]), int(self.episode.predicted_output[row]),
            int(w.priority[row]), slo.ttft_s, slo.tpot_s, slo.weight, turn=max(int(w.turn[row]), 0),
            last_instance=int(self.placed[previous]) if previous >= 0 else -1,
            prefix=w.prefix_ids[w.prefix_offsets[row] : w.prefix_offsets[row + 1]].tolist(),
        )  # fmt: skip

    def _dispatch(self, row: int, request: RequestView) -> int:
        self.view.now_s = self.now()
        self.view.arrived(request)
        action = self.decider.decide(ask_dispatch(self.view, request, self.decider.rows))
        assert isinstance(action, Dispatch)  # every request fits every engine
        self.view.dispatched(request, action.instance)
        self.sent[action.instance].update(request.prefix)
        self.placed[row] = action.instance
        return action.instance

    async def _stream(self, row: int, i: int, request: RequestView) -> None:
        """All tokens of an answer, or `EngineLostError`."""
        output = int(self.episode.workload.output_tokens[row])
        url = f"{self.urls[i]}/v1/completions"
        try:
            async with self.session.post(url, json=self._body(row, i, output)) as response:
                if response.status != 200:
                    raise EngineLostError(f"HTTP {response.status}: {await response.text()}")
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        self._take(row, json.loads(line[6:]), request)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise EngineLostError(f"request {row}: {error!r}") from error
        if request.streamed_tokens != output:
            raise EngineLostError(f"{request.streamed_tokens} of {output} tokens came of request {row}")

    def _take(self, row: int, event: dict[str, Any], request: RequestView) -> None:
        """An event of a stream: tokens, or the account at its end."""
        now, finished = self.now(), self.columns["finished"]
        if usage := event.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            self.cached[row] = details.get("cached_tokens") or 0
        tokens = sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
        if not tokens:
            return
        if request.streamed_tokens:
            self.gaps[row] = max(self.gaps[row], now - finished[row])
        else:
            self.columns["first"][row] = now
        finished[row] = now
        self.view.streamed(request, tokens)

    def _body(self, row: int, i: int, output: int) -> dict[str, Any]:
        body = {
            "model": NAME,
            "prompt": self.prompts[row],
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if self.by_priority[i]:
            body["priority"] = int(self.episode.workload.priority[row])
        return body

    async def _watch(self, i: int) -> None:
        """Read an engine's metrics from time to time."""
        at = self.phases[i]
        while True:
            await asyncio.sleep(max(at - self.now(), 0.0))
            self._note(i, await scrape(self.session, self.urls[i]))
            at = max(at + self.period_s, self.now())

    def _note(self, i: int, reading: Reading) -> None:
        instance = self.view.instances[i]
        instance.scraped_at_s = self.now()
        instance.seen_running, instance.seen_waiting = reading.running, reading.waiting
        instance.seen_kv_usage = reading.kv_usage
        instance.seen_preemptions = reading.preemptions - self.preemptions[i]
        self.preemptions[i] = reading.preemptions

    def _records(self) -> Records:
        w, zeros = self.episode.workload, np.zeros(len(self.placed), np.int32)
        return Records(
            arrived_s=self.columns["arrived"],
            dispatched_s=self.columns["dispatched"],
            first_token_s=self.columns["first"],
            finished_s=self.columns["finished"],
            max_gap_s=self.gaps,
            prompt_tokens=w.prompt_tokens.astype(np.int32),
            output_tokens=w.output_tokens.astype(np.int32),
            cached_tokens=self.cached,
            lost_tokens=zeros.astype(np.int64),
            preemptions=zeros,
            migrations=zeros,
            instance=self.placed,
            class_id=w.class_id,
            priority=w.priority.astype(np.int16),
        )

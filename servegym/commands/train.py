"""`servegym train`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, cast

import torch
import tyro

from servegym.agents.evolved import ByScenario, read_rule
from servegym.agents.heuristics import make_heuristic
from servegym.agents.policy import Policy
from servegym.agents.ppo import PPO, CheckpointCallback, NetworkPolicy, PPOConfig, imitate, improve, read_info
from servegym.agents.ppo.checkpoint import read_network
from servegym.agents.search.lookahead import Lookahead
from servegym.agents.task import Task
from servegym.envs.cluster.decisions import ENVIRONMENTS, divide
from servegym.envs.cluster.episode import Episode, fleets_of, mix_episodes
from servegym.envs.cluster.spec import parse_cluster
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.envs.scenario import Scenario
from servegym.errors import InputError
from servegym.evaluation import Table
from servegym.files import check_folder, command_line, console, git_revision, input_hashes, say, warn
from servegym.flags import Setup, check_environment, check_seed
from servegym.models.config import NetworkConfig
from servegym.models.dense import DenseNetwork
from servegym.report import render
from servegym.runtime.export import decision_us
from servegym.training import EVAL_SEED, EvaluationCallback, card, final_tables, metrics_text, record

if TYPE_CHECKING:
    from servegym.maskable import MaskableTrainer

Agent: TypeAlias = "PPO | MaskableTrainer"
ALGORITHMS = ("ppo", "maskable_ppo")


@dataclass(kw_only=True)
class Command(Setup):
    """Train a policy for the decisions of an environment.

    Writes a checkpoint folder LOG_FOLDER/ENV/NAME-sSEED with the weights, everything that a resumed run
    needs, metrics.json and a model card that compares the policy with every heuristic on each scenario.
    """

    env: str = "ServeGym/Dispatch-v0"
    """Environment id; ServeGym/Cluster-v0 takes all decisions that the scenarios' levers allow."""
    decisions: tuple[str, ...] = ()
    """Of ServeGym/Cluster-v0: take only these, of dispatch, preempt, migrate and budget."""
    rules: dict[str, str] = field(default_factory=dict)
    """Built-in rules for kinds of questions that the policy does not take, such as `dispatch llumnix`."""
    algo: str = "ppo"
    """ppo, or sb3-contrib's maskable_ppo with the same network (constant discount, cannot be resumed)."""
    n_timesteps: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 1_000_000
    """Decisions to train on, over all lanes, rounded up to whole roll-outs; 0 where --imitate or
    --lookahead-updates is all."""
    loads: tuple[float, float] | None = None
    """Lowest and highest offered load, fractions of saturation; an episode draws one between them."""
    n_envs: int = 128
    """Lanes: clusters that are simulated side by side."""
    group_size: int = 16
    """Lanes that play the same episodes side by side, for PPO's group-relative advantages."""
    episodes: int = 512
    """Different episodes that the lanes draw from."""
    seed: int = 0
    """Seed of weights, episodes, sampling and minibatches."""
    device: str = "cpu"
    """torch's device of the updates."""
    num_threads: int = 2
    """Threads of simulation and updates."""
    eval_freq: int = 100_000
    """Decisions between two evaluations on fixed episodes; 0 for none."""
    eval_episodes: int = 5
    """Episodes of an evaluation, and seeds of the final comparison with the heuristics."""
    save_freq: int = 100_000
    """Decisions between two checkpoints, at least: what a crash can cost; fewer where saving takes long."""
    name: str | None = None
    """Name of the policy; algorithm and scenario by default."""
    log_folder: Annotated[str, tyro.conf.arg(aliases=("-f",))] = "runs"
    """Where the checkpoint folder goes."""
    tensorboard_log: str = "runs/tensorboard"
    """Where TensorBoard's event files go."""
    start: str | None = None
    """Checkpoint whose weights ppo begins with, of a network of the same size; fresh ones by default."""
    most_instances: int | None = None
    """Train on the scenarios' fleets of at most so many instances: small ones cost less, and networks play on
    any; all of them by default."""
    imitate: str | None = None
    """What ppo learns the answers of, before it improves on them: a heuristic, or a folder with a rule for
    each scenario, SCENARIO.json, as `servegym evolve` writes it; none by default."""
    imitate_updates: int = 16
    """Roll-outs of learning from that teacher, from its own play at first to the network's at last."""
    lookahead_updates: int = 0
    """Roll-outs of learning from look-ahead, which scores answers on the true future, before ppo."""
    lookahead_rules: dict[str, str] = field(default_factory=dict)
    """Built-in rules that play on behind what look-ahead tries; lmetric dispatches if none is named."""
    lookahead_horizon_s: float = 5.0
    """Seconds of arrivals behind an answer that look-ahead plays."""
    lookahead_width: int = 6
    """Most answers to a question that look-ahead tries."""
    resume: bool = False
    """Go on from the checkpoint in that folder; the other flags must be those of the run."""
    track: bool = False
    """Log to Weights & Biases too; offline without an account."""
    wandb_project_name: str = "servegym"
    """Project of Weights & Biases."""
    progress: Annotated[bool, tyro.conf.arg(aliases=("-P",))] = False
    """Show a progress bar."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Hyperparameters; beta is the scenario's and num_threads the flag's."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Size of the network."""

    def run(self) -> int:
        """Train, compare, write the card."""
        scenarios = self._checked()
        folder = self._folder(scenarios)
        task = self._task(scenarios)
        settings = self._settings(task, scenarios)  # now: files may change while training goes on
        if self.resume:
            _check_settings(settings, folder)
        played = self._small_enough(scenarios)
        teacher, start = self._teacher(played), self._start()
        agent = self._agent(self._environment(played), task, folder, start)
        if not self.resume:
            self._warm_up(agent, teacher)
        callbacks = [
            CheckpointCallback(
                folder, self.save_freq, lambda model: self._files(model, scenarios, settings, [])
            ),
            EvaluationCallback(scenarios, self.eval_freq, self.eval_episodes, self.num_threads),
        ]
        try:
            agent.learn(self.n_timesteps, callbacks, progress_bar=self.progress)
        except KeyboardInterrupt:
            hint = "the same command with --resume goes on" if self.algo == "ppo" else "it plays"
            say(f"stopped at {agent.num_timesteps:,} decisions; saved in {folder}; {hint}")
            raise
        policy = NetworkPolicy(agent.network, folder.name, task)
        tables = final_tables(policy, scenarios, self.eval_episodes, self.num_threads)
        agent.save(folder, self._files(agent, scenarios, settings, tables), resumable=False)
        for table in tables:
            out = console()
            out.print(render(table, out.width))
        say(f"checkpoint: {folder}")
        return 0

    def _small_enough(self, scenarios: list[Scenario]) -> list[Scenario]:
        """The scenarios with those of their fleets that are trained on."""
        if self.most_instances is None:
            return scenarios
        small = []
        for s in scenarios:
            fleets = tuple(text for text in s.clusters if len(parse_cluster(text)) <= self.most_instances)
            if not fleets:
                hint = f"every fleet of scenario {s.name} has more"
                raise InputError("train", "most_instances", self.most_instances, hint)
            small.append(replace(s, clusters=fleets))
        return small

    def _start(self) -> DenseNetwork | None:
        if self.start is None:
            return None
        network, info = read_network(self.start)
        if info.network != self.network:
            raise InputError(self.start, "network", vars(info.network), f"expected {vars(self.network)}")
        return network

    def _teacher(self, scenarios: list[Scenario]) -> Policy | None:
        if self.imitate is None or not Path(self.imitate).is_dir():
            return None if self.imitate is None else make_heuristic(self.imitate)
        rules = {s.name: read_rule(Path(self.imitate) / f"{s.name}.json") for s in scenarios}
        return ByScenario(rules, [e.scenario.name for e in self._episodes(scenarios) if e.scenario])

    def _warm_up(self, agent: Agent, teacher: Policy | None) -> None:
        """Learn from a teacher and from look-ahead, as far as the flags say so."""
        if teacher is not None:
            agreements = imitate(cast("PPO", agent), teacher, self.imitate_updates)
            say(f"imitation of {self.imitate}: the same answer to {agreements[-1]:.0%} of the questions")
        if self.lookahead_updates:
            regrets = improve(cast("PPO", agent), self._search(), self.lookahead_updates)
            say(f"look-ahead: {regrets[0]:.3f} short of the best answers at first, {regrets[-1]:.3f} at last")

    def _search(self) -> Lookahead:
        behind = [{"dispatch": "lmetric"} | self.lookahead_rules]
        return Lookahead(behind=behind, horizon_s=self.lookahead_horizon_s, width=self.lookahead_width)

    def _checked(self) -> list[Scenario]:
        check_environment("train", self.env)
        if self.decisions and ENVIRONMENTS[self.env] is not None:
            hint = f"{self.env} says which; use ServeGym/Cluster-v0 to choose"
            raise InputError("train", "decisions", self.decisions, hint)
        if self.algo not in ALGORITHMS:
            raise InputError("train", "algo", self.algo, f"choose one of {', '.join(ALGORITHMS)}")
        for name in (
            "n_envs",
            "group_size",
            "episodes",
            "num_threads",
            "eval_episodes",
            "save_freq",
            "imitate_updates",
        ):
            if getattr(self, name) < 1:
                raise InputError("train", name, getattr(self, name), "must be at least 1")
        for name in ("beta", "num_threads"):  # one value for the environment and for PPO
            if getattr(self.ppo, name) != getattr(PPOConfig(), name):
                flag = f"--{name.replace('_', '-')}"
                raise InputError("train", f"ppo.{name}", getattr(self.ppo, name), f"say {flag} instead")
        _check_device(self.device)
        if self.resume and self.algo != "ppo":
            raise InputError("train", "algo", self.algo, "only ppo can be resumed")
        if self.imitate is not None and self.algo != "ppo":
            raise InputError("train", "imitate", self.imitate, "only ppo imitates")
        if self.lookahead_updates and self.algo != "ppo":
            raise InputError("train", "lookahead_updates", self.lookahead_updates, "only ppo learns from it")
        self._search()  # refuses what it cannot use
        check_seed("train", self.seed)
        for name in ("eval_freq", "lookahead_updates", "n_timesteps"):
            if getattr(self, name) < 0:
                raise InputError("train", name, getattr(self, name), "must be >= 0")
        if not (self.n_timesteps or self.imitate or self.lookahead_updates):
            raise InputError("train", "n_timesteps", 0, "needs --imitate or --lookahead-updates")
        return self.resolve(**({} if self.loads is None else {"loads": self.loads}))

    def _folder(self, scenarios: list[Scenario]) -> Path:
        check_folder(self.log_folder)
        folder = Path(self.log_folder) / self.env.rsplit("/", 1)[-1] / self._policy_name(scenarios)
        if (folder / "config.json").is_file() and not self.resume:
            raise InputError(
                folder, "checkpoint", folder.name, "is there already; --resume, or another --name or -f"
            )
        return folder

    def _task(self, scenarios: list[Scenario]) -> Task:
        fleets = [fleet for scenario in scenarios for fleet in fleets_of(scenario)]
        where = f"scenario {', '.join(s.name for s in scenarios)}"
        decisions, rules = divide(self.decisions or ENVIRONMENTS[self.env], self.rules, fleets, where)
        return Task(self.env, decisions, rules, tuple(map(asdict, scenarios)))

    def _episodes(self, scenarios: list[Scenario]) -> list[Episode]:
        return mix_episodes(scenarios, self.episodes, self.seed)

    def _environment(self, scenarios: list[Scenario]) -> ClusterVectorEnv:
        env = ClusterVectorEnv(
            self.n_envs,
            scenarios,
            decisions=self.decisions or ENVIRONMENTS[self.env],
            rules=self.rules,
            episodes=self._episodes(scenarios),
            num_threads=self.num_threads,
            copy=self.algo != "ppo",
            group_size=self.group_size if self.algo == "ppo" else 1,
        )
        observation, _ = env.reset(seed=self.seed)
        if not observation["mask"][:, 1:].any():
            hint = f"none of {self.n_envs} episodes asks a question; raise the load or make memory scarce"
            raise InputError("train", "decisions", ", ".join(env.decisions), hint)
        return env

    def _agent(self, env: ClusterVectorEnv, task: Task, folder: Path, start: DenseNetwork | None) -> Agent:
        logs = str(Path(self.tensorboard_log) / folder.name)
        track = self.wandb_project_name if self.track else None
        if self.resume:
            resumed = PPO.resume(folder, env, logs, track, self.device)
            say(f"resuming {folder} at {resumed.num_timesteps:,} of {self._decisions():,} decisions")
            return resumed
        config = self._config(env.beta)
        make = PPO if self.algo == "ppo" else _maskable()
        agent = make(env, self.network, config, self.seed, logs, track, task, command_line(), self.device)
        if self.algo != "ppo":
            warn(f"{self.algo}: discount {agent.gamma:.6f} a decision; ppo.gae_horizon_s has no effect")
        if start is not None:
            agent.network.load_state_dict(start.state_dict())
        megabytes = sum(a.nbytes for a in env.observation_space.sample().values()) * config.n_steps / 1e6
        say(
            f"{folder}: {self._decisions():,} decisions in {self.n_envs} lanes, "
            f"{_parameters(agent):,} parameters, {megabytes:.0f} MB of roll-outs"
        )
        return agent

    def _decisions(self) -> int:
        """Decisions that will be trained on: roll-outs are not cut short."""
        rollout = self.ppo.n_steps * self.n_envs
        return -(-self.n_timesteps // rollout) * rollout

    def _config(self, beta: float) -> PPOConfig:
        return replace(self.ppo, beta=beta, num_threads=self.num_threads)

    def _settings(self, task: Task, scenarios: list[Scenario]) -> dict[str, Any]:
        """What must not change when a run is resumed, as JSON gives it back."""
        names = ["n_timesteps", "n_envs", "group_size", "episodes", "seed", "imitate", "imitate_updates"]
        names += ["start", "most_instances"]
        names += [f"lookahead_{name}" for name in ("updates", "rules", "horizon_s", "width")]
        settings: dict[str, Any] = {
            "task": asdict(task),
            "ppo": asdict(self._config(scenarios[0].beta)),
            "network": asdict(self.network),
        }
        hashes = [input_hashes(scenario) for scenario in scenarios]
        settings |= {f"sha256 of {name}": digest for found in hashes for name, digest in found.items()}
        return json.loads(json.dumps(settings | {name: getattr(self, name) for name in names}))

    def _files(
        self, agent: Agent, scenarios: list[Scenario], settings: dict[str, Any], tables: list[Table]
    ) -> dict[str, str]:
        """metrics.json and README.md as they stand now."""
        timed = NetworkPolicy(agent.network)
        facts = {
            "command": agent.command,
            "revision": git_revision(),
            "seed": self.seed,
            "decisions": agent.num_timesteps,
            "parameters": _parameters(agent),
            "instances": 16,
            "decision_us": round(decision_us(timed, agent.observation, instances=16, repeats=200), 1),
        }
        played = {"seeds": self.eval_episodes, "seed": EVAL_SEED}
        about = {**facts, "settings": settings, "comparison": played}
        return {
            "metrics.json": metrics_text(about, record(tables)),
            "README.md": card(self._policy_name(scenarios), facts, agent.task, scenarios, tables),
        }

    def _policy_name(self, scenarios: list[Scenario]) -> str:
        about = scenarios[0].name if len(scenarios) == 1 else f"{len(scenarios)}-scenarios"
        return f"{self.name or f'{self.algo}-{about}'}-s{self.seed}"


def _check_settings(settings: dict[str, Any], folder: Path) -> None:
    """Refuse to resume what was started with other settings, on another trace or with other costs."""
    info = read_info(folder)
    path = folder / "metrics.json"
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            path, "settings", str(error), "this checkpoint plays but cannot be resumed"
        ) from error
    for name, value in settings.items():
        if known.get(name) != value:
            raise InputError(path, name, known.get(name), f"the run was started by: {info.command}")


def _check_device(name: str) -> None:
    try:
        kind = torch.device("cpu" if name == "auto" else name).type
    except RuntimeError as error:
        raise InputError(
            "train", "device", name, "give a name that torch knows, such as cpu or cuda"
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("train", "device", name, "torch sees no such device; give cpu")


def _maskable() -> Callable[..., Agent]:
    try:
        from servegym.maskable import MaskableTrainer
    except ImportError as error:
        raise InputError("train", "algo", "maskable_ppo", "pip install 'servegym[contrib]'") from error
    return MaskableTrainer


def _parameters(agent: Agent) -> int:
    return sum(parameter.numel() for parameter in agent.network.parameters())

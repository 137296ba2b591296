"""Dueling double DQN with memory over segment-based batches (SBB).

    python dqn_sbb.py --env-id popgym-RepeatPreviousEasy-v0 --memory lru --segment-length 50

This is how recurrent RL is usually trained: episodes are cut to segments of a fixed length, zero-padded and masked. The
memory starts each from its initial state, and gradients end at its edges. Compare: `diff dqn_tbb.py dqn_sbb.py`.
A *row* is one time step; *start* marks an episode's first. An episode of n transitions is n + 1 rows, the last of which
holds the final observation, so the next row is always the next state: terminal, truncated or neither.
Source: "Revisiting Recurrent Reinforcement Learning with Memory Monoids" (Morad et al. 2024, arXiv 2402.09900).
"""

import copy
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import popgym  # noqa: F401  registers popgym-*
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from torch.utils.tensorboard import SummaryWriter

from monoids import MEMORIES, make_memory


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment"""
    cuda: bool = True
    """whether to train on a GPU if there is one"""
    compile: bool = False
    """compile the networks for updates, into CUDA graphs on a GPU; needs a C++ compiler"""
    resume: str | None = None
    """continue the run of this checkpoint in its directory; its arguments are the defaults"""
    evaluate: str | None = None
    """evaluate this checkpoint instead of training; its arguments are the defaults"""
    capture_video: bool = False
    """with --evaluate: record the first episode to videos/"""
    env_id: str = "popgym-RepeatPreviousEasy-v0"
    """the id of the environment; my_module:MyEnv-v0 imports my_module first"""
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments of the environment, for example --env-kwargs map_name 8x8 is_slippery False (false is a string)"""
    total_timesteps: int = 40_000
    """transitions to collect; the last iteration may exceed it, since episodes are finished"""
    learning_rate: float = 5e-4
    """the learning rate of the optimizer"""
    num_envs: int = 8
    """the number of parallel environments; in an iteration each plays one episode"""
    max_episode_steps: int = 0
    """truncate episodes after this many steps (and bootstrap there); replaces the registered limit unless 0"""
    anneal_lr: bool = True
    """whether to anneal the learning rate linearly to zero"""
    buffer_size: int = 200_000
    """transitions in the buffer, padding included; the oldest segments are overwritten; cannot change on --resume"""
    gamma: float = 0.99
    """the discount factor gamma"""
    tau: float = 0.2
    """the target network update rate, at every update"""
    batch_size: int = 500
    """transitions in a batch, padding included"""
    segment_length: int = 50
    """transitions in a segment: neither memory nor gradient nor previous action reaches further back"""
    burn_in: int = 0
    """transitions at a segment's beginning without a loss, which warm up the state; segments overlap by them"""
    start_e: float = 1.0
    """the starting epsilon for exploration"""
    end_e: float = 0.05
    """the ending epsilon for exploration"""
    exploration_fraction: float = 0.2
    """the fraction of total_timesteps it takes from start_e to end_e"""
    learning_starts: int = 1_000
    """transitions to collect before learning starts; of a new run, not of a resumed one"""
    train_frequency: int = 25
    """transitions to collect per update"""
    max_grad_norm: float = 0.1
    """the maximum norm of the gradient"""
    memory: tuple[Literal[*MEMORIES], ...] = ("lru",)
    """the memory model: one name for two layers of it, several for one layer of each, in that order"""
    memory_kwargs: dict[str, int | float] = field(default_factory=dict)
    """arguments of each layer (see its class in monoids.py), such as horizon 100000 d_state 64, and num_layers"""
    d_model: int = 128
    """the width of the network"""
    previous_action: bool = True
    """whether the network sees its previous action: in a POMDP the history includes the actions"""
    eval_frequency: int = 10_000
    """transitions between evaluations; a checkpoint is saved after each"""
    eval_episodes: int = 32
    """greedy episodes in an evaluation"""

    def check(self):
        for low, high, names in [
            (0, 2**32 - 1, "seed max_episode_steps"),
            (1, np.inf, "total_timesteps num_envs buffer_size train_frequency d_model eval_frequency eval_episodes"),
            (0, 1, "gamma tau start_e end_e exploration_fraction"),
            (1e-12, np.inf, "learning_rate max_grad_norm"),
            (1, self.buffer_size, "batch_size"),
            (1, self.batch_size, "segment_length"),
            (0, self.segment_length - 1, "burn_in"),
            (0, self.total_timesteps - 1, "learning_starts"),
        ]:
            for name in names.split():
                if not (low <= (value := getattr(self, name)) <= high and value != np.inf):
                    fail(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
        if not self.memory or (self.resume and self.evaluate) or (self.capture_video and not self.evaluate):
            fail("--memory needs a name; --capture-video goes with --evaluate, --resume without it")


def fail(message):  # a user error: one line, exit status 2
    print(f"{os.path.basename(__file__)}: {message}", file=sys.stderr)
    sys.exit(2)


def make_envs(args, num_envs, video=False):
    def make_env(index):
        """Observations become a flat float32 Box, with one-hot categories; actions become Discrete(n)."""
        render = {"render_mode": "rgb_array"} if video else {}
        env = gym.make(args.env_id, args.max_episode_steps or None, **(args.env_kwargs | render))
        if video and index == 0:
            env = gym.wrappers.RecordVideo(env, "videos", name_prefix="eval", episode_trigger=lambda n: n == 0)
        space = env.observation_space
        if "Text(" in str(space) or not isinstance(spaces.flatten_space(space), spaces.Box):  # Text flattens to codes
            raise ValueError(f"observations do not flatten to a Box: {space}")
        env = gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)
        space = env.action_space
        if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            raise ValueError(f"DQN takes Discrete or MultiDiscrete actions, not {space}")
        nvec = np.ravel(space.nvec if isinstance(space, spaces.MultiDiscrete) else space.n)
        decode = lambda a: (np.reshape(np.unravel_index(a, nvec), space.shape) + space.start).astype(space.dtype)
        return gym.wrappers.TransformAction(env, decode, spaces.Discrete(int(nvec.prod())))

    try:
        makers = [partial(make_env, index) for index in range(num_envs)]
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    except Exception as error:  # an environment can raise anything
        hint = "an id may name its module, module:MyEnv-v0; other spaces need an ObservationWrapper or ActionWrapper"
        fail(f"--env-id {args.env_id}: {type(error).__name__}: {' '.join(str(error).split())} ({hint})")


class Rows(NamedTuple):
    """Time steps, (T,) or (T, B) of them. The last row of an episode holds its final observation, and zeros."""

    obs: torch.Tensor  # (..., features) float32
    action: torch.Tensor  # (...) int64, taken on obs; roll(1, 0) gives the previous one
    reward: torch.Tensor  # (...) float32, for action
    terminated: torch.Tensor  # (...) bool: action led to a terminal state
    start: torch.Tensor  # (...) bool: the episode's first row


@torch.no_grad()
def collect(envs, network, act, seed):
    """Play one whole episode in each environment. Returns a list of Rows of NumPy arrays, n + 1 rows an episode.

    act(network, obs (1, N, ...), previous action (1, N, ...), start (1, N), state) -> action (N, ...), state.
    What an environment plays while it waits for the longest episode is dropped. Autoreset mode NEXT_STEP: the row after
    an episode's last transition holds its final observation and reward 0.
    """
    rng, N, device = np.random.default_rng(seed), envs.num_envs, next(network.parameters()).device
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):  # an environment may use any of them
        set_seed(int(rng.integers(2**32)))
    obs, _ = envs.reset(seed=rng.integers(2**31, size=N).tolist())
    action, reward = np.zeros(envs.action_space.shape, envs.action_space.dtype), np.zeros(N, dtype=np.float32)
    state, start = network.memory.initial_state(N), np.ones(N, dtype=bool)
    steps, length, done = [], np.zeros(N, dtype=int), np.zeros(N, dtype=bool)
    while True:
        if not (np.isfinite(obs).all() and np.isfinite(reward).all()):
            fail(f"{envs.envs[0].spec.id}: an observation or reward is not finite; checkpoints are unchanged")
        if done.all():
            break
        if len(steps) == 10_000:
            print(f"after 10,000 steps {sum(~done)} episodes go on: --max-episode-steps truncates them", flush=True)
        inputs = (torch.as_tensor(x, device=device)[None] for x in (obs, action, start))
        action, state = act(network, *inputs, state)
        action = action.cpu().numpy()
        action[done] = 0  # in the row of a final observation, and in rows that are dropped
        next_obs, reward, terminated, truncated, _ = envs.step(action)
        reward = reward.astype(np.float32)
        steps.append((obs, action, reward, terminated, start))
        obs, start = next_obs, np.zeros(N, dtype=bool)
        length += ~done
        done |= terminated | truncated
    steps.append((obs, *map(np.zeros_like, steps[-1][1:])))  # the longest episode's last row
    rows = Rows(*map(np.stack, zip(*steps)))  # (longest + 1, N, ...)
    return [Rows(*(x[: n + 1, i].copy() for x in rows)) for i, n in enumerate(length)]


class QNetwork(nn.Module):
    def __init__(self, envs, args):
        super().__init__()
        d, self.num_actions, self.previous_action = args.d_model, int(envs.single_action_space.n), args.previous_action
        features = envs.single_observation_space.shape[0] + self.num_actions * self.previous_action
        self.encoder = nn.Sequential(nn.Linear(features, d), nn.GELU(), nn.Linear(d, d))
        self.memory = make_memory(args.memory, d, **args.memory_kwargs)
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, 1 + self.num_actions))
        nn.init.orthogonal_(self.head[-1].weight, 0.01)  # Q starts near 0, so that early targets are rewards, not noise
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, obs, previous_action, start, state):
        if self.previous_action:
            previous = F.one_hot(previous_action, self.num_actions) * ~start[..., None]  # zeros at an episode's start
            obs = torch.cat((obs, previous), -1)  # (T, B, features)
        x, state = self.memory(self.encoder(obs), state, start)  # (T, B, d_model)
        value, advantage = self.head(x).split((1, self.num_actions), -1)  # dueling (Wang et al. 2016)
        return value + advantage - advantage.mean(-1, keepdim=True), state  # (T, B, num_actions)


def policy(q_network, obs, previous_action, start, state, epsilon):
    q, state = q_network(obs, previous_action, start, state)  # (1, N, num_actions)
    if not torch.isfinite(q).all():
        fail("the network's output is not finite; checkpoints are unchanged")
    explore = torch.rand(q.shape[1], device=q.device) < epsilon
    random_action = torch.randint(q.shape[2], (q.shape[1],), device=q.device)
    return torch.where(explore, random_action, q[0].argmax(-1)), state  # (N,)


class Segments:
    """A ring buffer of segments, side by side, zero-padded to L transitions; the oldest are overwritten."""

    def __init__(self, args, envs, device):
        features = envs.single_observation_space.shape
        shapes = (features, torch.float), ((), torch.long), ((), torch.float), ((), torch.bool), ((), torch.bool)
        N, L = args.buffer_size // args.segment_length, args.segment_length  # and a row more for the last next state
        self.rows = Rows(*(torch.zeros(N, L + 1, *x, dtype=dtype, device=device) for x, dtype in shapes))
        self.index, self.end = [], 0  # (burn-in, number of transitions) of each segment
        self.length, self.burn_in = L, args.burn_in

    def add(self, episode):
        L, n = self.length, len(episode.start) - 1
        for first in range(0, max(1, n - self.burn_in), L - self.burn_in):
            at, transitions = self.end % len(self.rows.start), min(L, n - first)
            for ring, x in zip(self.rows, episode):
                ring[at] = 0
                ring[at, : transitions + 1] = torch.as_tensor(x[first : first + transitions + 1], device=ring.device)
            self.rows.start[at, 0] = True  # wherever the episode was cut
            self.index[at : at + 1] = [(self.burn_in if first else 0, transitions)]  # an episode's start needs none
            self.end += 1

    def sample(self, batch_size, rng):
        """batch_size // L segments, drawn uniformly with replacement: rows (L + 1, B); played (L, B), False on padding;
        mask (L, B), False on padding and on the burn-in.
        """
        drawn = rng.integers(len(self.index), size=batch_size // self.length)
        rows = Rows(*(ring[drawn].transpose(0, 1) for ring in self.rows))
        burn_in, transitions = torch.tensor([self.index[i] for i in drawn], device=rows.start.device).T
        t = torch.arange(self.length, device=rows.start.device)[:, None]
        return rows, t < transitions, (burn_in <= t) & (t < transitions)

    def state_dict(self):
        return {"rows": [x[: self.end].clone() for x in self.rows], "index": [*self.index], "end": self.end}

    def load_state_dict(self, state):
        for ring, x in zip(self.rows, state["rows"], strict=True):
            ring[: state["end"]] = x
        self.index, self.end = [*state["index"]], state["end"]


def update(q_network, target_network, optimizer, batch, args):
    """Double DQN (van Hasselt et al. 2016): y = r + gamma (1 - terminated) Q_target(s', argmax_a Q(s', a)); Huber."""
    rows, played, mask = batch
    # CRUCIAL: the next state is the next row, but its value depends on the segment alone, and so does the target
    t, t_next = slice(0, -1), slice(1, None)
    inputs = (rows.obs, rows.action.roll(1, 0), rows.start, q_network.memory.initial_state(rows.start.shape[1]))
    q, _ = q_network(*inputs)  # (L + 1, B, num_actions)
    with torch.no_grad():
        q_target, _ = target_network(*inputs)
        best = q[t_next].argmax(-1, keepdim=True)
        next_value = q_target[t_next].gather(-1, best).squeeze(-1)
        td_target = rows.reward[t] + args.gamma * ~rows.terminated[t] * next_value
    old_val = q[t].gather(-1, rows.action[t][..., None]).squeeze(-1)  # (L, B), as td_target
    # CRUCIAL: the mean over the transitions that carry loss, not over padding or burn-in
    loss = (F.smooth_l1_loss(old_val, td_target, reduction="none") * mask).sum() / mask.sum()

    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm)
    if not torch.isfinite(loss + norm):
        fail(f"the loss is {loss}, the norm of its gradient {norm}: stopped before the step; checkpoints are unchanged")
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(target_network.parameters()), list(q_network.parameters()), args.tau)
    metrics = {"losses/td_loss": loss.detach(), "losses/q_values": old_val.detach()[mask].mean()}
    return metrics | {"losses/padding": 1 - played.float().mean()}


def evaluate(envs, q_network, args):
    """Undiscounted returns of greedy episodes, one in each environment, with the same seeds at every evaluation."""
    episodes = collect(envs, q_network, partial(policy, epsilon=0.0), (args.seed, 1))
    return np.array([episode.reward.sum() for episode in episodes])


if __name__ == "__main__":
    args, saved, script = tyro.cli(Args, description=__doc__), None, os.path.basename(__file__)
    try:
        if (path := args.resume if args.evaluate is None else args.evaluate) is not None:
            saved = torch.load(path, map_location="cpu", weights_only=True)  # safe to load untrusted files
            if saved["script"] != script:
                fail(f"{path} is a checkpoint of {saved['script']}")
            defaults = Args(**saved["args"])
            if ":" in defaults.env_id and args.env_id == Args.env_id:
                fail(f"{path} imports a module: add --env-id {defaults.env_id} if you trust it")
            args = tyro.cli(Args, description=__doc__, default=replace(defaults, env_kwargs={}, memory_kwargs={}))
            args.env_kwargs = defaults.env_kwargs | args.env_kwargs  # the command line may change some of them
            if not args.memory_kwargs.items() <= defaults.memory_kwargs.items():
                fail(f"{path} was made with --memory-kwargs {defaults.memory_kwargs}, which cannot change")
            args.memory_kwargs = defaults.memory_kwargs
        args.check()
    except Exception as error:  # a damaged file can raise anything
        fail(f"{path!r} is not a complete checkpoint of {script} ({type(error).__name__})")
    torch.set_num_threads(torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else 1)  # tensors are small
    torch.empty(2**25 - 2**16, dtype=torch.uint8)  # freeing it raises glibc's mmap threshold (mallopt(3)): 10% faster
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)  # environments may use any
    envs, eval_envs = make_envs(args, args.num_envs), make_envs(args, args.eval_episodes, args.capture_video)
    run_name = f"{args.env_id}__{args.exp_name}__{'_'.join(args.memory)}__{args.seed}__{int(time.time())}_{os.getpid()}"
    path = path or f"runs/{run_name.replace('/', '_').replace(':', '_')}/checkpoint.pt"
    try:
        q_network = QNetwork(envs, args).to(device)
        target_network = copy.deepcopy(q_network)
        optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
        buffer = Segments(args, envs, device)
        learners = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer, "buffer": buffer}
        for name, learner in (learners.items() if saved else ()):
            learner.load_state_dict(saved["learners"].pop(name))  # frees the copy
        counters = saved["counters"] if saved else (0, 0, args.learning_starts, np.nan, 0)
        iteration, global_step, next_update, eval_return, seconds = counters
        if not args.evaluate:  # purge_step: what was logged after the checkpoint does not count twice
            writer = SummaryWriter(os.path.dirname(path) or ".", purge_step=global_step + 1 if saved else None)
    except (ArithmeticError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        fail(f"{path if saved else 'cannot start'}: {' '.join(str(error).split())[:300]}")  # arguments, shapes, no room
    compiled = partial(torch.compile, mode="reduce-overhead", dynamic=False, recompile_limit=64)  # once for each size
    networks = [compiled(x) if args.compile else x for x in (q_network, target_network)]
    if finished := args.evaluate or global_step >= args.total_timesteps:
        returns = evaluate(eval_envs, q_network, args)
        eval_envs.close()  # writes the video
        eval_return = returns.mean().item()
        print(f"return: mean {eval_return:.4f}, standard deviation {returns.std():.4f}")
    else:
        writer.add_text("hyperparameters", "  \n".join(f"{key}: {value}" for key, value in vars(args).items()))
        print(f"from step {global_step:,} (Ctrl-C saves and stops); tensorboard --logdir {writer.log_dir}", flush=True)
    start_time, shown, signals = time.time() - seconds, time.time(), []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first ends the iteration, a second one stops at once
        signal.signal(number, lambda n, frame: sys.exit(128 + n) if signals else signals.append(n))
    while not finished:
        # ALGO LOGIC: play whole episodes with the current weights (random streams: 0 episodes, 1 evaluation, 2 batches)
        progress, evaluations = global_step / args.total_timesteps, global_step // args.eval_frequency
        optimizer.param_groups[0]["lr"] = lr = args.learning_rate * (1 - progress if args.anneal_lr else 1)
        epsilon = np.interp(progress, (0, args.exploration_fraction), (args.start_e, args.end_e))
        episodes = collect(envs, q_network, partial(policy, epsilon=epsilon), (args.seed, 0, iteration))
        for episode in episodes:
            buffer.add(episode)
        lengths = [len(episode.reward) - 1 for episode in episodes]
        iteration, global_step = iteration + 1, global_step + sum(lengths)
        metrics = {"charts/learning_rate": lr, "charts/epsilon": epsilon, "charts/episodic_length": np.mean(lengths)}
        metrics["charts/episodic_return"] = episodic_return = np.mean([episode.reward.sum() for episode in episodes])
        # ALGO LOGIC: training
        while next_update < global_step:
            batch = buffer.sample(args.batch_size, np.random.default_rng((args.seed, 2, next_update)))
            metrics |= update(*networks, optimizer, batch, args)
            next_update += args.train_frequency
        finished = global_step >= args.total_timesteps
        if evaluated := (finished or evaluations < global_step // args.eval_frequency):
            metrics["charts/eval_return"] = eval_return = evaluate(eval_envs, q_network, args).mean().item()
        seconds = time.time() - start_time
        metrics["charts/SPS"] = sps = int(global_step / seconds)
        finished |= bool(signals)
        try:  # atomic: whatever happens, there is a complete checkpoint, this one or the one before
            for tag, value in metrics.items():
                writer.add_scalar(tag, value, global_step)
            if finished or evaluated:
                writer.flush()
                counters = (iteration, global_step, next_update, eval_return, seconds)
                checkpoint = {"script": script, "args": vars(args) | {"resume": None}, "counters": counters}
                with open(f"{path}.tmp", "wb") as file:
                    torch.save(checkpoint | {"learners": {name: x.state_dict() for name, x in learners.items()}}, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(f"{path}.tmp", path)
        except (OSError, RuntimeError) as error:  # torch turns a full disk into the latter
            fail(f"{path}: {str(error).splitlines()[0]}; the checkpoint before it is unchanged")
        if time.time() > shown + 1:  # after saving: with `| tee`, Ctrl-C has closed stdout
            shown, left = time.time(), max(0, args.total_timesteps - global_step) // max(1, sps)
            line = f"step {global_step:,} of {args.total_timesteps:,}, return {episodic_return:.3f}, {sps:,} steps/s"
            print(f"{line}, {left // 60}:{left % 60:02} left", flush=True)

    print(f"checkpoint of step {global_step:,}: {path} (--resume continues from it)")
    if signals:
        sys.exit(128 + signals[0])
    print(f"final: {global_step=} {eval_return=:.4f} eval_episodes={args.eval_episodes} {seconds=:.1f}")

"""Double DQN with a memory, trained on tapes of whole episodes (tape-based batching, TBB).

    python dqn_tbb.py --env-id popgym-RepeatPreviousEasy-v0 --memory lru

Recurrent RL is usually trained on segments, cut to a fixed length, zero-padded and masked. With a resettable memory
monoid (monoids.py) whole episodes are laid end to end on one tape instead: one pass of the network runs over all of
them, and the loss is the ordinary DQN loss. `diff dqn_tbb.py dqn_sbb.py` shows what segments cost.

After "Revisiting Recurrent Reinforcement Learning with Memory Monoids" (Morad et al. 2024, arXiv 2402.09900). The
words: a *row* is one time step. An episode of n transitions is n + 1 rows, the last of which holds the final
observation and no action; so the next row is always the next state, whether a transition is terminal, truncated or not.
"""

import contextlib
import copy
import io
import itertools
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import popgym  # noqa: F401  registers popgym-*
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple
from torch.utils.tensorboard import SummaryWriter

from monoids import MEMORIES


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment: of the weights, the episodes, the exploration and the batches"""
    cuda: bool = True
    """train on the GPU where there is one"""
    compile: bool = False
    """compile the network for updates, into CUDA graphs on a GPU; tapes are padded to few lengths"""

    # Algorithm specific arguments
    env_id: str = "popgym-RepeatPreviousEasy-v0"
    """the id of the environment"""
    total_timesteps: int = 40_000
    """transitions to collect; the last iteration may go over it, since episodes are finished"""
    learning_rate: float = 5e-4
    """the learning rate of the optimizer"""
    num_envs: int = 8
    """the number of environments that run in parallel"""
    num_steps: int = 32
    """an iteration collects whole episodes until they hold num_steps x num_envs transitions or more"""
    max_episode_steps: int = 0
    """truncate episodes after this many steps (and bootstrap there); 0 leaves it to the environment"""
    anneal_lr: bool = True
    """whether the learning rate goes down to zero over total_timesteps"""
    buffer_size: int = 200_000
    """rows on the tape; the oldest episodes make room"""
    gamma: float = 0.99
    """the discount factor gamma"""
    tau: float = 0.2
    """the target network moves this share of the way to the online network at every update"""
    batch_size: int = 500
    """transitions in a batch; the last episode of a batch is kept whole, so it may hold a few more"""
    start_e: float = 1.0
    """the starting epsilon for exploration"""
    end_e: float = 0.05
    """the ending epsilon for exploration"""
    exploration_fraction: float = 0.2
    """the fraction of total_timesteps it takes from start_e to end_e"""
    learning_starts: int = 1_000
    """transitions to collect before learning starts"""
    train_frequency: int = 25
    """transitions to collect per update"""
    max_grad_norm: float = 0.1
    """the maximum norm of the gradient"""
    memory: Literal[*MEMORIES] = "lru"
    """what remembers"""
    d_model: int = 128
    """the width of the network"""
    previous_action: bool = True
    """whether the network sees its previous action: in a POMDP the history includes the actions"""
    eval_frequency: int = 10_000
    """transitions between two evaluations"""
    eval_episodes: int = 32
    """greedy episodes in an evaluation"""
    log_sensitivity: bool = False
    """with every evaluation, log how far back the Q values look: charts/sensitivity, by age"""
    save_frequency: int = 0
    """transitions between two checkpoints, runs/<name>/checkpoint.pt; 0 saves at the end only"""
    resume: str = ""
    """continue the run that this checkpoint was saved by, with its arguments"""
    evaluate: str = ""
    """train nothing: evaluate this checkpoint"""
    capture_video: bool = False
    """with --evaluate: record the first episode to videos/, where the environment renders"""


def fail(message):
    """What the user can mend: one line that says how, exit status 2."""
    print(f"{os.path.basename(__file__)}: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(default=None):
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args = tyro.cli(Args, description=__doc__, default=default or Args())
    except SystemExit as stop:
        if stop.code:  # tyro draws a box; its first paragraph says what is wrong
            box = [line.strip("│ ") for line in errors.getvalue().splitlines()[1:-1]]
            fail(" ".join(itertools.takewhile(lambda line: not line.startswith("──"), box)))
        raise
    return args


def check(args):
    positive = ("total_timesteps", "num_envs", "num_steps", "buffer_size", "batch_size", "train_frequency", "d_model")
    least = dict.fromkeys(("seed", "max_episode_steps", "save_frequency"), 0)
    least |= dict.fromkeys((*positive, "eval_frequency", "eval_episodes"), 1)
    for name, value in least.items():
        if getattr(args, name) < value:
            fail(f"--{name.replace('_', '-')} must be {value} or more, not {getattr(args, name)}")
    if args.batch_size > args.buffer_size:
        fail(f"--batch-size {args.batch_size} is more than the buffer will ever hold, --buffer-size {args.buffer_size}")
    if args.learning_starts >= args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} is after the end, --total-timesteps {args.total_timesteps}")
    if args.capture_video and not args.evaluate:
        fail("--capture-video records an evaluation: it goes with --evaluate")


# what --resume and --evaluate may change; with anything else changed it would be another run
CHANGEABLE = ["cuda", "total_timesteps", "eval_frequency", "eval_episodes", "save_frequency"]
CHANGEABLE += ["resume", "evaluate", "capture_video"]


def save(path, checkpoint):
    """Atomically: whatever happens, `path` is a complete checkpoint, this one or the one before."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def load(args):
    """The checkpoint that --resume or --evaluate names, and its run's arguments with those that may change changed."""
    path = args.resume or args.evaluate
    if not os.path.isfile(path):
        fail(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # a stranger's file runs no code
        script, then = checkpoint["script"], Args(**checkpoint["args"])
    except Exception:  # there is no end to what a broken file can raise
        fail(f"{path} is not a complete checkpoint of {os.path.basename(__file__)}")
    if script != os.path.basename(__file__):
        fail(f"{path} is a checkpoint of {script}")
    args = parse_args(default=then)
    for name, value in vars(then).items():
        if name not in CHANGEABLE and getattr(args, name) != value:
            fail(f"--{name.replace('_', '-')} was {value} in the run of {path}, it can't be {getattr(args, name)}")
    return checkpoint, args


def random_states(rng):
    name, key, *rest = np.random.get_state()
    numpy = (name, key.tolist(), *rest)
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "rng": rng.bit_generator.state}


def set_random_states(rng, states):
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    rng.bit_generator.state = states["rng"]


def progress(global_step, total_timesteps, seconds, metrics, eval_return):
    left = int(seconds * max(0, total_timesteps / global_step - 1))
    evaluated = "" if np.isnan(eval_return) else f"eval {eval_return:.3f}, "
    return (
        f"step {global_step:,} of {total_timesteps:,}: return {metrics['charts/episodic_return']:.3f}, {evaluated}"
        f"{metrics['charts/SPS']:,} steps/s, {left // 60}:{left % 60:02} left"
    )


def report(global_step, eval_return, args, start_time):
    seconds = time.time() - start_time
    print(f"final: {global_step=} {eval_return=:.4f} eval_episodes={args.eval_episodes} {seconds=:.1f}")


# ---------------------------------------------------------------------------------------------------------------------
# Environments: any flat space becomes columns of numbers, one row a time step


def make_env(args, video):
    kwargs = {"render_mode": "rgb_array"} if video else {}
    env = gym.make(args.env_id, max_episode_steps=args.max_episode_steps or None, **kwargs)
    if video:
        env = gym.wrappers.RecordVideo(env, "videos", name_prefix=args.env_id, episode_trigger=lambda n: n == 0)
    return env


def make_envs(args, num_envs, video=False):
    """num_envs copies of the environment. Autoreset is disabled: `collect` resets each, with its episode's seed."""
    makers = [partial(make_env, args, video and number == 0) for number in range(num_envs)]
    try:
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    except (gym.error.Error, ImportError, TypeError) as error:
        fail(f"--env-id {args.env_id}: {error}")


def columns(space):
    """The columns of a space: for each one the number of its categories, or 0 for a real number."""
    if isinstance(space, Discrete):
        return [int(space.n)]
    if isinstance(space, MultiDiscrete):
        return [int(n) for n in space.nvec.flatten()]
    if isinstance(space, Box) and len(space.shape) == 1:
        return [0] * space.shape[0]
    if isinstance(space, (Tuple, Dict)):
        return [n for part in (space.values() if isinstance(space, Dict) else space) for n in columns(part)]
    fail(f"the space {space} is not supported: Discrete, MultiDiscrete, flat Box, and Tuple or Dict of these are")


def flatten(space, x):
    """A batch of elements of `space`, as a vector environment gives it, to columns, (N, k) float32."""
    if isinstance(space, Tuple):
        return np.concatenate([flatten(part, x[i]) for i, part in enumerate(space)], axis=1)
    if isinstance(space, Dict):
        return np.concatenate([flatten(part, x[key]) for key, part in space.items()], axis=1)
    return np.asarray(x - getattr(space, "start", 0), dtype=np.float32).reshape(len(x), -1)


def unflatten(space, x):
    """Columns (N, k) back to a batch of actions; what lies outside of a Box is clipped to it."""
    if isinstance(space, Box):
        return np.clip(x, space.low, space.high)
    x = x.astype(np.int64).reshape(len(x), *space.shape)
    return x + space.start


class OneHot(nn.Module):
    """Columns to features: a category becomes a one-hot vector, a real number stays what it is."""

    def __init__(self, sizes):
        super().__init__()
        sizes = torch.tensor(sizes, dtype=torch.long)
        self.register_buffer("category", sizes > 0)
        self.register_buffer("offset", torch.cumsum(sizes.clamp(min=1), 0) - sizes.clamp(min=1))
        self.features = int(sizes.clamp(min=1).sum())

    def forward(self, x):  # (..., k) -> (..., features)
        index = self.offset + torch.where(self.category, x, 0).long()
        return x.new_zeros(*x.shape[:-1], self.features).scatter_(-1, index, torch.where(self.category, 1.0, x))


class Rows(NamedTuple):
    """Time steps, (T,) or (T, B) of them. The last row of an episode has its final observation, and zeros."""

    obs: torch.Tensor  # (..., columns of the observation)
    action: torch.Tensor  # (..., columns of the action), taken on obs
    reward: torch.Tensor  # (...), for action
    terminated: torch.Tensor  # (...) bool: action ended the episode in a terminal state
    start: torch.Tensor  # (...) bool: the episode's first row


def empty_rows(envs, device, *shape):
    spaces = envs.single_observation_space, envs.single_action_space
    obs, action = (torch.zeros(*shape, len(columns(space)), device=device) for space in spaces)
    terminated, start = torch.zeros(2, *shape, dtype=torch.bool, device=device)
    return Rows(obs, action, torch.zeros(shape, device=device), terminated, start)


@contextlib.contextmanager
def blame(envs):
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by the environment {envs.envs[0].spec.id}")
        raise


def require_finite(envs, x, playing, step):
    bad = playing & ~np.isfinite(x).all(1)
    if bad.any():
        where = f"at step {step[bad][0]} of an episode"
        fail(f"{envs.envs[0].spec.id}: an observation or reward is not finite, {where}")


NOISE_BLOCK = 128


@torch.no_grad()
def collect(envs, network, act, seed, episode, quota):
    """Start episodes in parallel until `quota` transitions have been played, finish every one, return them whole.

    act(network, obs (1, N, k), previous action (1, N, a), start (1, N), state, noise (N, 1 + a)) -> action (N, a),
    state; noise is uniform on [0, 1). Episodes are numbered from `episode` on; each is reset, and gets its noise, by a
    generator seeded with (*seed, its number), so what happens in it does not depend on what runs beside it. Returns a
    list of Rows of NumPy arrays, in that order.
    """
    N, k = envs.num_envs, len(columns(envs.single_action_space))
    state, device = network.memory.initial_state(N), next(network.parameters()).device
    playing, done = np.zeros(N, dtype=bool), np.ones(N, dtype=bool)
    number, first, generators = np.zeros(N, dtype=int), np.zeros(N, dtype=int), [None] * N
    action = np.zeros((N, k), dtype=np.float32)
    noise = np.zeros((N, NOISE_BLOCK, 1 + k), dtype=np.float32)
    steps, spans, played = [], [], 0
    while True:
        start = done
        if done.any():
            playing[done] = played < quota
            if not playing.any():
                break
            seeds = [None] * N
            for i in np.flatnonzero(done & playing):
                number[i], first[i], generators[i] = episode, len(steps), np.random.default_rng((*seed, episode))
                seeds[i] = int(generators[i].integers(2**31))
                episode += 1
            # one that has nothing more to play is reset as well, only because the others can't step without it
            with blame(envs):
                obs, _ = envs.reset(seed=seeds, options={"reset_mask": done})
            obs = flatten(envs.single_observation_space, obs)
            require_finite(envs, obs, playing, len(steps) - first)
        age = len(steps) - first
        for i in np.flatnonzero(playing & (age % NOISE_BLOCK == 0)):
            noise[i] = generators[i].random(noise.shape[1:], dtype=np.float32)
        inputs = (torch.as_tensor(x, device=device)[None] for x in (obs, action, start))
        now = torch.as_tensor(noise[np.arange(N), age % NOISE_BLOCK], device=device)
        action, state = act(network, *inputs, state, now)
        action = action.cpu().numpy()
        with blame(envs):
            next_obs, reward, terminated, truncated, _ = envs.step(unflatten(envs.single_action_space, action))
        next_obs = flatten(envs.single_observation_space, next_obs)
        require_finite(envs, np.column_stack((next_obs, reward)), playing, age + 1)
        done = terminated | truncated
        steps.append((obs, action, reward.astype(np.float32), terminated, start, next_obs))
        played += playing.sum()
        spans += [(number[i], i, first[i], len(steps)) for i in np.flatnonzero(done & playing)]
        obs = next_obs
    *rows, next_obs = (np.stack(x) for x in zip(*steps))  # (steps, N, ...) each
    episodes = []
    for _, i, a, b in sorted(spans):
        last = Rows(next_obs[b - 1, i], 0, 0, False, False)
        episodes.append(Rows(*(np.concatenate((x[a:b, i], np.full_like(x[:1, i], y))) for x, y in zip(rows, last))))
    return episodes


# ---------------------------------------------------------------------------------------------------------------------
# The agent


class QNetwork(nn.Module):
    def __init__(self, envs, args):
        super().__init__()
        nvec = torch.tensor(columns(envs.single_action_space))
        self.register_buffer("nvec", nvec)
        self.register_buffer("stride", torch.cumprod(nvec, 0) // nvec)  # MultiDiscrete actions are numbered through
        self.num_actions = int(nvec.prod())
        self.encode_obs = OneHot(columns(envs.single_observation_space))
        self.encode_action = OneHot(nvec.tolist()) if args.previous_action else None
        features = self.encode_obs.features + (self.encode_action.features if args.previous_action else 0)
        d = args.d_model
        self.encoder = nn.Sequential(nn.Linear(features, d), nn.GELU(), nn.Linear(d, d))
        self.memory = MEMORIES[args.memory](d)
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, 1 + self.num_actions))
        # an agent that believes nothing yet learns from rewards, not from the noise that it would bootstrap from
        nn.init.orthogonal_(self.head[-1].weight, 0.01)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, obs, previous_action, start, state):
        x = self.encode_obs(obs)  # (T, B, features)
        if self.encode_action is not None:
            x = torch.cat((x, self.encode_action(previous_action) * ~start[..., None]), -1)
        x, state = self.memory(self.encoder(x), state, start)  # (T, B, d_model)
        value, advantage = self.head(x).split((1, self.num_actions), -1)
        return value + advantage - advantage.mean(-1, keepdim=True), state  # (T, B, num_actions)


def policy(q_network, obs, previous_action, start, state, noise, epsilon):
    q, state = q_network(obs, previous_action, start, state)  # (1, N, num_actions)
    explore = (noise[:, 1] * q_network.num_actions).long()
    action = torch.where(noise[:, 0] < epsilon, explore, q[0].argmax(-1))
    return (action[:, None] // q_network.stride % q_network.nvec).float(), state  # (N, a)


class Tape:
    """A ring of whole episodes. The oldest ones make room, whole; an episode may run over the ring's end."""

    def __init__(self, args, envs, device):
        self.capacity = args.buffer_size
        self.multiple = 64 if args.compile else 1  # of rows in a batch
        self.rows = empty_rows(envs, device, self.capacity)
        self.episodes = []  # (first row, number of rows) of each; rows are counted from the very first
        self.end = 0

    def add(self, episode):
        rows = len(episode.start)
        if rows > self.capacity:
            fail(f"an episode of {rows - 1} steps never fits: raise --buffer-size to {rows} or set --max-episode-steps")
        while self.episodes and self.end + rows - self.episodes[0][0] > self.capacity:
            self.episodes.pop(0)
        self.episodes.append((self.end, rows))
        at = np.arange(self.end, self.end + rows) % self.capacity
        for ring, x in zip(self.rows, episode):
            ring[at] = torch.as_tensor(x, device=ring.device)
        self.end += rows

    def sample(self, batch_size, rng):
        """Episodes drawn uniformly, with replacement, until they hold batch_size transitions; the last is kept whole.

        Every transition is equally likely to be trained on: how many episodes are drawn depends on their lengths, but
        the expected number of draws of each is the same (Wald's identity). Returns rows (R, 1) and t (n,), the rows
        that hold a transition: all but the last of each episode. Padding is rows of empty episodes, in no t.
        """
        at, transitions = [], 0
        while transitions < batch_size:
            first, rows = self.episodes[rng.integers(len(self.episodes))]
            at.append(np.arange(first, first + rows))
            transitions += rows - 1
        at = np.concatenate(at) % self.capacity
        padding = -len(at) % self.multiple
        at = torch.as_tensor(np.pad(at, (0, padding)), device=self.rows.start.device)
        rows = Rows(*(ring[at][:, None] for ring in self.rows))
        rows.start[len(at) - padding :] = True
        return rows, (~rows.start[1:, 0]).nonzero().squeeze(1)

    def state_dict(self):
        return vars(self) | {"rows": [*self.rows]}

    def load_state_dict(self, state):
        device = self.rows.start.device
        vars(self).update({name: x.to(device) if torch.is_tensor(x) else x for name, x in state.items()})
        self.rows = Rows(*(x.to(device) for x in self.rows))


def update(q_network, target_network, optimizer, batch, args):
    rows, t = batch
    # CRUCIAL: the next state is the next row, so its value is that of the whole history up to it, o_0 included
    now, after = t, t + 1
    inputs = (rows.obs, rows.action.roll(1, 0), rows.start, q_network.memory.initial_state(rows.start.shape[1]))
    q, _ = q_network(*inputs)  # (R, 1, num_actions)
    with torch.no_grad():
        q_target, _ = target_network(*inputs)
        best = q[after].argmax(-1, keepdim=True)
        next_value = q_target[after].gather(-1, best).squeeze(-1)
        td_target = rows.reward[now] + args.gamma * ~rows.terminated[now] * next_value
    action = (rows.action[now] * q_network.stride).sum(-1, keepdim=True).long()
    old_val = q[now].gather(-1, action).squeeze(-1)
    loss = F.smooth_l1_loss(old_val, td_target)

    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm)
    if not np.isfinite((loss + norm).item()):
        raise FloatingPointError(f"the loss is {loss.item()}, the norm of its gradient {norm.item()}")
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(target_network.parameters()), list(q_network.parameters()), args.tau)
    return {
        "losses/td_loss": loss.detach(),
        "losses/q_values": old_val.detach().mean(),
    }


def greedy_episodes(envs, q_network, args):
    """One in each of the environments, always the same ones."""
    return collect(envs, q_network, partial(policy, epsilon=0.0), (args.seed, 1), episode=0, quota=1)


def evaluate(envs, q_network, args):
    """The mean undiscounted return of greedy_episodes."""
    return float(np.mean([episode.reward.sum() for episode in greedy_episodes(envs, q_network, args)]))


def sensitivity(envs, q_network, args):
    """How much a decision depends on what was seen long before: |d Q(s_n, a_n) / d o_i| by age n - i.

    n is the last transition of an episode that `evaluate` plays, o_i the features of an observation, and Q that of the
    whole history. Episodes are laid end to end: nothing passes between them, so one backward pass serves all. Returns
    (ages,), from age 0 to that of the longest episode's first row; the mean over the episodes that are old enough.
    """
    episodes = greedy_episodes(envs, q_network, args)
    device = q_network.nvec.device
    rows = Rows(*(torch.as_tensor(np.concatenate(x), device=device)[:, None] for x in zip(*episodes)))
    age = torch.cat([torch.arange(len(e.start) - 2, -2, -1, device=device) for e in episodes])  # -1: final observation
    features = []
    hook = q_network.encode_obs.register_forward_hook(lambda *call: features.append(call[-1].requires_grad_()))
    q, _ = q_network(rows.obs, rows.action.roll(1, 0), rows.start, q_network.memory.initial_state(1))
    hook.remove()
    last = age == 0
    action = (rows.action[last] * q_network.stride).sum(-1, keepdim=True).long()
    (gradient,) = torch.autograd.grad(q[last].gather(-1, action).sum(), features)  # (R, 1, features)
    norm = gradient[age >= 0, 0].norm(dim=-1)
    age = age[age >= 0]
    return torch.bincount(age, norm) / torch.bincount(age)


def linear_schedule(start_e, end_e, duration, t):
    slope = (end_e - start_e) / duration
    return max(slope * t + start_e, end_e)


if __name__ == "__main__":
    args = parse_args()
    saved = None
    if args.resume or args.evaluate:
        saved, args = load(args)
    check(args)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # tensors this small gain little from more, and lose much where cores are shared
    # glibc goes by the largest block it has seen freed: it then keeps memory between updates instead of giving it back
    # to the kernel, page by page, and fetching it again, which takes a tenth of the time (mallopt(3), M_MMAP_THRESHOLD)
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    envs = make_envs(args, args.num_envs)
    if args.capture_video and "rgb_array" not in envs.metadata["render_modes"]:
        fail(f"--capture-video: {args.env_id} does not render")
    eval_envs = make_envs(args, args.eval_episodes, video=args.capture_video)
    if not isinstance(envs.single_action_space, (Discrete, MultiDiscrete)):
        fail(f"{args.env_id} has the actions {envs.single_action_space}: DQN needs discrete ones, try ppo_tbb.py")
    q_network = QNetwork(envs, args).to(device)
    target_network = copy.deepcopy(q_network)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
    buffer = Tape(args, envs, device)
    learners = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer, "buffer": buffer}

    networks = [q_network, target_network]
    if args.compile:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        networks = [torch.compile(network, mode=mode, dynamic=False) for network in networks]

    start_time = shown = time.time()
    global_step, num_episodes, num_updates, eval_return = 0, 0, 0, float("nan")
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(start_time)}"
    if saved:
        try:
            for name, part in learners.items():
                part.load_state_dict(saved["learners"][name])
        except (KeyError, RuntimeError, ValueError):
            fail(f"{args.resume or args.evaluate} is of another shape: has {args.env_id} or the code changed since?")
        global_step, num_episodes, num_updates, eval_return = saved["counters"]
        start_time -= saved["seconds"]
        run_name = saved["run_name"]
        set_random_states(rng, saved["random_states"])
    if args.evaluate:
        report(global_step, evaluate(eval_envs, q_network, args), args, start_time)
        sys.exit()
    # what was logged after the checkpoint is purged, so that no step counts twice
    writer = SummaryWriter(f"runs/{run_name}", purge_step=global_step + 1 if saved else None)
    table = "\n".join(f"|{key}|{value}|" for key, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", global_step)

    def save_checkpoint():
        checkpoint = {
            "script": os.path.basename(__file__),
            "args": vars(args),
            "run_name": run_name,
            "seconds": time.time() - start_time,
            "counters": (global_step, num_episodes, num_updates, eval_return),
            "learners": {name: part.state_dict() for name, part in learners.items()},
            "random_states": random_states(rng),
        }
        save(f"runs/{run_name}/checkpoint.pt", checkpoint)

    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))

    while global_step < args.total_timesteps and not signals:
        before, metrics = global_step, {}
        # ALGO LOGIC: play whole episodes with the current weights
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - global_step / args.total_timesteps) * args.learning_rate
        duration = args.exploration_fraction * args.total_timesteps
        epsilon = linear_schedule(args.start_e, args.end_e, duration, global_step)
        act = partial(policy, epsilon=epsilon)
        episodes = collect(envs, q_network, act, (args.seed, 0), num_episodes, args.num_steps * args.num_envs)
        num_episodes += len(episodes)
        lengths = [len(episode.reward) - 1 for episode in episodes]
        global_step += sum(lengths)
        for episode in episodes:
            buffer.add(episode)
        metrics["charts/epsilon"] = epsilon
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["charts/episodic_return"] = np.mean([episode.reward.sum() for episode in episodes])
        metrics["charts/episodic_length"] = np.mean(lengths)

        # ALGO LOGIC: training
        try:
            while num_updates * args.train_frequency < global_step - args.learning_starts:
                batch = buffer.sample(args.batch_size, rng)
                metrics |= update(*networks, optimizer, batch, args)
                num_updates += 1
        except FloatingPointError as error:
            save_checkpoint()
            sys.exit(f"update {num_updates + 1}: {error}; the weights before it are in runs/{run_name}/checkpoint.pt")

        # what it came to, so far
        over = global_step >= args.total_timesteps
        if over or before // args.eval_frequency < global_step // args.eval_frequency:
            metrics["charts/eval_return"] = eval_return = evaluate(eval_envs, q_network, args)
            if args.log_sensitivity:
                writer.add_tensor("charts/sensitivity", sensitivity(eval_envs, q_network, args), global_step)
        metrics["charts/SPS"] = int(global_step / (time.time() - start_time))
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, global_step)
        due = args.save_frequency and before // args.save_frequency < global_step // args.save_frequency
        if due or over:
            writer.flush()
            save_checkpoint()
        if time.time() - shown > 1:
            shown = time.time()
            print(progress(global_step, args.total_timesteps, shown - start_time, metrics, eval_return), flush=True)

    envs.close()
    eval_envs.close()
    writer.close()
    if signals:
        save_checkpoint()
        print(f"stopped at step {global_step:,}; go on with --resume runs/{run_name}/checkpoint.pt")
        sys.exit(128 + signals[0])
    report(global_step, eval_return, args, start_time)

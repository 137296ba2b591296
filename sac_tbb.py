"""Soft actor-critic (SAC, Haarnoja et al. 2018, arXiv 1812.05905) with memory over tape-based batches (TBB).

    python sac_tbb.py --env-id popgym-PositionOnlyPendulumEasy-v0 --memory lru

Whole episodes are concatenated on a tape, and the memory resets at their boundaries (monoids.py), as in dqn_tbb.py.
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
    env_id: str = "popgym-PositionOnlyPendulumEasy-v0"
    """the id of the environment; my_module:MyEnv-v0 imports my_module first"""
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments of the environment, for example --env-kwargs map_name 8x8 is_slippery False (false is a string)"""
    total_timesteps: int = 50_000
    """transitions to collect; the last iteration may exceed it, since episodes are finished"""
    learning_rate: float = 1e-3
    """the learning rate of the optimizer and of log_alpha"""
    num_envs: int = 4
    """the number of parallel environments; in an iteration each plays one episode"""
    max_episode_steps: int = 0
    """truncate episodes after this many steps (and bootstrap there); replaces the registered limit unless 0"""
    buffer_size: int = 200_000
    """rows on the tape; the oldest episodes are overwritten; cannot change on --resume"""
    gamma: float = 0.99
    """the discount factor gamma"""
    tau: float = 0.1
    """the target network update rate, at every update"""
    batch_size: int = 400
    """transitions in a batch; its last episode is kept whole, so it may hold more"""
    learning_starts: int = 1_000
    """transitions to collect before learning starts; of a new run, not of a resumed one"""
    train_frequency: int = 20
    """transitions to collect per update"""
    max_grad_norm: float = 1.0
    """the maximum norm of the gradient"""
    memory: tuple[Literal[*MEMORIES], ...] = ("lru",)
    """the memory model: one name for two layers of it, several for one layer of each, in that order"""
    memory_kwargs: dict[str, int | float] = field(default_factory=dict)
    """arguments of each layer (see its class in monoids.py), such as horizon 100000 d_state 64, and num_layers"""
    d_model: int = 64
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
            (0, 1, "gamma tau"),
            (1e-12, np.inf, "learning_rate max_grad_norm"),
            (1, self.buffer_size, "batch_size"),
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
        """Observations become a flat float32 Box, with one-hot categories; actions a flat Box from -1 to 1."""
        render = {"render_mode": "rgb_array"} if video else {}
        env = gym.make(args.env_id, args.max_episode_steps or None, **(args.env_kwargs | render))
        if video and index == 0:
            env = gym.wrappers.RecordVideo(env, "videos", name_prefix="eval", episode_trigger=lambda n: n == 0)
        space = env.observation_space
        if "Text(" in str(space) or not isinstance(spaces.flatten_space(space), spaces.Box):  # Text flattens to codes
            raise ValueError(f"observations do not flatten to a Box: {space}")
        env = gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)
        space = env.action_space
        if not (isinstance(space, spaces.Box) and space.dtype.kind == "f" and (space.high - space.low < np.inf).all()):
            raise ValueError(f"SAC takes bounded Box actions of floats, not {space}")
        low, high, shape, dtype = space.low, space.high, space.shape, space.dtype
        decode = lambda a: np.clip(low + (a.reshape(shape) + 1) / 2 * (high - low), low, high).astype(dtype)
        return gym.wrappers.TransformAction(env, decode, spaces.Box(-1, 1, (low.size,)))

    try:
        makers = [partial(make_env, index) for index in range(num_envs)]
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    except Exception as error:  # an environment can raise anything
        hint = "an id may name its module, module:MyEnv-v0; other spaces need an ObservationWrapper or ActionWrapper"
        fail(f"--env-id {args.env_id}: {type(error).__name__}: {' '.join(str(error).split())} ({hint})")


class Rows(NamedTuple):
    """Time steps, (T,) or (T, B) of them. The last row of an episode holds its final observation, and zeros."""

    obs: torch.Tensor  # (..., features) float32
    action: torch.Tensor  # (..., k) float32 in [-1, 1], taken on obs; roll(1, 0) gives the previous one
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


class Agent(nn.Module):
    def __init__(self, envs, args):
        super().__init__()
        d, k, self.previous_action = args.d_model, envs.single_action_space.shape[0], args.previous_action
        features = envs.single_observation_space.shape[0] + k * self.previous_action
        self.encoder = nn.Sequential(nn.Linear(features, d), nn.GELU(), nn.Linear(d, d))
        self.memory, self.norm = make_memory(args.memory, d, **args.memory_kwargs), nn.LayerNorm(d)
        head = lambda inputs, outputs: nn.Sequential(nn.Linear(inputs, d), nn.GELU(), nn.Linear(d, outputs))
        self.actor, self.critics = head(d, 2 * k), nn.ModuleList(head(d + k, 1) for _ in range(2))
        self.register_buffer("log_alpha", torch.tensor(-3.0))  # alpha begins at 0.05
        self.register_buffer("reward_scale", torch.tensor(1.0))  # so that rewards of any size suit this alpha

    def forward(self, obs, previous_action, start, state):
        if self.previous_action:
            obs = torch.cat((obs, previous_action * ~start[..., None]), -1)  # (T, B, features); 0 at an episode's start
        x, state = self.memory(self.encoder(obs), state, start)
        return self.norm(x), state  # (T, B, d_model)

    def sample(self, x, noise):  # a = tanh(u), u ~ N(mean, std), and log pi(a) = log N(u) - log(1 - tanh(u)^2)
        mean, log_std = self.actor(x).chunk(2, -1)  # (T, B, k)
        u = mean + (log_std := log_std.clamp(-20, 2)).exp() * noise
        logprob = -(noise**2) / 2 - log_std - np.log(2 * np.pi) / 2 - 2 * (np.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), logprob.sum(-1)

    def q_values(self, x, action):  # scaled: one component would be lost beside d_model features of variance 1
        x = torch.cat((x, action * (x.shape[-1] / action.shape[-1]) ** 0.5), -1)
        return torch.cat([critic(x) for critic in self.critics], -1)  # (T, B, 2)


def policy(agent, obs, previous_action, start, state, greedy):
    x, state = agent(obs, previous_action, start, state)
    action = agent.sample(x, torch.randn_like(previous_action) * (not greedy))[0][0]  # (N, k)
    if not torch.isfinite(action).all():
        fail("the network's output is not finite; checkpoints are unchanged")
    return action, state


class Tape:
    """A ring buffer of whole episodes; the oldest are overwritten. An episode may cross the end of the ring."""

    def __init__(self, args, envs, device):
        features, action = envs.single_observation_space.shape, envs.single_action_space.shape
        shapes = (features, torch.float), (action, torch.float), ((), torch.float), ((), torch.bool), ((), torch.bool)
        self.rows = Rows(*(torch.zeros(args.buffer_size, *x, dtype=dtype, device=device) for x, dtype in shapes))
        self.index, self.end = [], 0  # (first row, number of rows) of each episode; row i lies at i % buffer_size
        self.multiple = 64 if args.compile else 1  # batches are padded to it: few sizes to compile

    def add(self, episode):
        n, capacity = len(episode.start), len(self.rows.start)
        if n > capacity:
            fail(f"an episode of {n - 1} steps never fits: raise --buffer-size to {n} or set --max-episode-steps")
        while self.index and self.end + n - self.index[0][0] > capacity:
            self.index.pop(0)
        self.index.append((self.end, n))
        at = np.arange(self.end, self.end + n) % capacity
        for ring, x in zip(self.rows, episode):
            ring[at] = torch.as_tensor(x, device=ring.device)
        self.end += n

    def sample(self, batch_size, rng):
        """Episodes drawn uniformly, with replacement, until they hold batch_size transitions; the last is kept whole.

        Returns rows (R, 1) and t (n,), the rows that hold a transition: not an episode's last, nor padding (--compile).
        All transitions have the same expected number of draws, but weigh less in the mean of a larger batch.
        """
        at, transitions = [], 0
        while transitions < batch_size:
            first, n = self.index[rng.integers(len(self.index))]
            at.append(np.arange(first, first + n))
            transitions += n - 1
        at = np.concatenate(at) % len(self.rows.start)
        padding = -len(at) % self.multiple
        at = torch.as_tensor(np.pad(at, (0, padding)), device=self.rows.start.device)
        rows = Rows(*(ring[at][:, None] for ring in self.rows))
        rows.start[len(at) - padding :] = True  # the padding: episodes of no transition
        return rows, (~rows.start[1:, 0]).nonzero().squeeze(1)  # the next row belongs to the same episode

    def state_dict(self):
        return {"rows": [x[: self.end].clone() for x in self.rows], "index": [*self.index], "end": self.end}

    def load_state_dict(self, state):
        for ring, x in zip(self.rows, state["rows"], strict=True):
            ring[: state["end"]] = x
        self.index, self.end = [*state["index"]], state["end"]


def update(agent, target_agent, optimizer, batch, args):
    """y = r / scale + gamma (1 - terminated) (min_i Q_target_i(s', a') - alpha log pi(a'|s')), where a' ~ pi(s')."""
    rows, t = batch
    inputs = (rows.obs, rows.action.roll(1, 0), rows.start, agent.memory.initial_state(rows.start.shape[1]))
    x, _ = agent(*inputs)  # (R, 1, d_model), of the history up to obs; the critics take the action as well
    action, logprob = agent.sample(x.detach(), torch.randn_like(rows.action))  # only the critics train the memory
    alpha, entropy = agent.log_alpha.exp(), -logprob[t].detach().mean()
    with torch.no_grad():
        value = target_agent.q_values(target_agent(*inputs)[0], action).amin(-1) - alpha * logprob
        # CRUCIAL: the next state is the next row, so its value has the whole history (next_obs alone lacks obs_0)
        td_target = rows.reward[t] / agent.reward_scale + args.gamma * ~rows.terminated[t] * value[t + 1]
    old_val = agent.q_values(x, rows.action)[t]  # (n, 1, 2)
    loss = F.mse_loss(old_val, td_target[..., None].expand_as(old_val))
    actor_loss = (alpha * logprob - agent.q_values(x.detach(), action).amin(-1))[t].mean()

    optimizer.zero_grad()
    loss.backward()
    actor_loss.backward(inputs=[*agent.actor.parameters()])  # CRUCIAL: not the critics' parameters
    norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    if not torch.isfinite(loss + norm + agent.reward_scale):  # the squares of rewards may overflow
        fail(f"the loss is {loss}, its gradient's norm {norm}, {agent.reward_scale=}: checkpoints are unchanged")
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(target_agent.parameters()), list(agent.parameters()), args.tau)
        agent.log_alpha -= args.learning_rate * (entropy / rows.action.shape[-1] + 1)  # target entropy: -dim(A)
    return {"losses/td_loss": loss.detach(), "losses/q_values": old_val.detach().mean(), "losses/entropy": entropy}


def evaluate(envs, agent, args):
    """Undiscounted returns of greedy episodes, one in each environment, with the same seeds at every evaluation."""
    episodes = collect(envs, agent, partial(policy, greedy=True), (args.seed, 1))
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
        agent = Agent(envs, args).to(device)
        target_agent = copy.deepcopy(agent)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
        buffer = Tape(args, envs, device)
        learners = {"agent": agent, "target_agent": target_agent, "optimizer": optimizer, "buffer": buffer}
        for name, learner in (learners.items() if saved else ()):
            learner.load_state_dict(saved["learners"].pop(name))  # frees the copy
        counters = saved["counters"] if saved else (0, 0, args.learning_starts, np.nan, 0)
        iteration, global_step, next_update, eval_return, seconds = counters
        if not args.evaluate:  # purge_step: what was logged after the checkpoint does not count twice
            writer = SummaryWriter(os.path.dirname(path) or ".", purge_step=global_step + 1 if saved else None)
    except (ArithmeticError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        fail(f"{path if saved else 'cannot start'}: {' '.join(str(error).split())[:300]}")  # arguments, shapes, no room
    compiled = partial(torch.compile, mode="reduce-overhead", dynamic=False, recompile_limit=64)  # once for each size
    networks = [compiled(x) if args.compile else x for x in (agent, target_agent)]
    if finished := args.evaluate or global_step >= args.total_timesteps:
        returns = evaluate(eval_envs, agent, args)
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
        evaluations = global_step // args.eval_frequency
        optimizer.param_groups[0]["lr"] = args.learning_rate  # a resumed run may have another
        episodes = collect(envs, agent, partial(policy, greedy=False), (args.seed, 0, iteration))
        for episode in episodes:
            buffer.add(episode)
        agent.reward_scale.copy_(1e-8 + buffer.rows.reward[: buffer.end].square().mean().sqrt())
        lengths = [len(episode.reward) - 1 for episode in episodes]
        iteration, global_step = iteration + 1, global_step + sum(lengths)
        metrics = {"losses/alpha": agent.log_alpha.exp(), "charts/episodic_length": np.mean(lengths)}
        metrics["charts/episodic_return"] = episodic_return = np.mean([episode.reward.sum() for episode in episodes])
        # ALGO LOGIC: training
        while next_update < global_step:
            batch = buffer.sample(args.batch_size, np.random.default_rng((args.seed, 2, next_update)))
            metrics |= update(*networks, optimizer, batch, args)
            next_update += args.train_frequency
        finished = global_step >= args.total_timesteps
        if evaluated := (finished or evaluations < global_step // args.eval_frequency):
            metrics["charts/eval_return"] = eval_return = evaluate(eval_envs, agent, args).mean().item()
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

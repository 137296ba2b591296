"""PPO (Schulman et al. 2017, arXiv 1707.06347) with memory over tape-based batches (TBB).

    python ppo_tbb.py --env-id popgym-RepeatPreviousEasy-v0 --memory lru

An iteration plays whole episodes, and an update trains on whole episodes, concatenated on a tape: the memory resets at
their boundaries (monoids.py), no hidden state outlives the weights that made it, and no gradient is truncated.
A *row* is one time step; *start* marks an episode's first. An episode of n transitions is n + 1 rows, the last of which
holds the final observation, so the next row is always the next state: terminal, truncated or neither.
Source: "Revisiting Recurrent Reinforcement Learning with Memory Monoids" (Morad et al. 2024, arXiv 2402.09900).
"""

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
from torch.distributions import Categorical, Normal
from torch.utils.tensorboard import SummaryWriter

from monoids import MEMORIES, discounted_return, gae, make_memory


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
    total_timesteps: int = 250_000
    """transitions to collect; the last iteration may exceed it, since episodes are finished"""
    learning_rate: float = 1e-3
    """the learning rate of the optimizer"""
    num_envs: int = 16
    """the number of parallel environments; in an iteration each plays one episode"""
    max_episode_steps: int = 0
    """truncate episodes after this many steps (and bootstrap there); replaces the registered limit unless 0"""
    anneal_lr: bool = True
    """whether to anneal the learning rate linearly to zero"""
    gamma: float = 0.99
    """the discount factor gamma"""
    gae_lambda: float = 0.95
    """the lambda for the generalised advantage estimation"""
    num_minibatches: int = 4
    """the number of minibatches, each of whole episodes: no more than there are episodes"""
    update_epochs: int = 4
    """the number of epochs over an iteration's episodes"""
    norm_adv: bool = True
    """whether to normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """the surrogate clipping coefficient"""
    clip_vloss: bool = True
    """whether to clip the value loss as well"""
    ent_coef: float = 0.01
    """coefficient of the entropy"""
    vf_coef: float = 0.5
    """coefficient of the value function"""
    max_grad_norm: float = 0.5
    """the maximum norm of the gradient"""
    target_kl: float | None = None
    """the target KL divergence threshold: an iteration's epochs end once it is exceeded"""
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
            (1, np.inf, "total_timesteps num_envs num_minibatches update_epochs d_model eval_frequency eval_episodes"),
            (0, 1, "gamma gae_lambda"),
            (0, np.inf, "clip_coef ent_coef vf_coef"),
            (1e-12, np.inf, "learning_rate max_grad_norm" + " target_kl" * (self.target_kl is not None)),
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
        """Observations become a flat float32 Box, with one-hot categories; actions a flat MultiDiscrete or Box."""
        render = {"render_mode": "rgb_array"} if video else {}
        env = gym.make(args.env_id, args.max_episode_steps or None, **(args.env_kwargs | render))
        if video and index == 0:
            env = gym.wrappers.RecordVideo(env, "videos", name_prefix="eval", episode_trigger=lambda n: n == 0)
        space = env.observation_space
        if "Text(" in str(space) or not isinstance(spaces.flatten_space(space), spaces.Box):  # Text flattens to codes
            raise ValueError(f"observations do not flatten to a Box: {space}")
        env = gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)
        space = env.action_space
        if isinstance(space, spaces.Box) and space.dtype.kind == "f":
            decode = lambda a: np.clip(a.reshape(space.shape), space.low, space.high).astype(space.dtype)
            return gym.wrappers.TransformAction(env, decode, spaces.Box(-np.inf, np.inf, (space.low.size,)))
        if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            raise ValueError(f"PPO takes Discrete, MultiDiscrete or Box actions of floats, not {space}")
        nvec = np.ravel(space.nvec if isinstance(space, spaces.MultiDiscrete) else space.n)
        decode = lambda a: (np.reshape(a, space.shape) + space.start).astype(space.dtype)
        return gym.wrappers.TransformAction(env, decode, spaces.MultiDiscrete(nvec))

    try:
        makers = [partial(make_env, index) for index in range(num_envs)]
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    except Exception as error:  # an environment can raise anything
        hint = "an id may name its module, module:MyEnv-v0; other spaces need an ObservationWrapper or ActionWrapper"
        fail(f"--env-id {args.env_id}: {type(error).__name__}: {' '.join(str(error).split())} ({hint})")


class Rows(NamedTuple):
    """Time steps, (T,) or (T, B) of them. The last row of an episode holds its final observation, and zeros."""

    obs: torch.Tensor  # (..., features) float32
    action: torch.Tensor  # (..., k) int64 or float32, taken on obs; roll(1, 0) gives the previous one
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
        d, space, self.previous_action = args.d_model, envs.single_action_space, args.previous_action
        self.nvec = space.nvec.tolist() if isinstance(space, spaces.MultiDiscrete) else []
        outputs = sum(self.nvec) or space.shape[0]
        features = envs.single_observation_space.shape[0] + outputs * self.previous_action
        self.encoder = nn.Sequential(nn.Linear(features, d), nn.GELU(), nn.Linear(d, d))
        self.memory = make_memory(args.memory, d, **args.memory_kwargs)
        self.actor = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, outputs))
        self.critic = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, 1))
        self.register_buffer("squares", torch.zeros(2))  # of all returns: the sum of their squares, their number
        self.actor_logstd = nn.Parameter(torch.zeros(0 if self.nvec else outputs))
        nn.init.orthogonal_(self.actor[-1].weight, 0.01)  # the policy starts near uniform, or near N(0, 1)

    def forward(self, obs, previous_action, start, state):
        if self.previous_action:
            one_hots = [F.one_hot(a, n) for a, n in zip(previous_action.unbind(-1), self.nvec)]
            previous = torch.cat(one_hots, -1) if self.nvec else previous_action
            obs = torch.cat((obs, previous * ~start[..., None]), -1)  # (T, B, features); 0 at an episode's start
        x, state = self.memory(self.encoder(obs), state, start)  # (T, B, d_model)
        if self.nvec:  # one distribution over (T, B) for each component of the action
            dists = [Categorical(logits=y, validate_args=False) for y in self.actor(x).split(self.nvec, -1)]
        else:
            dists = [Normal(*y, validate_args=False) for y in zip(self.actor(x).unbind(-1), self.actor_logstd.exp())]
        return dists, self.critic(x).squeeze(-1), state


def policy(agent, obs, previous_action, start, state, greedy):
    dists, value, state = agent(obs, previous_action, start, state)
    if not torch.isfinite(value).all():
        fail("the network's output is not finite; checkpoints are unchanged")
    return torch.stack([dist.mode if greedy else dist.sample() for dist in dists], -1)[0], state  # (N, k)


def transitions(rows):
    return (~rows.start[1:, 0]).nonzero().squeeze(1)  # (n,): all rows but the last of each episode


def forward_tape(agent, rows):
    dists, value, _ = agent(rows.obs, rows.action.roll(1, 0), rows.start, agent.memory.initial_state(1))
    logprob = sum(dist.log_prob(action) for dist, action in zip(dists, rows.action.unbind(-1)))
    return dists, logprob, value  # (R, 1) each


@torch.no_grad()
def compute_advantages(agent, rows, args):
    _, logprob, value = forward_tape(agent, rows)
    # CRUCIAL: the next state is the next row, so a truncated episode bootstraps from its own final observation
    t = transitions(rows)
    done = ~torch.isin(t + 1, t)[:, None]  # the next row holds no transition: the episode ends there
    # rewards are divided by the root mean square return, so that learning_rate, vf_coef and clip_coef suit any scale
    square = discounted_return(args.gamma, rows.reward[t], done).square()
    agent.squares += torch.stack((square.sum(), torch.ones_like(square).sum()))
    reward = rows.reward[t] / (1e-8 + (agent.squares[0] / agent.squares[1]).sqrt())
    advantage = gae(args.gamma, args.gae_lambda, value[t], value[t + 1], reward, done, rows.terminated[t])
    return rows, logprob, value, torch.zeros_like(value).index_copy(0, t, advantage)  # (R, 1, ...) each


def minibatches(batch, args, rng):
    """Whole episodes, shuffled and distributed; with --compile padded to a multiple of 64 rows."""
    rows, *others = batch
    episodes = np.split(np.arange(len(rows.start)), 1 + rows.start[1:, 0].cpu().numpy().nonzero()[0])
    for dealt in np.array_split(rng.permutation(len(episodes)), min(args.num_minibatches, len(episodes))):
        at = np.concatenate([episodes[i] for i in dealt])
        padding = -len(at) % 64 if args.compile else 0
        at = torch.as_tensor(np.pad(at, (0, padding)), device=rows.start.device)  # row 0: episodes of no transition
        yield Rows(*(x[at] for x in rows)), *(x[at] for x in others)


def update(agent, optimizer, batch, args):
    """L = -E[min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)] - ent_coef E[entropy] + vf_coef E[value loss] (eq. 9)."""
    rows, logprob, value, advantage = batch
    dists, newlogprob, newvalue = forward_tape(agent, rows)
    t = transitions(rows)
    newlogprob, newvalue, logprob, value, advantage = (x[t] for x in (newlogprob, newvalue, logprob, value, advantage))
    returns = advantage + value  # (n, 1), as all that follow
    logratio = newlogprob - logprob
    ratio = logratio.exp()
    if args.norm_adv and len(t) > 1:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    pg_loss1, pg_loss2 = -advantage * ratio, -advantage * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()
    v_loss = (newvalue - returns) ** 2
    if args.clip_vloss:
        v_clipped = value + torch.clamp(newvalue - value, -args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - returns) ** 2)
    v_loss = 0.5 * v_loss.mean()
    entropy_loss = sum(dist.entropy()[t] for dist in dists).mean()
    loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss

    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    if not torch.isfinite(loss + norm + agent.squares.sum()):  # the squares of rewards may overflow
        fail(f"the loss is {loss}, its gradient's norm {norm}, {agent.squares=}: checkpoints are unchanged")
    optimizer.step()
    losses = {"value_loss": v_loss, "policy_loss": pg_loss, "entropy": entropy_loss, "old_approx_kl": -logratio.mean()}
    losses["approx_kl"] = ((ratio - 1) - logratio).mean()  # http://joschu.net/blog/kl-approx.html
    losses["clipfrac"] = ((ratio - 1).abs() > args.clip_coef).float().mean()
    return {f"losses/{name}": loss.detach() for name, loss in losses.items()}


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
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        learners = {"agent": agent, "optimizer": optimizer}
        for name, learner in (learners.items() if saved else ()):
            learner.load_state_dict(saved["learners"].pop(name))  # frees the copy
        iteration, global_step, eval_return, seconds = saved["counters"] if saved else (0, 0, np.nan, 0)
        if not args.evaluate:  # purge_step: what was logged after the checkpoint does not count twice
            writer = SummaryWriter(os.path.dirname(path) or ".", purge_step=global_step + 1 if saved else None)
    except (ArithmeticError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        fail(f"{path if saved else 'cannot start'}: {' '.join(str(error).split())[:300]}")  # arguments, shapes, no room
    network = torch.compile(agent, mode="reduce-overhead", dynamic=False, recompile_limit=64) if args.compile else agent
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
        progress, evaluations = global_step / args.total_timesteps, global_step // args.eval_frequency
        optimizer.param_groups[0]["lr"] = lr = args.learning_rate * (1 - progress if args.anneal_lr else 1)
        episodes = collect(envs, agent, partial(policy, greedy=False), (args.seed, 0, iteration))
        lengths = [len(episode.reward) - 1 for episode in episodes]
        iteration, global_step = iteration + 1, global_step + sum(lengths)
        metrics = {"charts/learning_rate": lr, "charts/episodic_length": np.mean(lengths)}
        metrics["charts/episodic_return"] = episodic_return = np.mean([episode.reward.sum() for episode in episodes])
        # ALGO LOGIC: training
        rows = Rows(*(torch.as_tensor(np.concatenate(x), device=device)[:, None] for x in zip(*episodes)))
        batch, rng = compute_advantages(agent, rows, args), np.random.default_rng((args.seed, 2, iteration))
        for _ in range(args.update_epochs):
            for minibatch in minibatches(batch, args, rng):
                metrics |= update(network, optimizer, minibatch, args)
            if args.target_kl is not None and metrics["losses/approx_kl"] > args.target_kl:
                break
        value, adv = (x[transitions(rows)] for x in batch[2:])
        metrics["losses/explained_variance"] = 1 - adv.var(correction=0) / (adv + value).var(correction=0)
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
                counters = (iteration, global_step, eval_return, seconds)
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

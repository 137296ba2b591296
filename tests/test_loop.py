"""The main loop, in every script: its schedules, counters, seeds and logs, and what its arguments do."""

import itertools
import math
import re
import time
from collections import Counter

import helpers
import numpy as np
import pytest
import torch
from helpers import DISCRETE, OFF_POLICY, Lengths, checkpoint_of, each, each_script, final, flags, load, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn_sbb
import dqn_tbb
import monoids
import ppo_tbb
import sac_tbb

play, trained = helpers.play, helpers.trained


def rewards_of(reward):
    """For Lengths.trouble."""
    return staticmethod(lambda obs, *rest: (obs, reward, *rest[1:]) if len(rest) > 1 else (obs, *rest))


@each(DISCRETE)
def test_learning_rate_is_annealed(script, play, tmp_path, monkeypatch):
    used, step = set(), torch.optim.Adam.step
    note = lambda optimizer: used.add(optimizer.param_groups[0]["lr"]) or step(optimizer)
    monkeypatch.setattr(torch.optim.Adam, "step", note)
    play(script, *flags(script))
    logged = scalars(tmp_path)["charts/learning_rate"]
    begins = [0, *(step for step, _ in logged)][:-1]  # of the iterations
    expected = [script.Args.learning_rate * (1 - begin / helpers.TOTAL) for begin in begins]
    np.testing.assert_allclose([float(lr) for _, lr in logged], expected, rtol=1e-6)
    assert used <= {*expected} and len(used) > 3
    play(script, *flags(script, "--no-anneal-lr", "--total-timesteps", 60), folder="constant")
    assert {lr for _, lr in scalars(tmp_path / "constant")["charts/learning_rate"]} == {logged[0][1]}


@pytest.mark.parametrize("script", [dqn_tbb, dqn_sbb])
def test_epsilon_falls_linearly(script, play, tmp_path):
    play(script, *flags(script, *"--start-e 0.9 --end-e 0.1 --exploration-fraction 0.5".split()))
    logged = scalars(tmp_path)["charts/epsilon"]
    begins = [0, *(step for step, _ in logged)][:-1]
    expected = [max(0.9 - 0.8 * begin / (0.5 * helpers.TOTAL), 0.1) for begin in begins]
    np.testing.assert_allclose([float(epsilon) for _, epsilon in logged], expected, rtol=1e-6)


@each_script
def test_training_explores_and_evaluation_does_not(script, play, tmp_path, monkeypatch):
    """Four environments that show the same: the actions in them differ in the first iteration only."""
    rewards = []
    note = lambda obs, *rest: rewards.append(rest[0]) if len(rest) > 1 else None
    monkeypatch.setattr(Lengths, "trouble", staticmethod(lambda *results: note(*results) or results))
    monkeypatch.setattr(Lengths, "lengths", [30])
    play(script, *flags(script, "--total-timesteps", 100, "--eval-episodes", 4))
    trained, evaluated = np.reshape(rewards, (2, 30, 4))
    assert (trained.std(1) > 0).any() and not evaluated.std(1).any()


@each_script
def test_no_two_draws_share_a_seed(script, play, tmp_path, monkeypatch):
    """Those of episodes, of batches and of evaluations; but all evaluations play the same episodes."""
    seeds, default_rng = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or default_rng(seed))

    def states_of(*more):
        seeds.clear()
        play(script, *flags(script, *more), folder=f"run{more}")
        return Counter(np.random.SeedSequence(seed).generate_state(4).tobytes() for seed in seeds)

    states = states_of()
    evaluations = len(scalars(tmp_path / "run()")["charts/eval_return"])
    assert [n for n in states.values() if n > 1] == [evaluations] and len(states) > 10
    assert not {*states} & {*states_of("--seed", 2, "--total-timesteps", 60)}


@each_script
def test_log_counts_steps_and_rewards(script, play, tmp_path, monkeypatch):
    """An iteration adds the lengths of its four episodes; with rewards of 1, a return is a length."""
    monkeypatch.setattr(Lengths, "trouble", rewards_of(1.0))
    play(script, *flags(script))
    tags = scalars(tmp_path)
    steps, lengths = zip(*tags["charts/episodic_length"])
    np.testing.assert_array_equal(np.diff(steps, prepend=0), [4 * float(length) for length in lengths])
    assert tags["charts/episodic_return"] == tags["charts/episodic_length"]


@each_script
def test_arguments_are_logged(script, trained, tmp_path):
    trained(script)
    path = checkpoint_of(tmp_path)
    (event,) = EventAccumulator(str(path.parent)).Reload().Tensors("hyperparameters/text_summary")
    arguments = [f"{name}: {value}" for name, value in load(path)["args"].items()]
    assert event.tensor_proto.string_val[0].decode().split("  \n") == arguments


@pytest.mark.parametrize("script", [ppo_tbb, sac_tbb])
def test_scale_of_rewards_that_were_all_0(script, play, monkeypatch):
    monkeypatch.setattr(Lengths, "trouble", rewards_of(0.0))
    assert play(script, *flags(script, "--total-timesteps", 60))[::2] == (0, "")


def test_speed_and_time_left(play, tmp_path, monkeypatch):
    clock = itertools.count(1e9, 0.1)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    _, out, _ = play(dqn_tbb, *flags(dqn_tbb))
    shown = re.findall(r"^step (\d+) of 240, return .*, (\d+) steps/s, (\d+):(\d\d) left$", out, re.MULTILINE)
    for step, speed, minutes, seconds in np.array(shown, int):
        assert 60 * minutes + seconds == max(0, 240 - step) // speed
    _, step, *_, seconds = load(checkpoint_of(tmp_path))["counters"]
    assert len(shown) > 2 and shown[-1][1] == str(int(step / seconds))


def test_no_cuda_leaves_the_gpu_alone(play, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert play(dqn_tbb, *flags(dqn_tbb, "--no-cuda", "--total-timesteps", 60))[0] == 0  # the line is the same in each


@each_script
def test_evaluation_plays_one_episode_in_each_environment(script, play, trained, tmp_path, monkeypatch):
    trained(script)
    results = []
    monkeypatch.setattr(Lengths, "trouble", staticmethod(lambda *args: results.append(len(args)) or args))
    monkeypatch.setattr(Lengths, "lengths", [7])
    assert play(script, "--evaluate", checkpoint_of(tmp_path), "--eval-episodes", 3)[0] == 0
    assert results.count(2) == 3 and len(results) == 3 + 3 * 7  # reset returns two things, step five


def test_evaluation_reports_mean_and_standard_deviation(play, trained, tmp_path, monkeypatch):
    """With rewards of 1, a return is a length: 1 or 11."""
    trained(dqn_tbb)
    monkeypatch.setattr(Lengths, "trouble", rewards_of(1.0))
    monkeypatch.setattr(Lengths, "lengths", [1, 11])
    _, out, _ = play(dqn_tbb, "--evaluate", checkpoint_of(tmp_path), "--eval-episodes", 20)
    mean, std = map(float, re.search(r"mean (\S+), standard deviation (\S+)", out).groups())
    assert 1 < mean < 11 and std == pytest.approx(((mean - 1) * (11 - mean)) ** 0.5, abs=1e-3)


@each_script
def test_seconds_of_a_resumed_run_add_up(script, play, trained, tmp_path):
    trained(script)
    path = checkpoint_of(tmp_path)
    checkpoint = load(path)
    checkpoint["counters"] = *checkpoint["counters"][:-1], 1e6
    torch.save(checkpoint, path)
    _, out, _ = play(script, "--resume", path, "--total-timesteps", 350)
    assert float(re.search(r"seconds=(\S+)", out)[1]) > 1e6 and load(path)["counters"][-1] > 1e6


@each(OFF_POLICY)
def test_updates_begin_after_learning_starts(script, play, monkeypatch):
    updates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer: updates.append(step(optimizer)))
    _, out, _ = play(script, *flags(script, "--learning-starts", 200))
    assert len(updates) == math.ceil((final(out)[0] - 200) / script.Args.train_frequency)


@each(OFF_POLICY)
def test_batches_have_batch_size_transitions(script, play, monkeypatch):
    """Or more, by an episode of up to 30."""
    name, sizes = "mse_loss" if script is sac_tbb else "smooth_l1_loss", set()
    loss = getattr(torch.nn.functional, name)
    note = lambda x, *args, **kwargs: sizes.add(x.shape[:2].numel()) or loss(x, *args, **kwargs)
    monkeypatch.setattr(torch.nn.functional, name, note)
    play(script, *flags(script, "--total-timesteps", 120))
    assert 100 <= min(sizes) <= max(sizes) < 130


@each(OFF_POLICY)
@pytest.mark.parametrize("tau", [0, 1])
def test_target_network_of_a_run_follows_by_tau(script, tau, play, tmp_path):
    """Not at all, or to the very weights."""
    assert play(script, *flags(script, "--tau", tau, "--total-timesteps", 120))[0] == 0
    network, target, *_ = load(checkpoint_of(tmp_path))["learners"].values()
    same = {torch.equal(network[name], target[name]) for name in network if name.endswith("weight")}
    assert same == {tau == 1}


@each(OFF_POLICY)
def test_target_network_begins_as_a_copy(script, play, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer: None)
    assert play(script, *flags(script, "--tau", 0, "--total-timesteps", 60))[0] == 0
    network, target, *_ = load(checkpoint_of(tmp_path))["learners"].values()
    assert all(torch.equal(network[name], target[name]) for name in network if name.endswith(("weight", "bias")))


def test_epochs_end_once_the_target_kl_is_exceeded(play, tmp_path, monkeypatch):
    updates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer: updates.append(step(optimizer)))
    for target_kl, least, most in (1e9, 2, 2), (1e-12, 1, 1):
        updates.clear()
        play(ppo_tbb, *flags(ppo_tbb, "--target-kl", target_kl), folder=str(most))
        iterations = load(checkpoint_of(tmp_path / str(most)))["counters"][0]
        assert least <= len(updates) / iterations / 4 <= most  # as many episodes as minibatches


def test_explained_variance_is_logged(play, tmp_path, monkeypatch):
    expected, gae = [], monoids.gae

    def note(gamma, lmbda, value, *rest):
        advantage = gae(gamma, lmbda, value, *rest)
        expected.append(1 - (advantage.var(correction=0) / (advantage + value).var(correction=0)).item())
        return advantage

    monkeypatch.setattr(monoids, "gae", note)
    play(ppo_tbb, *flags(ppo_tbb))
    logged = [float(x) for _, x in scalars(tmp_path)["losses/explained_variance"]]
    np.testing.assert_allclose(logged, expected, rtol=1e-4, atol=1e-5)


@each_script
def test_gradient_is_clipped(script, play, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def note(optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", note)
    assert play(script, *flags(script, "--max-grad-norm", 1e-3, "--total-timesteps", 120))[0] == 0
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)


@each_script
def test_compiled_networks_get_batches_of_few_sizes(script, play, monkeypatch):
    """torch.compile is left out: what it would compile once for each size."""
    compiled, sizes = [], set()

    class Compiled:
        def __init__(self, network, **options):
            self.network = network
            compiled.append(options)

        def __call__(self, obs, *inputs):
            sizes.add(obs.shape[0])
            return self.network(obs, *inputs)

        def __getattr__(self, name):
            return getattr(self.network, name)

    monkeypatch.setattr(torch, "compile", Compiled)
    status, out, err = play(script, *flags(script, "--compile"))
    assert (status, err) == (0, "") and final(out)
    assert len(compiled) == (1 if script is ppo_tbb else 2) and not any(options["dynamic"] for options in compiled)
    assert sizes == {51} if script is dqn_sbb else sizes and not any(size % 64 for size in sizes)

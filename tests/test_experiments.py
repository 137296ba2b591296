"""The tools of experiments/: what --log-sensitivity measures, the sweep on this machine and on Ray, and the figures."""

import copy
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from test_dqn import end_to_end, make_args, make_episode, make_networks
from test_scripts import DQN_SMALL, SMALL, run

import dqn_sbb
import dqn_tbb
from monoids import MEMORIES

ROOT = Path(__file__).parent.parent
SWEEP = ROOT / "experiments" / "sweep.py"


@pytest.fixture(scope="module")
def sweep():
    for package in ("tqdm", "matplotlib", "scipy", "sb3_contrib"):
        pytest.importorskip(package, reason="pip install -r experiments/requirements.txt")
    sys.path.insert(0, str(SWEEP.parent))
    import sweep

    return sweep


# ---------------------------------------------------------------------------------------------------------------------
# How far back the Q values look


@pytest.mark.parametrize("memory", MEMORIES)
def test_sensitivity_is_what_moving_an_observation_does_to_the_last_decision(memory, monkeypatch):
    """Central differences in float64, every episode on its own; so nothing may leak between those on the tape."""
    args = make_args(dqn_tbb, memory=memory, eval_episodes=3)
    envs = dqn_tbb.make_envs(args, args.eval_episodes)
    torch.manual_seed(0)
    network = dqn_tbb.QNetwork(envs, args)
    torch.nn.init.orthogonal_(network.head[-1].weight, 1.0)
    rng = np.random.default_rng(0)
    episodes = [make_episode(rng, n, name) for name, n in enumerate((4, 7, 1))]
    monkeypatch.setattr(dqn_tbb, "collect", lambda *args, **kwargs: episodes)
    fast = dqn_tbb.sensitivity(envs, network, args)
    assert all(p.grad is None for p in network.parameters()) and not network.encode_obs._forward_hooks

    slow, precise = [[] for _ in range(7)], copy.deepcopy(network).double()
    for episode in episodes:
        n = len(episode.start) - 2
        rows, _ = end_to_end([episode])

        def last_q(i, feature, by):
            obs = rows.obs.double()
            obs[i, 0, feature] += by
            start, state = rows.start, precise.memory.initial_state(1)
            with torch.no_grad():
                q, _ = precise(obs, rows.action.double().roll(1, 0), start, state)
            return q[n, 0, int(episode.action[n, 0])].item()

        assert last_q(n + 1, 0, 1.0) == last_q(n + 1, 0, 0.0)  # the final observation comes after the decision
        for i in range(n + 1):
            gradient = [(last_q(i, k, 1e-5) - last_q(i, k, -1e-5)) / 2e-5 for k in range(4)]
            slow[n - i].append(np.linalg.norm(gradient))
    np.testing.assert_allclose(fast, [np.mean(x) for x in slow], rtol=2e-3, atol=1e-6)
    if memory != "none":
        assert (fast > 0).all()


@pytest.mark.parametrize("script", [dqn_tbb, dqn_sbb], ids=lambda script: script.__name__)
def test_logging_the_sensitivity_leaves_the_run_as_it_is(script, capsys, monkeypatch, tmp_path):
    weights = []
    for flags in ([], ["--log-sensitivity"]):
        folder = tmp_path / f"run{len(weights)}"
        folder.mkdir()
        flags = [*SMALL, *DQN_SMALL, "--eval-frequency", 100, *flags]
        assert run(script, capsys, monkeypatch, folder, *flags)[0] == 0
        (path,) = folder.glob("runs/*/checkpoint.pt")
        weights.append(torch.load(path, weights_only=True)["learners"]["q_network"])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The variants


@pytest.fixture
def variant(sweep):
    def variant(name):
        module = ModuleType(name)
        module.__file__ = dqn_tbb.__file__
        sys.modules[name] = module  # dataclasses look their module up
        text = sweep.edited(Path(dqn_tbb.__file__).read_text(), name)
        exec(compile(text, name, "exec"), vars(module))
        return module

    before = set(sys.modules)
    yield variant
    for name in set(sys.modules) - before:
        del sys.modules[name]


def fill(module, lengths, **kwargs):
    rng = np.random.default_rng(0)
    tape = module.Tape(make_args(module, buffer_size=1000, **kwargs), dqn_tbb.make_envs(make_args(dqn_tbb), 1), "cpu")
    episodes = [make_episode(rng, n, name, terminated=bool(name % 2)) for name, n in enumerate(lengths)]
    for episode in episodes:
        tape.add(episode)
    return tape, episodes


def loss_of(module, batch, **kwargs):
    args, q_network, target_network = make_networks(**kwargs)
    rows = dqn_tbb.Rows(*(x.double() if x.is_floating_point() else x for x in batch[0]))
    optimizer = torch.optim.SGD(q_network.parameters(), 0.0)
    return (
        args,
        q_network,
        target_network,
        module.update(q_network, copy.deepcopy(target_network), optimizer, (rows, *batch[1:]), args),
    )


def test_an_edit_that_no_longer_fits_is_an_error(sweep):
    text = Path(dqn_tbb.__file__).read_text()
    for name, edits in sweep.EDITS.items():
        for old, new in edits:
            assert old != new
            for broken in (text.replace(old, ""), text.replace(old, old + old)):
                with pytest.raises(ValueError, match=name):
                    sweep.edited(broken, name)
    assert sweep.edited(text, "burn_in") == sweep.edited(text, "") == text


def test_authors_next_value_has_not_seen_the_first_observation(variant):
    module = variant("authors_next_value")
    tape, episodes = fill(module, [3, 1, 6])
    args, q_network, target_network, metrics = loss_of(module, end_to_end(episodes))
    losses = []
    for e in episodes:
        rows, _ = end_to_end([e])
        obs, action, n = rows.obs.double(), rows.action.double(), len(e.start) - 1
        starts = torch.arange(n)[:, None] == 0
        with torch.no_grad():
            state = lambda: q_network.memory.initial_state(1)
            q, _ = q_network(obs, action.roll(1, 0), rows.start, state())
            after = [network(obs[1:], action[:-1], starts, state())[0] for network in (q_network, target_network)]
        for t in range(n):
            value = after[1][t, 0, after[0][t, 0].argmax()] * (not e.terminated[t])
            target = e.reward[t] + args.gamma * value
            losses.append(torch.nn.functional.smooth_l1_loss(q[t, 0, int(e.action[t, 0])], target))
    torch.testing.assert_close(metrics["losses/td_loss"], torch.stack(losses).mean(), rtol=1e-6, atol=1e-9)
    *_, ours = loss_of(dqn_tbb, end_to_end(episodes))
    assert abs(ours["losses/td_loss"] - metrics["losses/td_loss"]) > 1e-6


def test_cut_last_episode_gives_exactly_the_batch(variant):
    module = variant("cut_last_episode")
    tape, _ = fill(module, [30, 17, 5])
    for _ in range(10):
        cut, whole = (Tape.sample(tape, 40, np.random.default_rng(1)) for Tape in (module.Tape, dqn_tbb.Tape))
        assert len(cut[1]) == 40
        torch.testing.assert_close(cut[1], whole[1][:40])


def test_prioritised_draws_and_weighs_by_the_error_of_an_episode(variant):
    module = variant("prioritised")
    tape, episodes = fill(module, [4] * 5)
    assert tape.priority == [1.0] * 5
    rng, seen = np.random.default_rng(0), set()
    while len(seen) < 5:  # each gets an error of its own, the same in all of its transitions but one
        rows, t, weight = tape.sample(1, rng, 0.4)
        (name,) = tape.drawn
        seen.add(name)
        tape.prioritise(torch.tensor([0.5, 1.0, 1.5, 1.0])[:, None] * (1 + name))
    assert tape.priority == pytest.approx([1, 2, 3, 4, 5])
    p = np.arange(1, 6) ** 0.6 / sum(np.arange(1, 6) ** 0.6)
    draws = np.zeros(5)
    for _ in range(300):
        rows, t, weight = tape.sample(80, rng, 1.0)
        names = rows.obs[t, 0, 0].long().numpy()
        expected = 1 / (5 * p[names])
        np.testing.assert_allclose(weight[:, 0], expected / expected.max(), rtol=1e-5)
        draws += np.bincount(names, minlength=5) / len(names) / 300
    np.testing.assert_allclose(draws, p, atol=0.02)
    tape.add(episodes[0])
    assert tape.priority[-1] == pytest.approx(5)


def test_prioritised_loss_is_weighted_and_reports_its_errors(variant):
    module = variant("prioritised")
    _, episodes = fill(module, [3, 1, 6])
    rows, t = end_to_end(episodes)
    ones = torch.ones(len(t), 1)
    *_, plain = loss_of(dqn_tbb, (rows, t))
    *_, same = loss_of(module, (rows, t, ones))
    torch.testing.assert_close(same["losses/td_loss"], plain["losses/td_loss"])
    only = ones * (torch.arange(len(t)) == 4)[:, None]
    *_, one = loss_of(module, (rows, t, only))
    error = same["error"][4, 0]
    huber = torch.where(error < 1, error**2 / 2, error - 0.5)
    torch.testing.assert_close(one["losses/td_loss"], huber / len(t))


# ---------------------------------------------------------------------------------------------------------------------
# The sweep


def start(folder, *flags, **kwargs):
    command = [sys.executable, SWEEP, "--smoke", "--results", folder, *flags]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def rows_of(path):
    """A CSV without what differs from run to run."""
    with open(path) as file:
        return [{name: x for name, x in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def by_run(path):
    return sorted(rows_of(path), key=lambda row: (row["run"], int(row["step"])))


def played_by(pid):
    """The runs that any thread of a sweep has started; not those that are still about to become one."""
    children = [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return [child for child in children if b"dqn_" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def smoke(sweep, tmp_path_factory):
    """The results of every experiment's smoke test."""
    folder = tmp_path_factory.mktemp("smoke") / "results"
    assert start(folder, *sweep.EXPERIMENTS).wait() == 0
    return folder


def test_every_experiment_gives_its_rows(sweep, smoke):
    for name in sweep.EXPERIMENTS:
        rows, runs = rows_of(smoke / f"{name}.csv"), sweep.runs_of(name, [1], smoke=True)
        assert {row["run"] for row in rows} == {run.key for run in runs} and len(runs) > 1
        for each in runs:
            own = [row for row in rows if row["run"] == each.key]
            steps = [int(row["step"]) for row in own]
            assert steps == sorted(set(steps)) and len(steps) > 1 and steps[-1] >= each.total_timesteps
            assert all(-1 <= float(row["eval_return"]) <= 1 for row in own) and own[-1]["episodic_return"]
            if each.script != sweep.PPO:
                assert (
                    own[-1]["td_loss"]
                    and own[-1]["q_values"]
                    and bool(own[-1]["padding"]) == (each.script == sweep.SBB)
                )
            sensitivities = [row["sensitivity"].split(" ") for row in own]
            if name == "sensitivity":
                assert {len(x) > 50 for x in sensitivities} == {True} and min(map(float, sensitivities[-1])) > 0
            else:
                assert {len(x) for x in sensitivities} == {1}
    # a variant is another run
    finals = {row["run"]: row["td_loss"] for row in rows_of(smoke / "ablations.csv")}
    assert len(finals) == len(set(finals.values())) >= len(sweep.EDITS) + len(sweep.FLAGS)


def test_every_experiment_gives_its_figures_and_tables(sweep, smoke):
    plot = subprocess.run(
        [sys.executable, SWEEP.with_name("plot.py"), "--results", smoke], check=True, capture_output=True, text=True
    )
    names = ["sample_efficiency", "sample_efficiency_curves", "padding", "wall_clock", "recall", "ablations"]
    names += {f"sensitivity_{each.task}" for each in sweep.runs_of("sensitivity", [1], smoke=True)}
    names += ["returns"] * (ROOT / "benchmarks" / "returns.csv").exists()
    assert {path.stem for path in (smoke.parent / "figures").iterdir()} == set(names)
    for path in smoke.glob("*_summary.csv"):
        assert len(path.read_text().splitlines()) > 1 and str(path) in plot.stdout


def test_a_killed_sweep_goes_on_where_it_was(smoke, tmp_path):
    path = tmp_path / "sensitivity.csv"
    with start(tmp_path, "sensitivity", "--jobs", "1") as life:
        while not (path.exists() and path.read_text().endswith("\n")):
            assert life.poll() is None
            time.sleep(0.01)
        while not played_by(life.pid):  # the second run
            time.sleep(0.01)
        orphans = played_by(life.pid)
        life.kill()
    for pid in orphans:
        os.kill(int(pid), signal.SIGKILL)
    first = path.read_text()
    assert len({row["run"] for row in rows_of(path)}) == 1
    # as if it had been killed in the middle of writing the second
    second = [row for row in rows_of(smoke / path.name) if row["run"] not in first][0]
    path.write_text(first + ",".join(list(second.values())[:-1]) + "\n" + ",".join(second.values())[:70])
    assert start(tmp_path, "sensitivity", "--jobs", "1").wait() == 0
    assert path.read_text().startswith(first)
    assert by_run(path) == by_run(smoke / path.name)
    whole, changed = path.read_text(), path.stat().st_mtime_ns
    assert start(tmp_path, "sensitivity").wait() == 0
    assert path.read_text() == whole and path.stat().st_mtime_ns == changed


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_ctrl_c_kills_what_runs(number, status, sweep, tmp_path):
    with start(tmp_path, "sensitivity", "--jobs", "2", stderr=subprocess.PIPE) as life:
        while len(played_by(life.pid)) < 2:
            assert life.poll() is None
            time.sleep(0.01)
        children = played_by(life.pid)
        try:
            for pid in children:
                os.kill(int(pid), signal.SIGSTOP)  # they will never end by themselves
            life.send_signal(number)
            _, err = life.communicate(timeout=60)
        finally:
            for pid in children:
                if Path(f"/proc/{pid}").exists():
                    os.kill(int(pid), signal.SIGKILL)
                    life.kill()
    assert life.returncode == status and b"Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_failed_run_is_told_and_stops_nothing(sweep, tmp_path, monkeypatch, capsys):
    tasks = {"RepeatPreviusEasy": 600, "RepeatPreviousEasy": 600}
    table = {"both": [dict(script=[sweep.TBB], task=tasks, memory=["lru"], flags=[*sweep.SMOKE_DQN.split()])]}
    monkeypatch.setattr(sweep, "EXPERIMENTS", table)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "both", "--seeds", "1", "--results", str(tmp_path)])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        sweep.main()
    signal.signal(signal.SIGTERM, handler)
    assert str(stop.value.code).startswith("1 failed:\ndqn_tbb RepeatPreviusEasy lru")  # a string is exit status 1
    assert "Did you mean: `popgym-RepeatPreviousEasy`" in stop.value.code
    assert {row["env_id"] for row in rows_of(tmp_path / "both.csv")} == {"popgym-RepeatPreviousEasy-v0"}


def test_two_ray_nodes_give_the_results_of_this_machine(smoke, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        assert start(tmp_path, "sensitivity", "--ray", cluster.address).wait() == 0
    finally:
        cluster.shutdown()
    assert by_run(tmp_path / "sensitivity.csv") == by_run(smoke / "sensitivity.csv")

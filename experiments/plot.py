"""Draws the figures of the experiments whose results are there, and writes their tables into the pages.

    python experiments/plot.py                       # all of them
    python experiments/plot.py sensitivity recall

Reads experiments/results/NAME.csv (see sweep.py) and benchmarks/returns.csv. Writes experiments/figures/NAME*.png,
prints every table as Markdown and puts it into experiments/README.md (sac, mujoco: sac.md; popgym: popgym.md, and ten
rows into the README of the project) between `<!-- table: NAME -->` and `<!-- end -->`. An interval is the 95%
percentile bootstrap interval of a mean over seeds; in a mean over tasks, seeds are resampled within each task. One seed
has no interval.
"""

import argparse
import csv
import itertools
import re
import sys
import textwrap
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import EngFormatter
from scipy.stats import bootstrap, trim_mean

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# tasks, methods, memories and variants are shown in these orders
POPGYM = {row["task"]: float(row["return"]) for row in read(ROOT / "experiments" / "popgym_random.csv")}
TASKS = {task: (x, 1.0) for task, x in POPGYM.items()}  # mean return of random actions, and a bound on the return
TASKS |= {f"FullPendulum{level}": TASKS[f"PositionOnlyPendulum{level}"] for level in ("Easy", "Medium", "Hard")}
TASKS |= {"TMaze": (0.25, 1.0)}
ROBOTS = {"Hopper": 20, "Walker2d": 2, "HalfCheetah": -286}  # random actions: 300, 300 and 100 episodes
TASKS |= {f"{robot}{what}": (x, np.nan) for robot, x in ROBOTS.items() for what in ("Positions", "Velocities", "Full")}
METHODS = {"dqn_tbb": "TBB", "dqn_sbb": "SBB", "sac_tbb": "SAC, TBB", "ppo_tbb": "PPO, TBB"}
METHODS |= {"recurrent_ppo": "RecurrentPPO", "sb3_sac": "SAC of Stable-Baselines3"}
MEMORIES = {"lru": "LRU", "s5": "S5", "ffm": "FFM", "linear_transformer": "linear transformer", "mingru": "minGRU"}
MEMORIES |= {"lru mingru": "LRU + minGRU", "lru lru mingru": "LRU + LRU + minGRU"}
MEMORIES |= {"gru": "GRU", "none": "none", "": "LSTM"}
VARIANTS = {"": "", "sensitivity": "", "authors_next_value": ", authors' next value"}
VARIANTS |= {"cut_last_episode": ", last episode cut", "prioritised": ", prioritised replay"}
VARIANTS |= {"no_previous_action": ", no previous action", "burn_in": ", burn-in", "separate_memories": ", separate"}
VARIANTS |= {"large_batch": ", batches of 1,000"}

IN_README = ["RepeatPreviousMedium", "RepeatPreviousHard", "RepeatFirstHard", "CountRecallEasy", "HigherLowerEasy"]
IN_README += ["MultiarmedBanditEasy", "PositionOnlyCartPoleHard", "NoisyPositionOnlyCartPoleEasy", "AutoencodeEasy"]
IN_README += ["PositionOnlyPendulumEasy"]
NOT_IN_README = ["ppo_tbb, LRU + minGRU, 1,000,000 steps", "ppo_tbb, LRU + LRU + minGRU, 250,000 steps"]
NOT_IN_README += ["by", "after steps", "difference"]
COMPARED = "ppo_tbb, LRU + LRU + minGRU, 1,000,000 steps"  # with published returns

SERIES = ["step", "seconds", "eval_return", "padding"]  # columns with a number an evaluation
SCORES = {  # of a run
    "final return": lambda run: run["eval_return"][-1],
    "mean return over training": lambda run: run["eval_return"].mean(),
}
LINES = [("black", "-", "o"), ("#cc5500", "--", "s"), ("#0072b2", "-.", "^"), ("#009e73", ":", "D")]
LINES += [("#888888", (0, (6, 1)), "v"), ("#aa4499", (0, (1, 1)), "P")]
LINES += [("#d4a000", "-", "X"), ("#66bbee", "--", "*"), ("#661100", "-.", "p"), ("#cc3377", (0, (3, 1, 1, 1)), "d")]
LINES += [("#7a9900", (0, (8, 2)), "<")]
BARS = [("black", ""), ("#bbbbbb", "//"), ("white", ".."), ("#777777", "xx"), ("white", "\\\\"), ("white", "")]
BARS += [("#777777", ""), ("#bbbbbb", "++"), ("white", "oo")]
SPREAD = "mean and 95% bootstrap interval"


# ---------------------------------------------------------------------------------------------------------------------
# Runs, and means over them


def runs_of(rows):
    """The runs of a CSV: dicts of its columns, and arrays of those in SERIES; sensitivity is a list of arrays."""
    runs = {}
    for row in rows:
        run = runs.setdefault(row["run"], row | {name: [] for name in (*SERIES, "sensitivity")})
        for name in SERIES:
            run[name].append(float(row[name] or "nan"))
        run["sensitivity"].append(np.array(row["sensitivity"].split(), dtype=float))
    for run in runs.values():
        run |= {name: np.array(run[name]) for name in SERIES}
        run["task"] = run["env_id"].removeprefix("popgym-").removesuffix("-v0").split(":")[-1]
        run["method"] = METHODS[run["script"]] + f", L = {run['segment_length']}" * bool(run["segment_length"])
    columns = {"task": TASKS, "memory": MEMORIES, "script": METHODS, "variant": VARIANTS}
    ranks = lambda run: [list(order).index(run[name]) for name, order in columns.items()]
    runs = sorted(runs.values(), key=lambda run: (*ranks(run), int(run["segment_length"] or 0), int(run["seed"])))
    return [run | {"memory": MEMORIES[run["memory"]]} for run in runs]


def grouped(runs, *names):
    """{(value of each column): its runs}, in the order in which they come."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in names), []).append(run)
    return groups


def labelled(runs):
    return [run | {"label": f"{run['method']}, {run['memory']}"} for run in runs]


def unique(runs, name):
    return list(dict.fromkeys(run[name] for run in runs))


def mean_of_means(*strata, axis):
    return sum(stratum.mean(axis) for stratum in strata) / len(strata)


def interquartile_mean(*strata, axis):
    """The mean of the middle half of all values: a few extreme tasks do not dominate it (arXiv 2108.13264)."""
    return trim_mean(np.concatenate(strata, axis), 0.25, axis)


def interval(*strata, statistic=mean_of_means):
    """(statistic, low, high) of (seeds, ...) arrays, a stratum each, by default the mean over strata of the means."""
    center = statistic(*strata, axis=0)
    if min(map(len, strata)) < 2:
        return center, center * np.nan, center * np.nan
    rng = np.random.default_rng(0)
    found = bootstrap(strata, statistic, axis=0, n_resamples=2000, method="percentile", vectorized=True, rng=rng)
    return center, *found.confidence_interval


def over_tasks(score, runs, **kwargs):
    """interval() of the runs' scores, with a stratum for each task."""
    strata = (np.array([score(run) for run in group]) for group in grouped(runs, "task").values())
    return interval(*strata, **kwargs)


def normalised(score):
    """A score on a scale where random actions give 0 and the bound of the task is 1."""

    def of_run(run):
        low, high = TASKS[run["task"]]
        return (SCORES[score](run) - low) / (high - low)

    return of_run


def seeds(runs):
    """Which seeds there are, or how many where it isn't the same for all that is compared."""
    groups = grouped(runs, "script", "task", "memory", "segment_length", "variant", "total_timesteps").values()
    found = {tuple(sorted(unique(group, "seed"), key=int)) for group in groups}
    if len(found) == 1:
        return "seeds " + ", ".join(*found)
    return f"{min(map(len, found))} to {max(map(len, found))} seeds"


# ---------------------------------------------------------------------------------------------------------------------
# Drawing and writing


def draw_band(ax, x, band, label, style):
    color, linestyle, marker = LINES[style % len(LINES)]
    mean, low, high = band
    step = max(1, len(x) // 5)
    kwargs = {"color": color, "linestyle": linestyle, "marker": marker, "markersize": 4}
    ax.plot(x, mean, label=label, markevery=(style % step, step), **kwargs)
    ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def errors(mean, low, high):
    return np.array([mean - low, high - mean]).clip(0)


def draw_bars(ax, groups, series):
    """Bars side by side; series: {label: [(mean, low, high) of each group]}."""
    width = 0.8 / len(series)
    for i, (label, bars) in enumerate(series.items()):
        color, hatch = BARS[i % len(BARS)]
        mean, low, high = np.array(bars, dtype=float).T
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        style = {"color": color, "hatch": hatch, "edgecolor": "black", "capsize": 2, "ecolor": "#cc5500"}
        ax.bar(x, mean, width, yerr=errors(mean, low, high), label=label, **style)
    ax.set_xticks(range(len(groups)), groups)


def panels(rows, columns, width, height, **kwargs):
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **kwargs)


def save(figure, title, folder, name):
    """Above the panels stand the title and a legend of all their labels."""
    width = figure.get_figwidth()
    title = "\n".join(textwrap.fill(line, int(13 * width)) for line in title.split("\n"))
    labels = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels())}
    columns = min(len(labels), max(1, int(width / max(1.6, 0.5 + 0.065 * max(map(len, labels))))))
    style = {"ncols": columns, "fontsize": 8, "title_fontsize": 10, "frameon": False}
    legend = figure.legend(labels.values(), labels, loc="outside upper center", title=title, **style)
    legend.get_title().set_ha("center")
    (folder / "figures").mkdir(exist_ok=True)
    figure.savefig(path := folder / "figures" / f"{name}.png", dpi=130)
    plt.close(figure)
    print(path)


def text(x):
    """A number, or a mean with its interval and, where there is a fourth, a remark."""
    mean, low, high, *remark = x if isinstance(x, tuple) else (x, np.nan, np.nan)
    if isinstance(mean, str | int):
        return str(mean)
    number = lambda x: f"{x:z.{2 if abs(x) < 9.995 else 1}f}"
    return " ".join([number(mean), *[f"[{number(low)}, {number(high)}]"] * bool(low == low), *remark])


def write(rows, runs, folder, name, across="", page="README.md"):
    """Prints rows (dicts) as a Markdown table with the seeds of its runs, and writes it into the page if there is one.

    across: rows of which only this and `value` differ become one row, with a column for each value of this column.
    """
    if not rows:
        return
    wide = {}
    for row in rows:
        rest = {column: x for column, x in row.items() if not across or column not in (across, "value")}
        wide.setdefault(tuple(rest.values()), rest).update({row[across]: row["value"]} if across else {})
    columns = list(dict.fromkeys(column for row in wide.values() for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[text(row.get(column, "")) for column in columns] for row in wide.values()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    brackets = "; in brackets the 95% bootstrap interval" if " [" in table else ""
    found = seeds(runs).capitalize()
    alone = " (none: one seed)" if brackets and found.startswith("1 to") else ""
    table += f"\n\n{found}{brackets}{alone}."
    print(f"\n{name}\n\n{table}\n")
    if (page := folder / page).exists():
        marked = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        page.write_text(re.sub(marked, lambda m: f"{m[1]}{table}\n\n{m[2]}", page.read_text(), flags=re.DOTALL))


# ---------------------------------------------------------------------------------------------------------------------
# The experiments: each draws its figures and writes its tables


def curves(runs, axis, xlabel, label, columns="task", rows=None, xscale="linear"):
    """A line for each value of `label`; a column of panels for each value of `columns`, a row for each of `rows`."""
    downs, acrosses = unique(runs, rows) if rows else [None], unique(runs, columns)
    size = (3.2, 2.4) if rows else (4.5, 3.2)
    figure, axes = panels(len(downs), len(acrosses), *size, sharey="row")
    for ax, (down, across) in zip(axes.flat, itertools.product(downs, acrosses)):
        here = [run for run in runs if run[columns] == across and (not rows or run[rows] == down)]
        ax.set_visible(bool(here))
        for (name,), some in grouped(here, label).items():
            grid = np.linspace(max(run[axis][0] for run in some), min(run[axis][-1] for run in some), 41)
            band = interval(np.stack([np.interp(grid, run[axis], run["eval_return"]) for run in some]))
            draw_band(ax, grid, band, name, unique(runs, label).index(name))
        ax.set_title(f"{down}, {across}" if rows else across, fontsize=9)
        ax.set_xlabel(xlabel)
        ax.set_xscale(xscale)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("evaluation return")
    return figure


def sample_efficiency(runs, folder):
    """Best and worst segment length are those of the mean over tasks, selected with knowledge of the results; beside
    them stand larger batches, which make up for padding.
    """
    runs = [run | {"method": run["method"] + VARIANTS[run["variant"]]} for run in runs]
    figure = curves(runs, "step", "environment steps", "method", columns="memory", rows="task")
    title = f"Return of greedy episodes\n{SPREAD}, {seeds(runs)}"
    save(figure, title, folder, "sample_efficiency_curves")
    table = [
        {"task": task, "memory": memory, "method": m, "value": over_tasks(SCORES["final return"], some)}
        for (task, memory, m), some in grouped(runs, "task", "memory", "method").items()
    ]
    write(table, runs, folder, "sample_efficiency_tasks", across="method")
    tasks, even = {*unique(runs, "task")}, []  # a mean over some of the tasks could not be compared
    for some in grouped(runs, "memory", "method").values():
        even += some * ({*unique(some, "task")} == tasks)
    memories = {memory: some for (memory,), some in grouped(even, "memory").items()}
    lengths = lambda some: {run["method"] for run in some if run["segment_length"] and not run["variant"]}
    memories = {memory: some for memory, some in memories.items() if lengths(some) and "TBB" in unique(some, "method")}
    if not memories:
        return
    figure, axes = panels(1, len(SCORES), 5.5, 3.5, sharey=True)
    table = []
    for ax, name in zip(axes[0], SCORES):
        series = {}
        for memory, some in memories.items():
            found = {m: over_tasks(normalised(name), group) for (m,), group in grouped(some, "method").items()}
            ranked = sorted(lengths(some), key=lambda m: found[m][0])
            chosen = {"TBB": "TBB", "SBB, best segment length L": ranked[-1], "SBB, worst segment length L": ranked[0]}
            for label, m in (chosen | {m: m for m in found if m not in ranked}).items():
                series.setdefault(label, []).append(found[m])
                remark = [f"({m.removeprefix('SBB, ')})"] * (label != m)
                table.append({"score": name, "memory": memory, "batches": label, "value": (*found[m], *remark)})
        draw_bars(ax, memories, {label: bars for label, bars in series.items() if len(bars) == len(memories)})
        ax.set_title(name, fontsize=9)
    axes[0, 0].set_ylabel("normalised return (0: random actions)")
    budgets = [int(run["total_timesteps"]) for run in even]
    title = f"DQN, {min(budgets):,} to {max(budgets):,} steps, {len(tasks)} tasks of POPGym\n{SPREAD}, {seeds(even)}"
    save(figure, title, folder, "sample_efficiency")
    write(table, even, folder, "sample_efficiency", across="batches")


def padded(arrays, value):
    """Arrays of different lengths as rows of one; value(array) fills what they lack."""
    length = max(map(len, arrays))
    return np.stack([np.pad(x, (0, length - len(x)), constant_values=value(x)) for x in arrays])


def sensitivity(runs, folder):
    """Heat maps over training, and the cumulative share at its end; L is the segment length of SBB."""
    lengths, table = {int(run["segment_length"]) for run in runs if run["segment_length"]}, []
    if not lengths:  # no run of SBB yet
        return
    (L,) = lengths
    for (task,), of_task in grouped(runs, "task").items():
        memories, methods = unique(of_task, "memory"), unique(of_task, "method")
        figure, axes = panels(len(memories), len(methods) + 1, 3.4, 2.5)
        for row, ((memory,), of_memory) in zip(axes, grouped(of_task, "memory").items()):
            maps = {}
            for (method,), some in grouped(of_memory, "method").items():
                evaluations = range(min(len(run["step"]) for run in some))
                steps = [np.mean([run["step"][k] for run in some]) for k in evaluations]
                rows = [padded([run["sensitivity"][k] for run in some], lambda x: np.nan) for k in evaluations]
                maps[method] = steps, padded([np.nanmean(x, 0) for x in rows], lambda x: np.nan)
                final = [np.cumsum(run["sensitivity"][-1]) for run in some]
                share = padded([x / x[-1] for x in final], lambda x: 1.0)
                draw_band(row[-1], np.arange(share.shape[1]), interval(share), method, methods.index(method))
                beyond = interval(1 - share[:, min(L, share.shape[1]) - 1])
                table.append({"task": task, "memory": memory, "method": method, "value": beyond})
            positive = np.concatenate([x[x > 0] for _, x in maps.values()])
            norm = LogNorm(np.quantile(positive, 0.01), positive.max())
            for ax, (method, (steps, x)) in zip(row, maps.items()):
                ages = np.arange(x.shape[1])
                mesh = ax.pcolormesh(ages, steps, x, norm=norm, cmap="magma", shading="nearest", rasterized=True)
                figure.colorbar(mesh, ax=ax, label="norm of the gradient")
                ax.set_title(f"{memory}, {method}", fontsize=9)
            row[0].set_ylabel("environment steps")
            row[-1].set_title(f"{memory}, end of training", fontsize=9)
            row[-1].set(ylabel="cumulative share", ylim=(0, 1.02))
            row[-1].grid(alpha=0.3)
            for ax in row:
                ax.set_xlabel("age of the observation")
                ax.axvline(L - 0.5, color="black" if ax is row[-1] else "white", linestyle="--", linewidth=1)
        title = f"{task}: norm of dQ(s_n, a_n) / do_i by age n - i; dashed line: segment length of SBB\n"
        title += f"heat maps: mean over {seeds(of_task)}, a scale for each memory; right: {SPREAD}"
        save(figure, title, folder, f"sensitivity_{task}")
    write(table, runs, folder, "sensitivity", across="method")


def batch_statistics(task, length):
    """How padding changes batch statistics of the network's inputs, measured on segments of 64 random episodes.

    Returns the largest shift of a feature's mean, in its standard deviations without padding, and the mean over
    features of the ratio of standard deviations with and without padding.
    """
    sys.path.insert(0, str(ROOT))
    import dqn_sbb

    args = dqn_sbb.Args(env_id=f"popgym-{task}-v0", segment_length=length)
    envs = dqn_sbb.make_envs(args, 64)
    network, segments = dqn_sbb.QNetwork(envs, args), dqn_sbb.Segments(args, envs, "cpu")
    for episode in dqn_sbb.collect(envs, network, partial(dqn_sbb.policy, epsilon=1.0), 0):
        segments.add(episode)
    obs = segments.rows.obs[: segments.end, :-1].numpy()  # (segments, L, features)
    played = np.arange(length) < np.array(segments.index)[:, 1:]  # (segments, L)
    mean, std = obs[played].mean(0), obs[played].std(0)
    varies = std > 0
    shift, ratio = np.abs(obs.mean((0, 1)) - mean)[varies] / std[varies], obs.std((0, 1))[varies] / std[varies]
    return shift.max(), ratio.mean()


def padding(runs, folder):
    """From the runs of sample_efficiency: which share of SBB's batches was padding, over all of training."""
    runs = [run for run in runs if run["segment_length"] and not run["variant"]]
    labels = ["share of a batch", "largest shift of a mean\n(standard deviations)", "std with padding / without"]
    series, table = [{name: [] for name in unique(runs, "method")} for _ in labels], []
    for (task, method), some in grouped(runs, "task", "method").items():
        share = interval(np.array([np.nanmean(run["padding"]) for run in some]))
        table.append({"task": task, "method": method, "value": share})
        statistics = batch_statistics(task, int(some[0]["segment_length"]))
        for bars, x in zip(series, (share, *((x, np.nan, np.nan) for x in statistics))):
            bars[method].append(x)
    tasks = unique(runs, "task")
    figure, axes = panels(len(labels), 1, max(5, 1.8 * len(tasks)), 2.4)
    for ax, bars, label in zip(axes[:, 0], series, labels):
        draw_bars(ax, tasks, bars)
        ax.set_ylabel(label, fontsize=8)
        ax.tick_params(labelsize=7)
    axes[2, 0].axhline(1, color="black", linewidth=0.8)
    title = f"Padding during training: {SPREAD} over memories and {seeds(runs)}"
    title += "\nbelow: how it changes statistics over a batch of observations, from 64 random episodes"
    save(figure, title, folder, "padding")
    write(table, runs, folder, "padding", across="method")


def wall_clock(runs, folder):
    runs = labelled(runs)
    figure = curves(runs, "seconds", "wall-clock time (s)", "label")
    title = "Return of greedy episodes against wall-clock time, one thread per run; a line ends with its fastest seed"
    title += f"\n{SPREAD}, {seeds(runs)}"
    save(figure, title, folder, "wall_clock")
    table = [
        {"task": task, "method": method, "memory": memory}
        | {"seconds": interval(np.array([run["seconds"][-1] for run in some]))}
        | {"final return": over_tasks(SCORES["final return"], some)}
        for (task, method, memory), some in grouped(runs, "task", "method", "memory").items()
    ]
    write(table, runs, folder, "wall_clock")


def recall(runs, folder):
    runs = labelled(runs)
    figure = curves(runs, "step", "environment steps", "label")
    title = f"Recall over 32 (Medium) and 64 (Hard) time steps\n{SPREAD}, {seeds(runs)}"
    save(figure, title, folder, "recall")
    table = [
        {"task": task, "method": label, "seeds": len(some), "steps": f"{int(some[0]['step'][-1]):,}"}
        | {"final return": over_tasks(SCORES["final return"], some)}
        for (task, label), some in grouped(runs, "task", "label").items()
    ]
    write(table, runs, folder, "recall")


def compare(runs, folder, name, column, title):
    """A panel for each task, with a line for each value of a column; the table adds the mean over tasks."""
    tasks, labels = unique(runs, "task"), unique(runs, column)
    columns = -(-len(tasks) // 2)
    figure, axes = panels(-(-len(tasks) // columns), columns, 3, 0.3 * len(labels) + 1, sharey=True)
    table = []
    for i, (score, of_run) in enumerate(SCORES.items()):
        style = {"color": "black", "marker": "os"[i], "markerfacecolor": ("black", "white")[i], "capsize": 3}
        for y, label in enumerate(labels):
            some = [run for run in runs if run[column] == label]
            for ax, task in zip(axes.flat, tasks):
                if own := [run for run in some if run["task"] == task]:
                    found = over_tasks(of_run, own)
                    at = (found[0], y - 0.12 + 0.24 * i)
                    ax.errorbar(*at, xerr=errors(*found)[:, None], label=score if y == 0 else None, **style)
                    table.append({"score": score, column: label, "task": task, "value": found})
            if {run["task"] for run in some} == {*tasks}:
                value = over_tasks(normalised(score), some)
                table.append({"score": score, column: label, "task": "mean (normalised)", "value": value})
    for ax, task in zip(axes.flat, tasks):
        ax.set_title(task, fontsize=9)
        ax.set_xlabel("evaluation return")
        ax.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()
    save(figure, f"{title}; axes differ\n{SPREAD}, {seeds(runs)}", folder, name)
    write(table, runs, folder, name, across="task")


def ablations(runs, folder):
    runs = [run | {"variant": run["method"] + VARIANTS[run["variant"]]} for run in runs]
    compare(runs, folder, "ablations", "variant", "Ablations, one change at a time (LRU)")


def memories(runs, folder):
    for (script,), own in grouped(runs, "script").items():
        compare(own, folder, f"memories_{script}", "memory", f"Memory models, {script}.py")


def t_maze(runs, folder):
    """Success by memory and length of the corridor, and what it took the LRU."""
    length = lambda run: int(re.search(r"corridor_length (\d+)", run["run"])[1])
    runs = sorted(runs, key=lambda run: (run["script"], length(run)))
    runs = [run | {"corridor": f"N = {length(run):,}"} for run in runs]
    table = [
        {"script": f"`{script}.py`", "memory": memory, "corridor": corridor}
        | {"value": over_tasks(SCORES["final return"], some)}
        for (script, memory, corridor), some in grouped(runs, "script", "memory", "corridor").items()
    ]
    write(table, runs, folder, "t_maze", across="corridor")
    runs, table = [run for run in runs if run["memory"] == "LRU"], []
    for (script, corridor), some in grouped(runs, "script", "corridor").items():
        solved = [min(run["step"][run["eval_return"] >= 0.95], default=np.nan) for run in some]
        steps = " ".join("never" if np.isnan(x) else f"{int(x):,}" for x in solved)
        seconds = " ".join(f"{run['seconds'][-1]:,.0f}" for run in some)
        table.append({"script": f"`{script}.py`", "corridor": corridor, "seeds": len(some)})
        table[-1] |= {"steps": f"{int(some[0]['step'][-1]):,}", "seconds": seconds}
        table[-1] |= {"first evaluation of 0.95 or more, steps": steps}
    write(table, runs, folder, "t_maze_lru")


def defaults(runs, folder, name="defaults", order="script", page="README.md"):
    """A table without a figure: one row for each script, task and memory."""
    table = [
        {"script": f"`{script}.py`", "task": task, "memory": memory, "seeds": len(some)}
        | {"steps": f"{int(some[0]['total_timesteps']):,}", "random actions": TASKS[task][0]}
        | {"seconds": f"{np.mean([run['seconds'][-1] for run in some]):.0f}"}
        | {name: over_tasks(score, some) for name, score in SCORES.items()}
        for (script, task, memory), some in grouped(runs, "script", "task", "memory").items()
    ]
    write(sorted(table, key=lambda row: row[order]) if order else table, runs, folder, name, page=page)


def family_curves(runs, folder, name, levels="Easy|Medium|Hard"):
    """A row of panels for each family of tasks, a column for each level: tasks are named PositionOnlyPendulumEasy."""
    split = lambda run: re.fullmatch(f"(.+)({levels})", run["task"]).groups()
    runs = [run | dict(zip(("family", "level"), split(run))) for run in runs]
    figure = curves(runs, "step", "environment steps", "label", columns="level", rows="family", xscale="log")
    save(figure, f"Return of greedy episodes\n{SPREAD}, {seeds(runs)}", folder, f"{name}_curves")


def continuous(runs, folder, name, *levels):
    """Stable-Baselines3's SAC has no memory; that of ours is a short one on MuJoCo."""
    short = lambda run: ", short" * ("horizon" in run["run"])
    memory = lambda run: "none" if run["script"] == "sb3_sac" else run["memory"] + VARIANTS[run["variant"]] + short(run)
    runs = [run | {"memory": memory(run)} for run in runs]
    family_curves(labelled(runs), folder, name, *levels)
    defaults(runs, folder, name, order=None, page="sac.md")


def sac(runs, folder):
    continuous(runs, folder, "sac")


def mujoco(runs, folder):
    continuous(runs, folder, "mujoco", "Positions|Velocities|Full")


def popgym(runs, folder):
    """All tasks, played or not, beside the best published return; `difference` is that of COMPARED to it.

    The memories that repeat one cell have a table of their own.
    """
    label = lambda run: f"{run['script']}, {run['memory']}, {int(run['total_timesteps']):,} steps"
    order = lambda run: (list(METHODS).index(run["script"]), list(MEMORIES.values()).index(run["memory"]))
    runs = [run | {"label": label(run)} for run in runs]
    labels = unique(sorted(runs, key=order), "label")
    family_curves(runs, folder, "popgym")

    by_return = sorted(read(ROOT / "experiments" / "popgym_published.csv"), key=lambda row: float(row["return"]))
    published = {row["task"]: row for row in by_return}  # the best comes last
    played, table = grouped(runs, "task", "label"), []
    for task, random_actions in POPGYM.items():
        row = {"task": task, "random actions": random_actions} | dict.fromkeys(labels, "")
        for name in labels:
            if some := played.get((task, name)):
                seconds = f"in {np.mean([run['seconds'][-1] for run in some]):.0f} s"
                row[name] = (*over_tasks(SCORES["final return"], some), seconds)
        if best := published.get(task):
            row |= {"best published": best["return"], "by": f"{best['method']} ({best['measure']})"}
            row |= {"after steps": f"{int(best['steps']):,}"}
            if ours := row.get(COMPARED):
                row["difference"] = ours[0] - float(best["return"])
        table.append(row)
    one_cell = [name for name in labels if re.search(", (LRU|minGRU),", name)]
    others = [{column: x for column, x in row.items() if column not in one_cell} for row in table]
    write(others, runs, folder, "popgym", page="popgym.md")
    own = [{column: row[column] for column in ("task", *one_cell)} for row in table]
    write(own, runs, folder, "popgym_one_cell", page="popgym.md")
    columns = [column for column in others[0] if column not in NOT_IN_README]
    short = lambda x: x[:3] if isinstance(x, tuple) else x  # without the seconds
    ten = [{column: short(row.get(column, "")) for column in columns} for row in others if row["task"] in IN_README]
    if shown := [run for run in runs if run["label"] in columns and run["task"] in IN_README]:
        write(ten, shown, folder, "popgym_ten", page="../README.md")
    aggregate(runs, labels, folder)


def aggregate(runs, labels, folder):
    """Interquartile means over the most tasks a script has played with one memory, and over the tasks of control among
    them, for all that have played these.
    """
    even = []  # of seeds with which a method has played all its tasks, so that no task weighs more than others
    for some in grouped(runs, "label").values():
        played = [set(unique(own, "seed")) for own in grouped(some, "task").values()]
        even += [run for run in some if run["seed"] in set.intersection(*played)]
    tasks = dict.fromkeys(labels, set())
    tasks |= {name: set(unique(some, "task")) for (name,), some in grouped(even, "label").items()}
    shared, table = {}, []
    for (script,), some in grouped(even, "script").items():
        common = max((tasks[name] for name in unique(some, "label")), key=len)
        shared[f"{len(common)} tasks of {script}"] = common
    if not shared:
        return
    control = {task for task in POPGYM if "Only" in task}
    if any(control <= common for common in shared.values()):
        shared[f"{len(control)} tasks of control"] = control
    series = {name: [] for name in labels if any(common <= tasks[name] for common in shared.values())}
    for name, (group, common) in itertools.product(series, shared.items()):
        own = [run for run in even if run["label"] == name and run["task"] in common]
        whole = common <= tasks[name]
        value = over_tasks(normalised("final return"), own, statistic=interquartile_mean) if whole else ""
        series[name].append(value or (np.nan, np.nan, np.nan))
        table.append({"method": name, "tasks": group, "value": value})
    figure, axes = panels(1, 1, 3 * len(shared) + 2, 3.5)
    draw_bars(axes[0, 0], shared, series)
    axes[0, 0].set_ylabel("normalised return (0: random actions)")
    shown = [run for run in even if run["label"] in series]
    title = f"Interquartile mean over tasks and seeds, and 95% bootstrap interval\n{seeds(shown)}"
    save(figure, title, folder, "popgym")
    write(table, shown, folder, "popgym_aggregate", across="tasks", page="popgym.md")


def returns(rows, folder):
    """From benchmarks/returns.py: milliseconds for a tape of so many episodes. benchmarks/README.md has the tables."""
    *rows, last_line = rows  # which says where it was measured
    whats, lengths, names = (list(dict.fromkeys(row[name] for row in rows)) for name in ("what", "up to", "contestant"))
    figure, axes = panels(len(whats), len(lengths), 3.2, 2.4, sharey="row")
    for ax, (what, longest) in zip(axes.flat, itertools.product(whats, lengths)):
        for i, name in enumerate(names):
            own = [row for row in rows if (row["what"], row["up to"], row["contestant"]) == (what, longest, name)]
            x, ms = ([float(row[column]) for row in own] for column in ("episodes", "ms"))
            color, linestyle, marker = LINES[i]
            ax.loglog(x, ms, color=color, linestyle=linestyle, marker=marker, markersize=4, label=name)
        ax.set_title(f"{what}, episodes of up to {longest} steps", fontsize=9)
        ax.set_xlabel("episodes")
        ax.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("milliseconds")
    title = f"Discounted returns and advantages of a whole tape\n{last_line['what']}"
    save(figure, title, folder, "returns")


EXPERIMENTS = [sample_efficiency, sensitivity, padding, wall_clock, returns, recall, ablations, memories, defaults]
EXPERIMENTS += [t_maze, sac, mujoco, popgym]


def main():
    names = {experiment.__name__: experiment for experiment in EXPERIMENTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    help = "the folder of the CSVs; figures/ and README.md are those beside it"
    parser.add_argument("--results", type=Path, default=ROOT / "experiments" / "results", help=help)
    args = parser.parse_args()
    if wrong := set(args.names) - set(names):
        parser.error(f"{' '.join(wrong)}: there are {', '.join(names)}")
    for name in args.names or names:
        path = args.results / f"{'sample_efficiency' if name == 'padding' else name}.csv"
        if name == "returns":
            path = ROOT / "benchmarks" / path.name
        if rows := read(path) if path.exists() else []:
            names[name](rows if name == "returns" else runs_of(rows), args.results.parent)
        elif args.names:
            print(f"{path}: no results yet")


if __name__ == "__main__":
    main()

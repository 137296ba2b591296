"""Draws the figures, and writes the tables, of the experiments whose data are there.

    python experiments/plot.py                       # all of them
    python experiments/plot.py sensitivity recall

Reads experiments/results/NAME.csv (see sweep.py) and benchmarks/returns.csv, writes experiments/figures/NAME*.png and
experiments/results/NAME_summary.csv, and prints the summary. An interval is the 95% percentile bootstrap interval of a
mean over seeds; in a mean over tasks, seeds are drawn anew within each task. One seed has none.
"""

import argparse
import csv
import itertools
import sys
import textwrap
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import EngFormatter
from scipy.stats import bootstrap

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
# the mean return of 1,000 episodes of random actions, and the best return there is
RANGE = {
    "RepeatPreviousEasy": (-0.50, 1.0),
    "RepeatPreviousMedium": (-0.50, 1.0),
    "RepeatPreviousHard": (-0.50, 1.0),
    "RepeatFirstEasy": (-0.50, 1.0),
    "CountRecallEasy": (-0.93, 1.0),
    "PositionOnlyCartPoleEasy": (0.11, 1.0),
    "AutoencodeEasy": (-0.50, 1.0),
}
MEMORIES = {"lru": "LRU", "s5": "S5", "ffm": "FFM", "linear_transformer": "linear transformer", "gru": "GRU"}
SERIES = ["step", "seconds", "eval_return", "padding"]  # columns with a number an evaluation

LINES = [("black", "-", "o"), ("#cc5500", "--", "s"), ("#0072b2", "-.", "^"), ("#009e73", ":", "D")]
LINES += [("#888888", (0, (6, 1)), "v"), ("#aa4499", (0, (1, 1)), "P")]
BARS = [("black", ""), ("#bbbbbb", "//"), ("white", ".."), ("#777777", "xx"), ("white", "\\\\")]


# ---------------------------------------------------------------------------------------------------------------------
# Runs, and means over them


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


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
        run["task"] = run["env_id"].removeprefix("popgym-").removesuffix("-v0")
        run["method"] = method(run)
    return list(runs.values())


def method(run):
    if run["script"] == "dqn_sbb":
        return f"SBB, L = {run['segment_length']}"
    return {"dqn_tbb": "TBB", "recurrent_ppo": "RecurrentPPO"}[run["script"]]


def grouped(runs, *names):
    """{(value of each column): its runs}, in the order in which they come."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in names), []).append(run)
    return groups


def unique(runs, name):
    return list(dict.fromkeys(run[name] for run in runs))


def ordered(methods):
    """TBB first, then segments by their length."""
    return sorted(methods, key=lambda name: (not name.startswith("TBB"), len(name.split(":")[0]), name))


def interval(*strata):
    """(mean, low, high) of (seeds, ...) arrays, a stratum each: the mean over strata of the mean over seeds."""
    mean = lambda *x, axis: sum(stratum.mean(axis) for stratum in x) / len(x)
    if min(map(len, strata)) < 2:
        center = mean(*strata, axis=0)
        return center, center * np.nan, center * np.nan
    rng = np.random.default_rng(0)
    found = bootstrap(strata, mean, axis=0, n_resamples=2000, method="percentile", vectorized=True, rng=rng)
    return mean(*strata, axis=0), *found.confidence_interval


def over_tasks(score, runs):
    """interval() of the runs' scores, with a stratum for each task."""
    return interval(*(np.array([score(run) for run in group]) for group in grouped(runs, "task").values()))


def normalised(run, returns):
    low, high = RANGE[run["task"]]
    return (returns - low) / (high - low)


def last(run):
    return run["eval_return"][-1]


def curve(runs, axis, grid):
    """interval() of the evaluations of runs, between which lines are drawn, at the points of a grid."""
    return interval(np.stack([np.interp(grid, run[axis], run["eval_return"]) for run in runs]))


def seeds(runs):
    return "seeds " + ", ".join(sorted(unique(runs, "seed"), key=int))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing and writing


def draw_band(ax, x, band, label, style):
    color, linestyle, marker = LINES[style % len(LINES)]
    mean, low, high = band
    step = max(1, len(x) // 5)
    kwargs = dict(color=color, linestyle=linestyle, marker=marker, markevery=(style % step, step), markersize=4)
    ax.plot(x, mean, label=label, **kwargs)
    ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def draw_bars(ax, groups, series):
    """Bars side by side; series: {label: [(mean, low, high) of each group]}."""
    width = 0.8 / len(series)
    for i, (label, bars) in enumerate(series.items()):
        color, hatch = BARS[i % len(BARS)]
        mean, low, high = np.array(bars, dtype=float).T
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        error = np.array([mean - low, high - mean]).clip(0)
        ax.bar(
            x,
            mean,
            width,
            yerr=error,
            label=label,
            color=color,
            hatch=hatch,
            edgecolor="black",
            capsize=2,
            ecolor="#cc5500",
        )
    ax.set_xticks(range(len(groups)), groups)


def finish(figure, title, path, legend):
    """legend: the Axes whose labels are explained below the figure."""
    figure.suptitle(
        "\n".join(textwrap.fill(line, int(14 * figure.get_figwidth())) for line in title.split("\n")), fontsize=10
    )
    handles, labels = legend.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), int(figure.get_figwidth() / 1.4)),
        fontsize=8,
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"\n{path}")


def panels(rows, columns, width, height, **kwargs):
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained", **kwargs
    )
    return figure, axes


def summarise(path, rows):
    """Writes rows (dicts) as CSV and prints them as Markdown; a tuple is a mean and its interval."""
    number = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
    text = lambda x: "{:.2f} [{:.2f}, {:.2f}]".format(*x) if isinstance(x, tuple) else number(x)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [
            n
            for name, x in rows[0].items()
            for n in ((name, f"{name}_low", f"{name}_high") if isinstance(x, tuple) else (name,))
        ]
        writer.writerow(names)
        for row in rows:
            values = [v for x in row.values() for v in (x if isinstance(x, tuple) else (x,))]
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in values])
    print(f"\n{path}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(text, row.values()))} |")


SPREAD = "mean and 95% bootstrap interval"


# ---------------------------------------------------------------------------------------------------------------------
# The experiments


def curves(runs, axis, xlabel, title, path, label, rows=False):
    """A panel for each task, or with rows a row of them, one for each memory; in each a line for each label(run)."""
    tasks, memories = unique(runs, "task"), unique(runs, "memory") if rows else [None]
    labels = ordered({label(run) for run in runs})
    shape = (len(tasks), len(memories), 3.2, 2.4) if rows else (1, len(tasks), 4.5, 3.2)
    figure, axes = panels(*shape, sharey="row")
    for ax, (task, memory) in zip(axes.flat, itertools.product(tasks, memories)):
        here = [run for run in runs if run["task"] == task and memory in (None, run["memory"])]
        for name in ordered({label(run) for run in here}):
            some = [run for run in here if label(run) == name]
            begin, end = max(run[axis][0] for run in some), min(run[axis][-1] for run in some)
            grid = np.linspace(begin, end, 41)
            draw_band(ax, grid, curve(some, axis, grid), name, labels.index(name))
        ax.set_title(f"{task}, {MEMORIES.get(memory, memory)}" if rows else task, fontsize=9)
        ax.set_xlabel(xlabel)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("eval return")
    finish(figure, f"{title}\n{SPREAD}, {seeds(runs)}", path, axes[0, 0])


def sample_efficiency(runs, results, figures):
    """Of the segment lengths, best and worst are those of the mean over tasks: chosen in SBB's favour."""
    curves(
        runs,
        "step",
        "environment steps",
        "Return of greedy episodes",
        figures / "sample_efficiency_curves.png",
        lambda run: run["method"],
        rows=True,
    )
    scores = {
        "at the end": lambda run: normalised(run, last(run)),
        "mean over training": lambda run: normalised(run, run["eval_return"].mean()),
    }
    by_memory = grouped(runs, "memory")
    table = []
    figure, axes = panels(1, len(scores), 5.5, 3.5, sharey=True)
    for ax, (name, score) in zip(axes[0], scores.items()):
        series = {"TBB": [], "SBB, best L": [], "SBB, worst L": []}
        for (memory,), some in by_memory.items():
            found = {m: over_tasks(score, group) for (m,), group in grouped(some, "method").items()}
            lengths = sorted((m for m in found if m != "TBB"), key=lambda m: found[m][0])
            for label, m in zip(series, ("TBB", lengths[-1], lengths[0])):
                series[label].append(found[m])
                table.append({"score": name, "memory": memory, "method": m, "which": label, "normalised": found[m]})
        draw_bars(ax, [MEMORIES.get(memory, memory) for (memory,) in by_memory], series)
        ax.set_title(name, fontsize=9)
    axes[0, 0].set_ylabel("normalised return (0: chance, 1: best)")
    tasks = ", ".join(unique(runs, "task"))
    finish(figure, f"Mean over {tasks}\n{SPREAD}, {seeds(runs)}", figures / "sample_efficiency.png", axes[0, 0])
    summarise(results / "sample_efficiency_summary.csv", table)
    per_task = [
        {
            "task": task,
            "memory": memory,
            "method": m,
            "seeds": len(some),
            "return at the end": over_tasks(last, some),
            "mean over training": over_tasks(lambda run: run["eval_return"].mean(), some),
        }
        for (task, memory, m), some in grouped(runs, "task", "memory", "method").items()
    ]
    summarise(results / "sample_efficiency_tasks_summary.csv", per_task)


def shares(run):
    """The share of the gradient that observations of at most each age have, at the end of training."""
    by_age = np.cumsum(run["sensitivity"][-1])
    return by_age / by_age[-1]


def padded(arrays, value):
    """Arrays of different lengths as rows of one; value(array) fills what they lack."""
    length = max(map(len, arrays))
    return np.stack([np.pad(x, (0, length - len(x)), constant_values=value(x)) for x in arrays])


def sensitivity(runs, results, figures):
    """Heat maps over training, and the cumulative share at its end; an edge is the length of a segment."""
    edges = sorted({int(run["segment_length"]) for run in runs if run["segment_length"]})
    methods, table = ordered(unique(runs, "method")), []
    for (task,), of_task in grouped(runs, "task").items():
        memories = unique(of_task, "memory")
        figure, axes = panels(len(memories), len(methods) + 1, 3.4, 2.5)
        for row, memory in zip(axes, memories):
            maps = {}
            for i, name in enumerate(methods):
                some = [run for run in of_task if (run["memory"], run["method"]) == (memory, name)]
                evaluations = range(min(len(run["step"]) for run in some))
                steps = [np.mean([run["step"][k] for run in some]) for k in evaluations]
                rows = [padded([run["sensitivity"][k] for run in some], lambda x: np.nan) for k in evaluations]
                maps[name] = steps, padded([np.nanmean(x, 0) for x in rows], lambda x: np.nan)
                share = padded([shares(run) for run in some], lambda x: 1.0)
                draw_band(row[-1], np.arange(share.shape[1]), interval(share), name, i)
                for edge in edges:
                    beyond = 1 - share[:, min(edge, share.shape[1]) - 1]
                    table.append(
                        {
                            "task": task,
                            "memory": memory,
                            "method": name,
                            "seeds": len(some),
                            "L": edge,
                            "share beyond L": interval(beyond),
                        }
                    )
            positive = np.concatenate([x[x > 0] for _, x in maps.values()])
            norm = LogNorm(np.quantile(positive, 0.01), positive.max())
            for ax, (name, (steps, x)) in zip(row, maps.items()):
                ages = np.arange(x.shape[1])
                mesh = ax.pcolormesh(ages, steps, x, norm=norm, cmap="magma", shading="nearest", rasterized=True)
                figure.colorbar(mesh, ax=ax)
                ax.set_title(f"{MEMORIES.get(memory, memory)}, {name}", fontsize=9)
            row[0].set_ylabel("environment steps")
            row[-1].set_title(f"{MEMORIES.get(memory, memory)}, at the end", fontsize=9)
            row[-1].set_ylabel("cumulative share")
            row[-1].set_ylim(0, 1.02)
            row[-1].grid(alpha=0.3)
            for ax in row:
                ax.set_xlabel("age n - i (steps)")
                for edge in edges:
                    ax.axvline(edge - 0.5, color="white" if ax is not row[-1] else "black", linestyle="--", linewidth=1)
        title = f"{task}: |dQ(s_n, a_n) / do_i| by age; dashed: the segment's edge\nmean over {seeds(of_task)}; share: "
        finish(figure, title + SPREAD, figures / f"sensitivity_{task}.png", axes[0, -1])
    summarise(results / "sensitivity_summary.csv", table)


def random_statistics(task, length):
    """What statistics over a padded batch are, from segments of 64 random episodes, as (a, b): the largest shift of a
    feature's mean in its true standard deviations, and the mean over features of the ratio of standard deviations.

    Features are what the encoder is given: padding is zeros in the columns, and so the first category in a one-hot.
    """
    sys.path.insert(0, str(ROOT))
    import dqn_sbb

    args = dqn_sbb.Args(env_id=f"popgym-{task}-v0", segment_length=length)
    envs = dqn_sbb.make_envs(args, 64)
    network, segments = dqn_sbb.QNetwork(envs, args), dqn_sbb.Segments(args, envs, "cpu")
    for episode in dqn_sbb.collect(envs, network, partial(dqn_sbb.policy, epsilon=1.0), (0,), 0, 1):
        segments.add(episode)
    features = network.encode_obs(segments.rows.obs[:-1, : segments.end])  # (L, B, features)
    played, everything = features[segments.played[:, : segments.end]], features.flatten(0, 1)
    std = played.std(0)
    varies = std > 0
    shift = ((everything.mean(0) - played.mean(0)).abs() / std)[varies].max()
    return float(shift), float((everything.std(0) / std)[varies].mean())


def padding(runs, results, figures):
    """From the runs of sample_efficiency: what share of SBB's batches was padding, in all of training."""
    runs = [run for run in runs if run["segment_length"]]
    tasks, methods, table = unique(runs, "task"), ordered(unique(runs, "method")), []
    share, shift, ratio = ({name: [] for name in methods} for _ in range(3))
    for (task, name), some in grouped(runs, "task", "method").items():
        found = interval(np.array([np.nanmean(run["padding"]) for run in some]))
        share[name].append(found)
        statistics = random_statistics(task, int(some[0]["segment_length"]))
        for series, x in zip((shift, ratio), statistics):
            series[name].append((x, np.nan, np.nan))
        table.append(
            {
                "task": task,
                "method": name,
                "runs": len(some),
                "padding": found,
                "real transitions of 500": tuple(500 * (1 - found[i]) for i in (0, 2, 1)),
                "shift of a mean": statistics[0],
                "ratio of deviations": statistics[1],
            }
        )
    figure, axes = panels(3, 1, max(5, 1.8 * len(tasks)), 2.4)
    labels = [
        "padding, share of a batch",
        "largest shift of a mean\n(standard deviations)",
        "std with padding / without",
    ]
    for ax, series, label in zip(axes[:, 0], (share, shift, ratio), labels):
        draw_bars(ax, tasks, series)
        ax.set_ylabel(label, fontsize=8)
        ax.tick_params(labelsize=7)
    right = axes[0, 0].secondary_yaxis("right", functions=(lambda p: 500 * (1 - p), lambda n: 1 - n / 500))
    right.set_ylabel("real transitions of 500", fontsize=8)
    axes[2, 0].axhline(1, color="black", linewidth=0.8)
    title = f"Padding in training: {SPREAD} over memories and {seeds(runs)}"
    title += "\nbelow, from 64 random episodes: what batch statistics would see"
    finish(figure, title, figures / "padding.png", axes[0, 0])
    summarise(results / "padding_summary.csv", table)


def wall_clock(runs, results, figures):
    label = lambda run: f"{run['method']}, {MEMORIES.get(run['memory'], run['memory'])}"
    title, path = "Return against time, one thread each", figures / "wall_clock.png"
    curves(runs, "seconds", "seconds", title, path, label)
    table = []
    for (task, name, memory), some in grouped(runs, "task", "method", "memory").items():
        seconds = interval(np.array([run["seconds"][-1] for run in some]))
        table.append(
            {
                "task": task,
                "method": name,
                "memory": memory,
                "seeds": len(some),
                "steps": int(some[0]["step"][-1]),
                "seconds": seconds,
                "return": over_tasks(last, some),
            }
        )
    summarise(results / "wall_clock_summary.csv", table)


def recall(runs, results, figures):
    label = lambda run: run["method"] if run["method"] == "RecurrentPPO" else f"TBB, {MEMORIES[run['memory']]}"
    title, path = "Recall 32 (Medium) and 64 (Hard) steps back", figures / "recall.png"
    curves(runs, "step", "environment steps", title, path, label)
    table = [
        {
            "task": task,
            "method": name,
            "seeds": len(some),
            "steps": int(some[0]["step"][-1]),
            "return at the end": over_tasks(last, some),
        }
        for (task, name), some in grouped(runs, "task", "method").items()
    ]
    summarise(results / "recall_summary.csv", table)


def ablations(runs, results, figures):
    label = lambda run: f"{run['method']}{': ' * bool(run['variant'])}{run['variant'].replace('_', ' ')}"
    runs = [run | {"label": label(run)} for run in runs]
    tasks, labels = unique(runs, "task"), ordered(unique(runs, "label"))[::-1]
    scores = {"at the end": last, "mean over training": lambda run: run["eval_return"].mean()}
    figure, axes = panels(1, len(tasks), 2.6, 0.35 * len(labels) + 1.6, sharey=True)
    table = []
    for ax, task in zip(axes[0], tasks):
        for i, ((name, score), marker, face) in enumerate(zip(scores.items(), "os", ("black", "white"))):
            for y, wanted in enumerate(labels):
                some = [run for run in runs if (run["task"], run["label"]) == (task, wanted)]
                if some:
                    mean, low, high = over_tasks(score, some)
                    error = np.array([[mean - low], [high - mean]]).clip(0)
                    ax.errorbar(
                        mean,
                        y + 0.12 - 0.24 * i,
                        xerr=error,
                        color="black",
                        marker=marker,
                        capsize=3,
                        markerfacecolor=face,
                        label=name if y == 0 else None,
                    )
                    table.append(
                        {
                            "task": task,
                            "variant": wanted,
                            "score": name,
                            "seeds": len(some),
                            "return": (mean, low, high),
                        }
                    )
        ax.set_title(task, fontsize=9)
        ax.set_xlabel("eval return")
        ax.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    title = f"Our choices, one changed at a time (LRU)\n{SPREAD}, {seeds(runs)}"
    finish(figure, title, figures / "ablations.png", axes[0, 0])
    summarise(results / "ablations_summary.csv", table)


def returns(rows, results, figures):
    """From benchmarks/returns.py: milliseconds for a tape of so many episodes."""
    *rows, last_line = rows  # which says where it was measured
    about = last_line["what"]
    values = lambda name: list(dict.fromkeys(row[name] for row in rows))
    contestants, table = values("contestant"), []
    figure, axes = panels(len(values("what")), len(values("up to")), 3.2, 2.4, sharey="row")
    for ax, (what, longest) in zip(axes.flat, itertools.product(values("what"), values("up to"))):
        here = [row for row in rows if (row["what"], row["up to"]) == (what, longest)]
        for i, name in enumerate(contestants):
            own = [row for row in here if row["contestant"] == name]
            x, ms = ([float(row[column]) for row in own] for column in ("episodes", "ms"))
            color, linestyle, marker = LINES[i]
            ax.loglog(x, ms, color=color, linestyle=linestyle, marker=marker, markersize=4, label=name)
        ax.set_title(f"{what}, episodes of up to {longest} steps", fontsize=9)
        ax.set_xlabel("episodes")
        ax.grid(alpha=0.3)
        for episodes in dict.fromkeys(row["episodes"] for row in here):
            ms = {row["contestant"]: row["ms"] for row in here if row["episodes"] == episodes}
            table.append({"what": what, "up to": longest, "episodes": episodes})
            table[-1] |= {f"{name}, ms": ms.get(name, "") for name in contestants}
    for row in axes:
        row[0].set_ylabel("milliseconds")
    title = "Discounted returns and advantages of a whole tape\n" + about
    finish(figure, title, figures / "returns.png", axes[0, 0])
    summarise(results / "returns_summary.csv", table)


def main():
    names = ["sample_efficiency", "sensitivity", "padding", "wall_clock", "returns", "recall", "ablations"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--results", type=Path, default=ROOT / "experiments" / "results")
    args = parser.parse_args()
    if wrong := set(args.names) - set(names):
        parser.error(f"{' '.join(wrong)}: there are {', '.join(names)}")
    for name in args.names or names:
        path = args.results / f"{'sample_efficiency' if name == 'padding' else name}.csv"
        if name == "returns":
            path = ROOT / "benchmarks" / path.name
        if args.names or path.exists():
            rows = read(path)
            globals()[name](rows if name == "returns" else runs_of(rows), args.results, args.results.parent / "figures")


if __name__ == "__main__":
    main()

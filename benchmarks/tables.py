"""Writes the tables of benchmarks/README.md, and the line under each, from the CSV files that the benchmarks write.

    python benchmarks/tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. The line under it is the last one of its CSV: date,
version of PyTorch, machine and threads.
"""

import csv
import re
from pathlib import Path

from measure import show

HERE = Path(__file__).parent
MS = {"ms": "ms", "matrix products alone, ms": "bare ms", "ratio": "x bare"}
KIB = {"peak KiB per row": "peak KiB a row"}
UPDATE = {"script": "update", "--memory": "memory", "rows": "rows", **MS, "times `lru`": "x lru", **KIB}
TAPES = {"--memory": "memory", "transitions": "transitions", **MS, "times `lru`": "x lru", "µs per row": "us a row"}
TAPES |= KIB
GPU = {"script": "update", "--memory": "memory", "transitions": "transitions", "ms": "ms", "times `lru`": "x lru"}
AUTHORS = {"update": "update", "transitions": "transitions", "threads": "threads", **MS, "times ours": "x lru", **KIB}
SIZE = {"episodes": "episodes", "longest": "up to", "rows": "rows"}
RUNS = {"script": "what", "--memory": "memory", "steps": "steps", "s": "seconds", "steps/s": "steps a second"}
RUNS |= {"solved after, steps": "solved at", "solved after, s": "seconds to solve", "final return": "eval return"}
COLLECT = {"what": "what", "steps/s": "steps a second", "ratio": "x SyncVectorEnv"}
PPO = {"": "algorithm", "steps": "steps", "seconds": "seconds", "reached": "reached"}
PPO |= {"times our steps": "x steps", "times our seconds": "x seconds"}
TABLES = {  # name: (CSV, {heading: column}, which rows, the column to show for each contestant or None)
    "scan": ("scan", {"T x channels": "T x C"}, lambda row: True, "f+b ms"),
    "update": ("update", UPDATE, lambda row: row["d_model"] == "128" and int(row["transitions"]) < 1000, None),
    "tapes": ("update", TAPES, lambda row: row["d_model"] == "128" and int(row["transitions"]) >= 1000, None),
    "authors": ("update", AUTHORS, lambda row: row["d_model"] == "256", None),
    "returns": ("returns", SIZE, lambda row: row["what"] == "returns", "ms"),
    "gae": ("returns", SIZE, lambda row: row["what"] == "GAE", "ms"),
    "runs": ("train", RUNS, lambda row: row["x SyncVectorEnv"] == "nan", None),
    "collect": ("train", COLLECT, lambda row: row["x SyncVectorEnv"] != "nan", None),
    "ppo": ("ppo", PPO, lambda row: True, None),
    "scan_gpu": ("scan_gpu", {"T x channels": "T x C"}, lambda row: True, "f+b ms"),
    "update_gpu": ("update_gpu", GPU, lambda row: row["update"].startswith("dqn_tbb"), None),
}


def cell(text):
    if re.fullmatch(r"\d+", text):
        return show(int(text))
    return show(float(text)) if re.fullmatch(r"nan|[\d.]+(e[+-]\d+)?", text) else text


if __name__ == "__main__":
    page = (HERE / "README.md").read_text()
    for name, (file, columns, where, value) in TABLES.items():
        header, *lines = csv.reader((HERE / f"{file}.csv").read_text().splitlines())
        table = {}  # {a tuple of cells: those of contestants}
        for row in filter(where, (dict(zip(header, line)) for line in lines if len(line) == len(header))):
            found = table.setdefault(tuple(cell(row[column]) for column in columns.values()), {})
            found |= {row["contestant"]: cell(row[value])} if value else {}
        contestants = list(dict.fromkeys(name for found in table.values() for name in found))
        body = [[*key, *(found.get(name, "") for name in contestants)] for key, found in table.items()]
        markdown = [[*columns, *contestants], ["---"] * (len(columns) + len(contestants)), *body]
        text = "\n".join(f"| {' | '.join(line)} |" for line in markdown) + f"\n\n{lines[-1][0]}."
        page, n = re.subn(rf"(<!-- table: {name} -->\n).*?(?=<!-- end -->)", rf"\g<1>{text}\n\n", page, flags=re.S)
        assert n == 1, f"README.md has {n} places for the table {name}"
    (HERE / "README.md").write_text(page)

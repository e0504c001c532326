"""How fast a task is matched and a request routed, and how that grows with the codebook.

    OMP_NUM_THREADS=1 python bench/grouping.py                  1,000, 10,000 and 100,000 saved instructions
    OMP_NUM_THREADS=1 python bench/grouping.py --similarity tfidf_codebook --json out.json

The instructions are made up: a verb, two nouns of the group's own, and a closing ("using a single word") that
most share, so that a request touches most of the saved instructions: the hard case for an inverted index, and
what real instructions look like.

scikit-learn refitted on each pair (the released code) is timed on 2,000 pairs and extrapolated; the output
says so. The figures of one run are in results/grouping.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from sklearn.feature_extraction.text import TfidfVectorizer

from lcia.grouping import SIMILARITIES, Codebook, Router

PER_GROUP = 100
PAIRS_TIMED = 2_000
VERBS = [
    "answer",
    "describe",
    "name",
    "find",
    "identify",
    "classify",
    "extract",
    "provide",
    "summarize",
    "select",
]
CLOSINGS = [
    f"{verb} {how} {form}"
    for verb in ("using", "with", "in")
    for how in ("a single", "one", "a short", "a brief", "a concise")
    for form in ("word or phrase", "phrase", "word", "sentence", "word or a short, descriptive phrase")
]


def made_up(groups: int, per_group: int, seed: int) -> dict[str, list[str]]:
    """{group: distinct instructions}; the nouns of a group are the same for every seed."""
    rng = np.random.default_rng(seed)
    stream = {}
    for group in range(groups):
        nouns = np.random.default_rng(group).choice(20_000, 12, replace=False)
        texts: dict[str, None] = {}
        while len(texts) < per_group:
            subject, place = rng.choice(nouns, 2, replace=False)
            texts[f"{rng.choice(VERBS)} the noun{subject} of the noun{place} {rng.choice(CLOSINGS)}"] = None
        stream[f"group{group}"] = list(texts)
    return stream


def resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def timed_ms(act: Callable[[Any], object], arguments: Iterable[Any]) -> dict[str, float]:
    times = []
    for argument in arguments:
        start = time.perf_counter()
        act(argument)
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return {"median": statistics.median(times), "p95": times[int(0.95 * len(times))], "min": times[0]}


def measure(instructions: int, similarity: str) -> dict[str, Any]:
    saved = made_up(instructions // PER_GROUP, PER_GROUP, seed=0)
    tasks = list(made_up(instructions // PER_GROUP, 10, seed=1).values())[:50]
    asked = made_up(instructions // PER_GROUP, max(1, 200 * PER_GROUP // instructions), seed=2)
    requests = [text for texts in asked.values() for text in texts][:200]  # all different: nothing is remembered
    before_mib, start = resident_mib(), time.perf_counter()
    book = Codebook(similarity=similarity)
    for group, texts in saved.items():
        book.add(group, texts)
    build_s, memory_mib = time.perf_counter() - start, resident_mib() - before_mib
    router = Router(book)
    router.route("a request that is not among those timed")
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "codebook.json", time.perf_counter()
        book.save(path)
        save_s, start = time.perf_counter() - start, time.perf_counter()
        Codebook.load(path)
        load_s = time.perf_counter() - start
    route, match = timed_ms(router.route, requests), timed_ms(book.match, tasks)
    touched = np.mean([np.count_nonzero(next(iter(book.index.rows([text])))) for text in requests[:20]])
    added = timed_ms(lambda item: book.add(f"new{item[0]}", item[1]), list(enumerate(tasks)))
    return {
        "instructions": instructions,
        "groups": len(saved),
        "touched_fraction": float(touched) / instructions,
        "build_s": build_s,
        "memory_mib": memory_mib,
        "save_s": save_s,
        "load_s": load_s,
        "route_one_ms": route,
        "match_ten_ms": match,
        "add_ten_ms": added,
    }


def refitted_per_pair(instructions: int) -> dict[str, float]:
    """scikit-learn on PAIRS_TIMED pairs, the closed form on the same ones, and what all pairs would take."""
    saved = [text for texts in made_up(PAIRS_TIMED // PER_GROUP, PER_GROUP, seed=0).values() for text in texts]
    new = made_up(1, 1, seed=1)["group0"][0]
    start = time.perf_counter()
    scores = []
    for text in saved:
        vectors = TfidfVectorizer(stop_words="english").fit_transform([new, text])
        scores.append((vectors[0] @ vectors[1].T).sum())
    pair_ms = (time.perf_counter() - start) * 1e3 / len(saved)
    index = SIMILARITIES["tfidf_pair"]()
    index.add(saved)
    return {
        "pairs_timed": len(saved),
        "pair_ms": pair_ms,
        "largest_difference": float(np.abs(next(iter(index.rows([new]))) - scores).max()),
        "route_one_s_extrapolated": pair_ms * instructions / 1e3,
        "match_ten_s_extrapolated": pair_ms * instructions / 1e2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--similarity", choices=list(SIMILARITIES), default="tfidf_pair")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    machine = f"{platform.machine()}, Python {platform.python_version()}, scikit-learn {sklearn.__version__}"
    print(f"similarity {options.similarity}, reduce mean; {machine}")
    print(f"{'saved':>8} {'groups':>6} {'touched':>7} {'build':>7} {'memory':>8} {'load':>7}", end=" ")
    print(f"{'route one: median / p95':>24} {'match ten: median / p95':>24} {'add ten':>9}")
    rows = []
    for instructions in options.instructions:
        row = measure(instructions, options.similarity)
        rows.append(row)
        route, match, added = row["route_one_ms"], row["match_ten_ms"], row["add_ten_ms"]
        print(
            f"{row['instructions']:>8,} {row['groups']:>6,} {row['touched_fraction']:>7.0%}"
            f" {row['build_s']:>5.2f} s {row['memory_mib']:>4.0f} MiB {row['load_s']:>5.2f} s"
            f" {route['median']:>12.3f} / {route['p95']:>6.3f} ms"
            f" {match['median']:>12.2f} / {match['p95']:>6.2f} ms {added['median']:>6.2f} ms"
        )
        sys.stdout.flush()
    loop = refitted_per_pair(max(options.instructions))
    most = f"{max(options.instructions):,}"
    print(
        f"scikit-learn refitted on each pair: {loop['pair_ms']:.3f} ms over {loop['pairs_timed']:,} timed"
        f" pairs (largest difference to tfidf_pair {loop['largest_difference']:.1e}).\n"
        f"EXTRAPOLATED to {most} saved instructions: one request {loop['route_one_s_extrapolated']:,.0f} s,"
        f" a task of ten {loop['match_ten_s_extrapolated']:,.0f} s."
    )
    if options.json:
        result = {"similarity": options.similarity, "machine": machine, "rows": rows, "scikit_learn": loop}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

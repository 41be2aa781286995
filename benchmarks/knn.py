"""Seconds and memory of kNN over a bank of random vectors: ours, and the published full matrix.

Ours is `relloc.features.voting.vote`, exact to float64. The published way (protocols.md 3.7)
multiplies a hundredth of the queries by the whole bank in float32 and takes the top k of all
products; it is timed on a few of those hundredths. A sample of queries is compared with plain
float64, where rows that differ by less than 1e-12 in cosine count as equal.
"""

import argparse
import gc
import resource
from collections.abc import Callable

import torch
from report import arguments, once_s, tell
from torch import Tensor
from torch.nn.functional import normalize

from relloc.features.nearest import NearestNeighbors, nearest
from relloc.features.voting import vote

PUBLISHED_CHUNKS = 100
TEMPERATURE = 0.07
# ImageNet with ResNet-50 on a GPU, a small part of it on a CPU
DEFAULTS = {
    "cuda": {"queries": 50_000, "bank": 1_281_167},
    "cpu": {"queries": 1_000, "bank": 60_000},
}


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    queries, bank, labels = _drawn(options, device)
    settings = {"k": options.k, "temperature": TEMPERATURE, "n_classes": options.classes}
    sizes = {"chunk": options.chunk, "tile": options.tile}
    vote(
        queries[: len(queries) // 50 + 1], bank, labels, **settings, **sizes
    )  # what is made once, is made now
    rows, answers = [], {}

    def ours() -> None:
        answers.update(vote(queries, bank, labels, **settings, **sizes))

    rows.append(_timed("ours, exact", len(queries), ours, device))
    size = -(-len(queries) // PUBLISHED_CHUNKS)
    part = queries[: size * options.published_chunks]
    if len(part):
        rows.append(
            _timed(
                "published",
                len(part),
                lambda: _published(part, bank, labels, size, options),
                device,
            )
        )
    sample = torch.linspace(
        0, len(queries) - 1, min(options.sample, len(queries)), device=device
    ).long()
    found = nearest(queries[sample], bank, max(options.k), **sizes)
    rows[0] |= _checked(
        found, queries[sample], bank, labels, {k: a[sample] for k, a in answers.items()}, options
    )
    ratios = (
        {"ours over published, queries/s": rows[0]["queries/s"] / rows[1]["queries/s"]}
        if len(part)
        else {}
    )
    kind = "random vectors after ReLU" if options.relu else "random vectors"
    title = (
        f"kNN, {len(queries):,} queries, bank {len(bank):,} x {bank.shape[1]:,} "
        f"on {bank.device.type}, {kind}"
    )
    tell(title, rows, ratios, options.json, settings=vars(options))


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--queries", type=int, help="default: 50,000 on a GPU, 1,000 on a CPU")
    parser.add_argument(
        "--bank", type=int, help="rows; default: 1,281,167 on a GPU, 60,000 on a CPU"
    )
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200])
    parser.add_argument(
        "--chunk", type=int, help="rows of the bank at once; default: what `nearest` takes"
    )
    parser.add_argument("--tile", type=int, help="queries at once; default: what `nearest` takes")
    parser.add_argument(
        "--bank-on-cpu", action="store_true", help="the bank stays in the CPU's memory"
    )
    parser.add_argument(
        "--relu", action="store_true", help="cosines close together, as features after a ReLU have"
    )
    parser.add_argument(
        "--published-chunks", type=int, default=5, help="how many hundredths the published way does"
    )
    parser.add_argument("--sample", type=int, default=200, help="queries compared with float64")
    options = parser.parse_args()
    for name, value in DEFAULTS[torch.device(options.device).type].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _drawn(options: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    kept_on = torch.device("cpu") if options.bank_on_cpu else device
    bank = random_rows(options.bank, options.dim, generator, kept_on, relu=options.relu)
    queries = random_rows(options.queries, options.dim, generator, device, relu=options.relu)
    labels = torch.randint(options.classes, (options.bank,), device=device, generator=generator)
    return queries, bank, labels.cpu()


def random_rows(
    n: int, dim: int, generator: torch.Generator, kept_on: torch.device, *, relu: bool
) -> Tensor:
    """Normal vectors (n dim), drawn on the generator's device; with `relu` none is below zero."""
    rows = torch.empty(n, dim, device=kept_on)
    # In parts, so that a bank in the CPU's memory needs no second copy on the device.
    for part in rows.split(2**16):
        part.copy_(torch.randn(part.shape, device=generator.device, generator=generator))
    return rows.relu_() if relu else rows


def _published(
    queries: Tensor, bank: Tensor, labels: Tensor, size: int, options: argparse.Namespace
) -> None:
    """One k, the largest: the published code does all of it again for each k."""
    rows = normalize(bank.to(queries.device), dim=1).T.contiguous()
    classes = labels.to(queries.device)
    for part in normalize(queries, dim=1).split(size):
        similar, places = (part @ rows).topk(max(options.k), dim=1)
        votes = similar.new_zeros(len(part), options.classes)
        votes.scatter_add_(1, classes[places], torch.exp(similar / TEMPERATURE))
        votes.sort(dim=1, descending=True)


def _timed(
    side: str, n_queries: int, work: Callable[[], object], device: torch.device
) -> dict[str, object]:
    """Seconds, and the most memory held meanwhile, queries and bank included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = once_s(work, device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # of the process so far
    return {
        "side": side,
        "queries": n_queries,
        "s": seconds,
        "queries/s": n_queries / seconds,
        "peak GB": peak,
    }


def _checked(
    found: NearestNeighbors,
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    answers: dict[int, Tensor],
    options: argparse.Namespace,
) -> dict[str, object]:
    """For how many queries of the sample neighbors, and answers at each k, are as in float64."""
    k = max(options.k)
    unit = normalize(queries.double(), dim=1)
    best = unit.new_full((len(unit), 0), 0.0)
    places = torch.zeros(len(unit), 0, dtype=torch.int64, device=unit.device)
    for start in range(0, len(bank), 2**14):
        rows = normalize(bank[start : start + 2**14].to(unit.device).double(), dim=1)
        here = torch.arange(start, start + len(rows), device=unit.device).expand(len(unit), -1)
        similar = torch.cat([best, unit @ rows.T], dim=1)
        chosen = similar.topk(min(k, similar.shape[1]), dim=1)
        best, places = chosen.values, torch.cat([places, here], dim=1).gather(1, chosen.indices)
    same = ((found.rows == places) | ((found.similarities - best).abs() < 1e-12)).all(dim=1)
    classes = labels.to(places.device)[places]
    right = torch.ones_like(same)
    for count, answer in answers.items():
        votes = best.new_zeros(len(best), options.classes)
        votes.scatter_add_(1, classes[:, :count], torch.exp(best[:, :count] / TEMPERATURE))
        right &= votes.argmax(dim=1) == answer
    n = len(same)
    return {
        "neighbors as float64": f"{int(same.sum())} of {n}",
        "answers": f"{int(right.sum())} of {n}",
        "done again": f"{found.retried} of {n}",
    }


if __name__ == "__main__":
    main()

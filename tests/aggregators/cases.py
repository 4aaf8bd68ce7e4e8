"""The rules under test: one table, from which every test of this folder draws."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim import aggregators as rules
from fedjax_sim.aggregators.common import standard_normal
from fedjax_sim.aggregators.dnc import draw_columns
from fedjax_sim.aggregators.pre_aggregators import random_order
from fedjax_sim.aggregators.signguard import draw_start
from fedjax_sim.types import Aggregator, RoundContext
from tests.references import aggregators as oracle
from tests.references import averages, filters, preaggregators, subsets
from tests.references import mad as trust


class Case(NamedTuple):
    """A rule and its reference for an assumed f: ``reference(f, U, mask, g0, sizes)``.

    The other fields say which promises hold. ``linear``: what the info's weights
    combine into the aggregate: the updates (``raw``), the updates at the root update's
    norm (``rescaled``), or nothing (None). ``translation``, ``scale``, ``permutation``:
    what is done to the updates is done to the aggregate. ``identical``, ``zero``: equal
    updates give that update, zero updates zero. ``robust``: F arbitrary rows do not
    move it far: they lose all weight, or, with ``bound``, the aggregate is not longer
    than that many times the longest honest update. ``root``: it needs the root update,
    as every rule with ``trust`` does. ``inexact``: scenarios of test_references.py in
    which float32 and float64 decide differently, for a reason given at the case.
    """

    make: Callable[[int], Aggregator]
    reference: Callable[..., oracle.Result]
    linear: str | None = None
    translation: bool = False
    coordinate_wise: bool = False
    trust: bool = False
    robust: bool = True
    scale: bool = True
    permutation: bool = True
    identical: bool = True
    zero: bool = True
    stateful: bool = False
    bound: float | None = None
    root: bool = False
    inexact: tuple[str, ...] = ()


def _krum(**options: object) -> Case:
    return Case(
        lambda f: rules.krum(f, **options),
        lambda f, U, mask, g0, sizes: oracle.krum(U, f, mask, **options),
        linear="raw",
        translation=True,
    )


def _multi_krum(m: Callable[[int], int] | None = None, **options: object) -> Case:
    def count(n: int) -> int | None:
        return None if m is None else m(n)

    weighted = options.get("weighted", False)
    rule = options.get("rule", "one_shot")
    return Case(
        lambda f: rules.multi_krum(f, count(f), **options),
        lambda f, U, mask, g0, sizes: oracle.multi_krum(
            U, f, count(f), mask, sizes if weighted else None, rule
        ),
        linear="raw",
        translation=True,
    )


def _dual(variant: str, m: int | None = None, **options: object) -> Case:
    return Case(
        lambda f: rules.dual_system(f, variant, num_selected=m, **options),
        lambda f, U, mask, g0, sizes: oracle.dual_system(
            U, g0, f, variant, mask, m, **options
        ),
        linear="raw" if variant == "gated_mean" else "rescaled",
        trust=True,
    )


def _chain(
    pres: Callable[[int], list], steps: Callable[[int], list], rule: str, **promises
) -> Case:
    """``rules.chain`` of the steps, then the rule of another case."""

    def reference(f, U, mask, g0, sizes):
        def inner(rows, mask, sizes):
            return CASES[rule].reference(f, rows, mask, g0, sizes)

        return preaggregators.chain(U, mask, sizes, steps(f), inner)

    return Case(
        lambda f: rules.chain(*pres(f), CASES[rule].make(f)), reference, **promises
    )


def _nnm(f: int) -> Callable:
    return lambda U, rows: preaggregators.nnm(U, rows, f)


def _bucketing(step: int, size: int = 2) -> tuple:
    """The oracle of ``bucketing`` as that step of a chain, with the chain's draws."""

    def buckets(U, rows):
        order = np.asarray(random_order(jax.random.fold_in(KEY, step), IDS))
        return preaggregators.bucketing(U, rows, list(order), size)

    return buckets, "groups"


def _foolsgold(**options: object) -> Case:
    by = options.get("combine", "normalized")
    return Case(
        lambda f: rules.foolsgold(**options),
        lambda f, U, mask, g0, sizes: filters.foolsgold(U, mask, combine_by=by),
        linear="raw" if by == "normalized" else None,
        robust=False,  # lengths are not looked at
        identical=False,  # clients that are all alike are all sybils
        stateful=True,
    )


def _auror(**options: object) -> Case:
    return Case(
        lambda f: rules.auror(**options),
        lambda f, U, mask, g0, sizes: filters.auror(U, mask, **options),
        linear="raw",
        translation=True,
        scale=False,  # the threshold is a length
        robust=False,  # two groups: one of two opposite outliers stays
        stateful=True,
    )


def _mad(**options: object) -> Case:
    """The first round, with exclusion from the first."""
    by_data = options.get("weighting") == "data"

    def reference(f, U, mask, g0, sizes):
        round_one = trust.MAD(start=1, **options)
        return round_one(U, range(len(U)), mask, sizes if by_data else None)

    return Case(
        lambda f: rules.mad(start=1, **options),
        reference,
        linear="raw",
        translation=True,
        # Of outliers equally far away: a farther one would hide the others.
        robust=True,
        stateful=True,
    )


def _dnc(passes: int, size: int) -> Case:
    def columns(d: int) -> list[np.ndarray]:
        if size >= d:
            return [np.arange(d)] * passes
        keys = [jax.random.fold_in(KEY, i) for i in range(passes)]
        return [np.asarray(draw_columns(k, d, size)) for k in keys]

    return Case(
        lambda f: rules.dnc(f, passes, size),
        lambda f, U, mask, g0, sizes: filters.dnc(U, f, columns(len(U[0])), mask=mask),
        linear="raw",
        translation=True,
    )


def _signguard(**options: object) -> Case:
    def reference(f, U, mask, g0, sizes):
        d = len(U[0])
        start = int(draw_start(KEY, d - int(options["fraction"] * d)))
        last = 0.1 * np.asarray(params_like(np.zeros(d, np.float32)))
        return filters.signguard(U, start, mask, last=last, **options)

    return Case(
        lambda f: rules.signguard(**options),
        reference,
        scale=options.get("similarity") != "distance",  # the last aggregate stays
        zero=False,  # a median length of 0 keeps nobody
    )


def _flame(**options: object) -> Case:
    def reference(f, U, mask, g0, sizes):
        d = len(U[0])
        w = np.asarray(params_like(np.zeros(d, np.float32)))
        return filters.flame(U, w, np.asarray(standard_normal(KEY, d)), mask, **options)

    return Case(
        lambda f: rules.flame(**options),
        reference,
        scale=options.get("space") == "update",
        identical=options.get("noise") == 0.0,
        bound=1.1,
    )


CASES: dict[str, Case] = {
    "fedavg": Case(
        lambda f: rules.fedavg(),
        lambda f, U, mask, g0, sizes: oracle.fedavg(U, mask, sizes),
        linear="raw",
        translation=True,
        robust=False,
    ),
    "fedavg-uniform": Case(
        lambda f: rules.fedavg(weighting="uniform"),
        lambda f, U, mask, g0, sizes: oracle.fedavg(U, mask),
        linear="raw",
        translation=True,
        robust=False,
    ),
    "fedavg-total": Case(
        lambda f: rules.fedavg(denominator="total"),
        lambda f, U, mask, g0, sizes: oracle.fedavg(U, mask, sizes, NUM_CLIENTS),
        robust=False,
    ),
    "median": Case(
        lambda f: rules.median(),
        lambda f, U, mask, g0, sizes: oracle.median(U, mask),
        translation=True,
        coordinate_wise=True,
    ),
    "median-lower": Case(
        lambda f: rules.median(even="lower"),
        lambda f, U, mask, g0, sizes: oracle.median(U, mask, "lower"),
        translation=True,
        coordinate_wise=True,
    ),
    "trimmed_mean": Case(
        rules.trimmed_mean,
        lambda f, U, mask, g0, sizes: oracle.trimmed_mean(U, f, mask),
        translation=True,
        coordinate_wise=True,
    ),
    "krum": _krum(),
    "krum-unsquared": _krum(squared=False),
    "krum-n-f-1": _krum(neighbours="n-f-1"),
    "krum-n-f": _krum(neighbours="n-f", squared=False),
    "multi_krum": _multi_krum(),
    "multi_krum-m": _multi_krum(lambda f: f + 4),
    "multi_krum-weighted": _multi_krum(weighted=True),
    "multi_krum-iterative": _multi_krum(rule="iterative"),
    "fltrust": Case(
        lambda f: rules.fltrust(),
        lambda f, U, mask, g0, sizes: oracle.fltrust(U, g0, mask),
        linear="rescaled",
        trust=True,
    ),
    "dual_system": _dual("filter_then_trust"),
    "dual_system-raw": _dual("filter_then_trust", krum_space="raw"),
    "dual_system-m": _dual("filter_then_trust", m=4),
    "dual_system-root": _dual("intersection", tau=0.9, fallback="root"),
    "dual_system-trust_then_filter": _dual("trust_then_filter"),
    "dual_system-trust_then_filter-tau": _dual("trust_then_filter", tau=0.3, m=3),
    "dual_system-soft": _dual("soft"),
    "dual_system-soft-raw": _dual("soft", m=3, gamma=2.5, krum_space="raw"),
    "dual_system-intersection": _dual("intersection", tau=0.3),
    "dual_system-dynamic_trust": _dual("dynamic_trust", rho=0.2, k=0.1)._replace(
        stateful=True
    ),
    "dual_system-dynamic_trust-first": _dual(
        "dynamic_trust", base="trust_then_filter", rho=0.0, k=0.3, tau_max=0.9
    ),
    "dual_system-gated_mean": _dual("gated_mean"),
    "dual_system-gated_mean-m": _dual("gated_mean", m=4),
    "mda": Case(
        rules.mda,
        lambda f, U, mask, g0, sizes: subsets.mda(U, f, mask),
        linear="raw",
        translation=True,
    ),
    "caf": Case(
        rules.caf,
        lambda f, U, mask, g0, sizes: subsets.caf(U, f, mask),
        linear="raw",
        translation=True,
    ),
    "smea": Case(
        rules.smea,
        lambda f, U, mask, g0, sizes: subsets.smea(U, f, mask),
        linear="raw",
        translation=True,
    ),
    "monna": Case(
        rules.monna,
        lambda f, U, mask, g0, sizes: subsets.monna(U, f, g0, mask),
        linear="raw",
        root=True,
    ),
    "monna-pivot": Case(
        lambda f: rules.monna(f, pivot=int(IDS[3])),
        lambda f, U, mask, g0, sizes: subsets.monna(U, f, 3, mask),
        linear="raw",
        translation=True,
        permutation=False,  # another row is the pivot's then
    ),
    "chain-nnm-krum": _chain(
        lambda f: [rules.nnm(f)],
        lambda f: [_nnm(f)],
        "krum",
        linear="raw",
        translation=True,
    ),
    "chain-nnm-trimmed_mean": _chain(
        lambda f: [rules.nnm(f)],
        lambda f: [_nnm(f)],
        "trimmed_mean",
        translation=True,
        # Means of whole numbers that tie in float64 are rounded apart in float32.
        inexact=("ties",),
    ),
    "chain-bucketing-median": _chain(
        lambda f: [rules.bucketing()],
        lambda f: [_bucketing(0)],
        "median",
        translation=True,
        permutation=False,  # other clients share a bucket then
    ),
    "chain-clipping-fedavg": _chain(
        lambda f: [rules.clipping()],
        lambda f: [preaggregators.clipping],
        "fedavg",
        bound=1 + 1e-5,
    ),
    "chain-arc-krum": _chain(
        lambda f: [rules.arc(f)],
        lambda f: [lambda U, rows: preaggregators.arc(U, rows, f)],
        "krum",
        bound=1 + 1e-5,
    ),
    "chain-nnm-bucketing-clipping-fltrust": _chain(
        lambda f: [rules.nnm(f), rules.bucketing(3), rules.clipping(2.0)],
        lambda f: [
            _nnm(f),
            _bucketing(1, 3),
            lambda U, rows: preaggregators.clipping(U, rows, 2.0),
        ],
        "fltrust",
        trust=True,
        permutation=False,
        bound=1.0,
        # Who is nearest to an outlier: float32 finds all others equally far away.
        inexact=("1e8", "1e18"),
    ),
    "meamed": Case(
        rules.meamed,
        lambda f, U, mask, g0, sizes: averages.meamed(U, f, mask),
        translation=True,
        bound=1.0,
    ),
    "phocas": Case(
        rules.phocas,
        lambda f, U, mask, g0, sizes: averages.phocas(U, f, mask),
        translation=True,
        bound=1.0,
    ),
    "bulyan": Case(
        rules.bulyan,
        lambda f, U, mask, g0, sizes: averages.bulyan(U, f, mask),
        translation=True,
        permutation=False,  # nearest neighbours of each other tie in the last passes
    ),
    "geometric_median": Case(
        lambda f: rules.geometric_median(),
        lambda f, U, mask, g0, sizes: averages.geometric_median(U, sizes, mask),
        linear="raw",
        translation=True,
        robust=False,  # three steps do not get over an outlier
    ),
    "geometric_median-converged": Case(
        lambda f: rules.geometric_median(num_steps=30, weighting="uniform"),
        lambda f, U, mask, g0, sizes: averages.geometric_median(
            U, np.ones(len(U)), mask, T=30
        ),
        linear="raw",
        translation=True,
        bound=1.0,
    ),
    "geometric_median-zero": Case(
        lambda f: rules.geometric_median(num_steps=2, floor=4.0, start="zero"),
        lambda f, U, mask, g0, sizes: averages.geometric_median(
            U, sizes, mask, T=2, nu=4.0, z0="zero"
        ),
        linear="raw",
        scale=False,
        bound=1.0,
    ),
    "centered_clipping": Case(
        lambda f: rules.centered_clipping(),
        lambda f, U, mask, g0, sizes: averages.centered_clipping(U, "median", mask),
        stateful=True,
        bound=1.0,
    ),
    "centered_clipping-radius": Case(
        lambda f: rules.centered_clipping(radius=2.0, num_steps=3),
        lambda f, U, mask, g0, sizes: averages.centered_clipping(U, 2.0, mask, L=3),
        stateful=True,
        scale=False,
        identical=False,
        bound=1.0,
    ),
    "norm_clipping": Case(
        lambda f: rules.norm_clipping(),
        lambda f, U, mask, g0, sizes: averages.norm_clipping(U, 3.0, mask),
        scale=False,
        identical=False,
        bound=1.0,
    ),
    "norm_clipping-median": Case(
        lambda f: rules.norm_clipping(bound="median"),
        lambda f, U, mask, g0, sizes: averages.norm_clipping(U, "median", mask),
        bound=1.0,
    ),
    "norm_clipping-reject": Case(
        lambda f: rules.norm_clipping(bound=7.0, mode="reject"),
        lambda f, U, mask, g0, sizes: averages.norm_clipping(U, 7.0, mask, "reject"),
        linear="raw",
        scale=False,
    ),
    "norm_clipping-noise": Case(
        lambda f: rules.norm_clipping(noise_std=0.5),
        lambda f, U, mask, g0, sizes: averages.norm_clipping(
            U, 3.0, mask, sigma=0.5, noise=server_noise(U)
        ),
        scale=False,
        identical=False,
        zero=False,
        bound=1.0,
    ),
    "robust_learning_rate": Case(
        lambda f: rules.robust_learning_rate(f + 2),
        lambda f, U, mask, g0, sizes: averages.robust_learning_rate(
            U, f + 2, sizes, mask
        ),
        robust=False,
    ),
    "robust_learning_rate-median": Case(
        lambda f: rules.robust_learning_rate(f + 2, base="median"),
        lambda f, U, mask, g0, sizes: averages.robust_learning_rate(
            U, f + 2, sizes, mask, "median"
        ),
        bound=1.0,
    ),
    "crfl": Case(
        lambda f: rules.crfl(),
        lambda f, U, mask, g0, sizes: averages.crfl(
            U, params_like(g0), 2.4, 0.01, server_noise(U), mask
        ),
        scale=False,
        identical=False,
        zero=False,
        bound=1.0,
    ),
    "crfl-quiet": Case(
        lambda f: rules.crfl(0.1, slope=0.05, noise_std=0.0, weighting="data"),
        lambda f, U, mask, g0, sizes: averages.crfl(
            U, params_like(g0), 0.3, 0.0, server_noise(U), mask, sizes
        ),
        scale=False,
        identical=False,
        zero=False,
        bound=1.0,
    ),
    "foolsgold": _foolsgold(),
    "foolsgold-sum": _foolsgold(combine="sum"),
    "foolsgold-mean": _foolsgold(combine="mean"),
    "auror": _auror(threshold=2.0),
    "auror-vote": _auror(threshold=2.0, mode="vote", share=0.4),
    # Options by which they differ here from rules that keep the same clients.
    "mad": _mad(threshold=0.7, weighting="data"),
    "mad-max": _mad(scale="max", threshold=0.6),
    "mad-clusters": _mad(clusters=2, weighting="data"),
    "dnc": _dnc(3, 15),
    "dnc-all": _dnc(1, 10_000),
    "signguard": _signguard(fraction=0.7),
    "signguard-two_means": _signguard(fraction=0.7, cluster="two_means"),
    "signguard-cosine": _signguard(fraction=1.0, similarity="cosine"),
    "signguard-distance": _signguard(fraction=1.0, similarity="distance"),
    "flame": _flame(noise=0.01),
    "flame-update": _flame(noise=0.0, space="update"),
    # In the first round there is nothing to predict from: the mean of all.
    "fldetector": Case(
        lambda f: rules.fldetector(window=3, start=0),
        lambda f, U, mask, g0, sizes: oracle.fedavg(U, mask),
        linear="raw",
        translation=True,
        robust=False,
        stateful=True,
    ),
}

# Enough for what every rule promises: the others differ from these in a number.
DISTINCT = [
    name
    for name in CASES
    if name
    not in (
        "fedavg-uniform",
        "krum-n-f-1",
        "krum-n-f",
        "multi_krum-m",
        "dual_system-m",
        "dual_system-trust_then_filter-tau",
        "dual_system-soft-raw",
        "dual_system-intersection",
        "dual_system-dynamic_trust-first",
        "dual_system-gated_mean-m",
        "phocas",
        "geometric_median-zero",
        "centered_clipping-radius",
        "norm_clipping-median",
        "crfl-quiet",
        "chain-nnm-trimmed_mean",
        "foolsgold-sum",
        "foolsgold-mean",
        "mad-max",
        "dnc-all",
        "signguard-distance",
    )
]

# N, the clients in all; a cohort of N rows is smaller.
NUM_CLIENTS = 40
N, D, F = 12, 23, 2
KEY = jax.random.key(5)
# Who the rows are, of the NUM_CLIENTS: not in order.
IDS = np.random.default_rng(9).permutation(NUM_CLIENTS)[:N].astype(np.int32)


def context(g0, mask=None, sizes=None, **fields) -> RoundContext:
    """A context with everything that some rule needs.

    The server's parameters are ``params_like(g0)``, the same in every round; the cohort
    is the clients ``IDS``.
    """
    params = params_like(g0)
    everything = {
        "root_update": g0,
        "num_samples": None if sizes is None else jnp.asarray(sizes, jnp.float32),
        "mask": None if mask is None else jnp.asarray(mask),
        "key": KEY,
        "params": params,
        "previous_params": jax.tree.map(lambda w: 0.9 * w, params),
        "previous_aggregate": jax.tree.map(lambda w: 0.1 * w, params),
        "round": jnp.int32(3),
        "client_ids": jnp.asarray(IDS),
    }
    return RoundContext(**everything | fields)


def params_like(tree):
    """Parameters in the structure of ``tree``, the same in every call and round."""
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([np.size(x) for x in leaves])
    flat = 0.5 * np.cos(1.0 + 0.7 * np.arange(ends[-1]))
    parts = np.split(flat, ends[:-1])
    return jax.tree.unflatten(
        structure,
        [
            jnp.asarray(p.reshape(np.shape(x)), jnp.result_type(x))
            for p, x in zip(parts, leaves)
        ],
    )


def server_noise(U) -> np.ndarray:
    """What a server that adds noise draws in the tests: from the key as it is."""
    return np.asarray(jax.random.normal(KEY, (np.shape(U)[1],), jnp.float32))


def cohort(seed: int, n: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``U [n, d]``, root update ``[d]`` and sizes ``[n]`` on which the rules differ."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=d)
    # Skewed in every coordinate, so that mean, median and trimmed mean fall apart; of
    # mixed length and direction, so that the filters and the trust scores do.
    noise = rng.exponential(size=(n, d)) * rng.normal(size=(n, 1))
    U = rng.lognormal(sigma=0.5, size=(n, 1)) * (0.5 * direction + noise)
    U[1::5] -= 1.2 * direction
    g0 = 0.7 * direction + 0.3 * rng.normal(size=d)
    sizes = rng.integers(1, 50, size=n)
    return U.astype(np.float32), g0.astype(np.float32), sizes.astype(np.float32)


def attacked(U: np.ndarray, f: int, kind: str) -> np.ndarray:
    """The same rows, the last f of them replaced."""
    U = U.copy()
    n, d = U.shape
    wave = np.cos(np.arange(d)).astype(np.float32)
    for i in range(n - f, n):
        sign = 1 if i % 2 else -1
        U[i] = {
            "collude": U[: n - f].mean(axis=0) + 3 * wave,
            "1e8": sign * 1e8 * wave,
            "1e18": sign * 1e18 * wave / np.sqrt(d),
            "inf": np.full(d, sign * np.inf),
            "nan": np.where(np.arange(d) % 2, np.nan, 1.0),
            "overflow": np.full(d, sign * 1e30),
            "zero": np.zeros(d),
        }[kind]
    return U


class Compiled:
    """A rule for f = F, jitted once for all tests; it counts its traces."""

    def __init__(self, name: str):
        self.rule = CASES[name].make(F)
        self.state = self.rule.init(jnp.zeros(D), NUM_CLIENTS)
        self.traces = 0

        @jax.jit
        def apply(U, g0, mask, sizes, byzantine):
            self.traces += 1
            this = context(g0, mask, sizes, byzantine=byzantine)
            return self.rule.apply(U, self.state, this)

        self.apply = apply

    def __call__(self, U, g0, mask=None, sizes=None, byzantine=None):
        """The aggregate and the info, of arrays of one shape and type."""
        result = self.apply(
            np.asarray(U, np.float32),
            np.asarray(g0, np.float32),
            np.ones(N, bool) if mask is None else mask,
            np.ones(N, np.float32) if sizes is None else sizes,
            np.zeros(N, bool) if byzantine is None else byzantine,
        )
        assert self.traces == 1
        return np.asarray(result[0]), result[2]


compiled = functools.cache(Compiled)

KINDS = ("collude", "1e8", "1e18", "inf", "nan", "overflow", "zero")
